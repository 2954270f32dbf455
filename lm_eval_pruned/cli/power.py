"""``lm-eval-pruned power``: whether a comparison can reach a verdict, before it is made."""

from __future__ import annotations

from lm_eval_pruned.cli.compare import add_alpha


def add(commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "power",
        help="how likely a comparison reaches a verdict, from the answers that changed so far",
        description="How many documents does a verdict need? From the answers of TASK that changed "
        "between a base and its runs, say how likely `compare` calls them equivalent or not worse "
        "if there is no difference, and how likely it sees a difference of the margin.",
    )
    parser.add_argument("task", metavar="TASK", help="task or group, such as boolq")
    parser.add_argument(
        "paths",
        nargs="*",
        default=["."],
        metavar="RESULTS",
        help="as for compare: the base, then the runs, or one sweep folder (default: the current "
        "folder)",
    )
    parser.add_argument(
        "--margin",
        required=True,
        metavar="MARGIN",
        help="1pt (a percentage point), 2%% (of the base's score), or a number in the metric's own "
        "unit",
    )
    parser.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help="how many documents to ask about (default: as many as were evaluated)",
    )
    add_alpha(
        parser,
        "level of one test (default: 0.05); with several rows in a table their correction "
        "leaves less",
    )
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Run the command; return its exit code."""
    from lm_eval_pruned.compare import comparison, power
    from lm_eval_pruned.compare.verdicts import Margin
    from lm_eval_pruned.util.tables import markdown_table

    margin, documents = Margin("margin", arguments.margin), arguments.documents
    base, runs = comparison.read_comparands(arguments.paths)
    options = {"documents": documents, "alpha": arguments.alpha}
    found = power.power_of(base, runs, arguments.task, margin, **options)
    titles = ["run", "metric", "documents", "changed", "margin", "verdict"]
    titles += ["if there is", "chance", "documents for 80 %"]
    forms = ("", "", "", ".1%", ".4g", "", "", ".0%", "")
    rows = [
        ["-" if v is None else format(v, f) for v, f in zip(row, forms, strict=True)]
        for row in found
    ]
    asked = f"{documents} documents" if documents else "as many documents as there are"
    print(
        f"Chance of a verdict on {arguments.task} with {asked}, if as many answers change as did in "
        "these samples; one test, without a correction for others.\n\n"
        f"{markdown_table(titles, rows, 'llrrrllrr')}"
    )
    return 0
