"""Compare runs with a base, task by task: paired differences with interval and p from the logged
samples, adjusted over the runs of each task; across expansion ratios also correlations and trends.
"""

import sys

from lm_eval_pruned.util.options import Row, row


#: What a margin is written in.
UNIT = "1pt (a percentage point), 2%% (of the base's score), or a number in the metric's own unit"


_LEVEL = "level of the tests; intervals cover 1 - A (default: 0.05)"


def alpha(about: str = _LEVEL) -> Row:
    """Return the option for the level of tests."""
    return row("--alpha", "A", about, type=float, default=0.05)


def margins(also: str = "") -> list[Row]:
    """Return the options that ask for a claim, of which one can be given; say `also` of both."""
    ask = "ask whether scores are shown to be"
    found = {"equivalent": "neither better nor worse", "not_worse": "not worse"}
    return [
        row(f"--{claim}", "MARGIN", f"{ask} {words} by it: {UNIT}{also}")
        for claim, words in found.items()
    ]


# fmt: off
OPTIONS = (
    row("paths", "RESULTS",
        "the base, then the runs: results files, folders that `lm_eval --output_path` filled, or "
        "sweep folders; one sweep folder alone is compared with its own baseline", nargs="+"),
    alpha(),
    row("--subtasks", "", "compare the members of groups too, such as the subjects of MMLU"),
    margins(),
    row("--format", None,
        "table (default) is aligned text for a terminal, and Markdown in a file or pipe",
        choices=("table", "markdown", "csv", "json"), default="table"),
    row("--all", "", "in a terminal, show all columns, restated metrics, trends and correlations"),
)
# fmt: on


def run(arguments) -> None:
    """Print the differences."""
    from lm_eval_pruned.compare.comparison import compare, read_comparands
    from lm_eval_pruned.compare.comparison_table import FORMATS, as_table
    from lm_eval_pruned.compare.verdicts import CLAIMS, Margin

    asked = [(claim, getattr(arguments, claim)) for claim in CLAIMS]
    margin = next((Margin(*each) for each in asked if each[1] is not None), None)
    options = {"alpha": arguments.alpha, "subtasks": arguments.subtasks}
    result = compare(*read_comparands(arguments.paths), margin=margin, **options)
    form = "markdown" if arguments.format == "table" else arguments.format
    if arguments.format == "table" and sys.stdout.isatty():
        print(as_table(result, everything=arguments.all, padded=True), end="")
    else:
        print(FORMATS[form](result), end="")
