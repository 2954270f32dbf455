"""How many documents does a verdict need? From the answers of TASK that changed between a base and
its runs, say how likely `compare` calls them equivalent or not worse if there is no difference, and
how likely it sees a difference of the margin.
"""

from lm_eval_pruned.cli.compare import UNIT
from lm_eval_pruned.util.options import row


# fmt: off
OPTIONS = (
    row("task", "TASK", "task or group, such as boolq"),
    row("paths", "RESULTS",
        "as for compare: the base, then the runs, or one sweep folder (default: the current "
        "folder)", nargs="*", default=["."]),
    row("--margin", "MARGIN", UNIT, required=True),
    row("--documents", "N",
        "how many documents to ask about (default: as many as were evaluated)", type=int),
    row("--alpha", "A",
        "level of one test (default: 0.05); with several rows in a table their correction leaves less",
        type=float, default=0.05),
)
# fmt: on
_TITLES = ("run", "metric", "documents", "changed", "margin", "verdict")
_MORE = ("if there is", "chance", "documents for 80 %")
_FORMS = ("", "", "", ".1%", ".4g", "", "", ".0%", "")


def run(arguments) -> None:
    """Print the chances of a verdict."""
    from lm_eval_pruned.compare import comparison, power
    from lm_eval_pruned.compare.verdicts import Margin
    from lm_eval_pruned.util.tables import markdown_table

    margin, documents = Margin("margin", arguments.margin), arguments.documents
    base, runs = comparison.read_comparands(arguments.paths)
    options = {"documents": documents, "alpha": arguments.alpha}
    found = power.power_of(base, runs, arguments.task, margin, **options)
    rows = [
        ["-" if v is None else format(v, f) for v, f in zip(each, _FORMS, strict=True)]
        for each in found
    ]
    asked = f"{documents} documents" if documents else "as many documents as there are"
    print(
        f"Chance of a verdict on {arguments.task} with {asked}, if as many answers change as did in "
        f"these samples; one test, without a correction for others.\n\n"
        f"{markdown_table(_TITLES + _MORE, rows, 'llrrrllrr')}"
    )
