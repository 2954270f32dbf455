"""Compare runs with a base, task by task: paired differences with interval and p from the logged
samples, adjusted over the runs of each task; across expansion ratios also correlations and trends.
"""

import sys

from lm_eval_pruned.util.options import Row, row


# fmt: off
#: What a margin is written in.
UNIT = "1pt (a percentage point), 2%% (of the base's score), or a number in the metric's own unit"
ALPHA = row("--alpha", "A", "level of the tests; intervals cover 1 - A (default: 0.05)", type=float,
            default=0.05)


def margins(also: str = "") -> list[Row]:
    """Return the options that ask for a claim, of which one can be given; say `also` of both."""
    claims = {"equivalent": "neither better nor worse", "not_worse": "not worse"}
    return [
        row(f"--{claim}", "MARGIN", f"test whether scores are {words} by more than this: {UNIT}{also}")
        for claim, words in claims.items()
    ]


OPTIONS = (
    row("paths", "RESULTS",
        "the base, then the runs: results files, folders that `lm_eval --output_path` filled, or "
        "sweep folders; a single sweep folder is compared with its own baseline", nargs="+"),
    ALPHA,
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
    from lm_eval_pruned.compare.margins import CLAIMS, Margin

    claims = {claim: getattr(arguments, claim) for claim in CLAIMS}
    margin = next((Margin(n, v) for n, v in claims.items() if v is not None), None)
    options = {"alpha": arguments.alpha, "subtasks": arguments.subtasks}
    result = compare(*read_comparands(arguments.paths), margin=margin, **options)
    if arguments.format != "table":
        print(FORMATS[arguments.format](result), end="")
    elif sys.stdout.isatty():
        print(as_table(result, everything=arguments.all, padded=True), end="")
    else:
        print(FORMATS["markdown"](result), end="")
