"""How many documents does a verdict need? From the answers of TASK that changed between a base and
its runs, estimate how likely `compare` is to call them equivalent or not worse if there is no
difference, and how likely it is to detect a difference as large as the margin.
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
        "number of documents to estimate for (default: as many as were evaluated)", type=int),
    row("--alpha", "A",
        "level of one test (default: 0.05); the correction for several rows in a table leaves less",
        type=float, default=0.05),
)
# fmt: on
_TITLES = ("run", "metric", "documents", "changed", "margin", "verdict")
_MORE = ("assuming", "chance", "documents for 80 %")
_FORMS = ("", "", "", ".1%", ".4g", "", "", ".0%", "")


def run(arguments) -> None:
    """Print the chances of a verdict."""
    from lm_eval_pruned.compare import comparison, power
    from lm_eval_pruned.compare.margin import Margin
    from lm_eval_pruned.util.tables import markdown_table

    margin, documents = Margin("margin", arguments.margin), arguments.documents
    base, runs = comparison.read_comparands(arguments.paths)
    options = {"documents": documents, "alpha": arguments.alpha}
    found = power.power_of(base, runs, arguments.task, margin, **options)
    rows = [
        ["-" if v is None else format(v, f) for v, f in zip(each, _FORMS, strict=True)]
        for each in found
    ]
    asked = f"{documents} documents" if documents else "the present number of documents"
    print(
        f"Chance of a verdict on {arguments.task} with {asked}, if answers change as often as in "
        f"these samples; for a single test, without correction.\n\n"
        f"{markdown_table(_TITLES + _MORE, rows, 'llrrrllrr')}"
    )
