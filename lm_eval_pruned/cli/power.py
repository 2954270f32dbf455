"""How many documents does a margin need? Documents are drawn again and again from those that a base
and its runs have been evaluated on, and judged as `verdict` and `compare` do. Prints, for each measure
of TASK, how likely the runs are to be called equivalent or not worse if they do not differ, or differ
as they do in these documents, and how many documents give a chance of 80 %.
"""

from operator import itemgetter

from lm_eval_pruned.cli.compare import UNIT
from lm_eval_pruned.util.options import row


# fmt: off
OPTIONS = (
    row("task", "TASK[,TASK...]", "task or group, such as boolq; of several tasks, the claim on their mean"),
    row("paths", "RESULTS",
        "as for compare: the base, then the runs, or one sweep folder (default: the current "
        "folder)", nargs="*", default=["."]),
    row("--margin", "MARGIN", f"{UNIT} (default: that of verdict)"),
    row("--measure", "METRIC", "the metric to judge (default: those that verdict judges, and the score that counts)"),
    row("--documents", "N",
        "number of documents to estimate for (default: as many as were evaluated)", type=int),
    row("--alpha", "A",
        "level of one test (default: 0.05); a table of several rows tests each at a lower level",
        type=float, default=0.05),
)
# fmt: on


def run(arguments) -> None:
    """Print the chances of a verdict."""
    from lm_eval_pruned.compare.comparison import read_comparands
    from lm_eval_pruned.compare.power import DRAWS, MOST, chances, pilots_of
    from lm_eval_pruned.util.tables import Column, Table

    base, runs = read_comparands(arguments.paths)
    tasks = arguments.task.split(",")
    columns = [
        Column("run", itemgetter(0)),
        Column("metric", itemgetter(1)),
        Column("documents", itemgetter(2), "d"),
        Column("changed", itemgetter(3), ".1%"),
        Column("margin", itemgetter(4), ".4g"),
        Column("verdict", itemgetter(5)),
        Column("assuming", itemgetter(6)),
        Column("chance", itemgetter(7), ".0%"),
        Column(
            "documents for 80 %",
            lambda row: f"{row[8]:,}" if row[8] else f"> {MOST:,}",
            ">",
        ),
    ]
    rows = [
        row
        for run in runs
        if not run.is_floor
        for cases in pilots_of(base, run, tasks, arguments.margin, arguments.measure)
        for row in chances(cases, arguments.documents, arguments.alpha)
    ]
    n = arguments.documents
    number = f"{n} documents" if n else "the present number of documents"
    print(
        f"Chance of a verdict on {' and '.join(tasks)} with {number}, of a single test without "
        f"correction. A chance of 80 % has a standard error of 3 points, from {DRAWS} draws of these "
        f"documents, and the number of documents for it one of about 8 %.\n\n"
        f"{Table('Chances', columns, rows).markdown()}"
    )
