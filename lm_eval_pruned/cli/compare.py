"""``lm-eval-pruned compare``: paired statistics of runs against a base."""

from __future__ import annotations

import sys


def add(commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "compare",
        help="paired statistics of runs against a base",
        description="Compare runs with a base, task by task: paired differences with interval and "
        "p from the logged samples, adjusted over the runs of each task; across expansion ratios also "
        "correlations and trends.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="RESULTS",
        help="the base, then the runs: results files, folders that `lm_eval --output_path` filled, "
        "or sweep folders; one sweep folder alone is compared with its own baseline",
    )
    add_alpha(parser)
    parser.add_argument(
        "--subtasks",
        action="store_true",
        help="compare the members of groups too, such as the subjects of MMLU",
    )
    add_margins(parser.add_mutually_exclusive_group())
    parser.add_argument(
        "--format",
        choices=("table", "markdown", "csv", "json"),
        default="table",
        help="table (default) is aligned text for a terminal, and Markdown in a file or pipe",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="in a terminal, show all columns, restated metrics, trends and correlations",
    )
    parser.set_defaults(run=run)


def add_alpha(
    parser, text="level of the tests; intervals cover 1 - A (default: 0.05)"
) -> None:
    """Declare the option for the level of tests."""
    parser.add_argument("--alpha", type=float, default=0.05, metavar="A", help=text)


def add_margins(group, also="") -> None:
    """Declare the options that ask for a claim, of which one can be given; say `also` of both."""
    for claim, what in (
        ("equivalent", "neither better nor worse by it"),
        ("not_worse", "not worse by it"),
    ):
        group.add_argument(
            f"--{claim}",
            metavar="MARGIN",
            help=f"ask whether scores are shown to be {what}: 1pt (a percentage point), 2%% (of "
            f"the base's score), or a number in the metric's own unit{also}",
        )


def run(arguments) -> int:
    """Run the command; return its exit code."""
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
    return 0
