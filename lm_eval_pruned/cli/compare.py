"""``lm-eval-pruned compare``: paired statistics of runs against a base."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from lm_eval_pruned.compare.margins import add_margins, margin_of


if TYPE_CHECKING:
    import argparse


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
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        metavar="A",
        help="level of the tests; intervals cover 1 - A (default: 0.05)",
    )
    parser.add_argument(
        "--subtasks",
        action="store_true",
        help="compare the members of groups too, such as the subjects of MMLU",
    )
    add_margins(parser)
    parser.add_argument(
        "--format",
        choices=("table", "markdown", "csv", "json"),
        default="table",
        help="table (default) is aligned text that fits a terminal, and Markdown in a file or pipe",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="in a terminal, show restated metrics, trends and correlations too",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from lm_eval_pruned.compare import comparison
    from lm_eval_pruned.compare.comparison_table import FORMATS, as_text

    margin = margin_of(arguments)
    base, runs = comparison.read_comparands(arguments.paths)
    result = comparison.compare(
        base,
        runs,
        alpha=arguments.alpha,
        subtasks=arguments.subtasks,
        margin=margin,
    )
    if arguments.format == "table" and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        print(as_text(result, width, everything=arguments.all), end="")
    else:
        form = "markdown" if arguments.format == "table" else arguments.format
        print(FORMATS[form](result), end="")
    return 0
