"""``lm-eval-pruned report``: a sweep as Markdown, CSV, HTML and plots."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import argparse


def add(commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "report",
        help="a sweep as Markdown, CSV, HTML and plots",
        description="Write report.md, results.csv, a self-contained report.html, plots and, from "
        "logged samples, flips.html with every changed answer. Needs the extra `report`.",
    )
    parser.add_argument("folder", metavar="DIR", help="sweep folder")
    parser.add_argument(
        "--output_path",
        metavar="DIR",
        help="where to write (default: `report` in the sweep folder)",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.05,
        metavar="A",
        help="level of the tests; intervals cover 1 - A (default: 0.05)",
    )
    parser.add_argument(
        "--no_texts",
        action="store_true",
        help="leave the texts of documents and answers out, for a report that is published",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from lm_eval_pruned.report import report

    for file in report.write_report(
        arguments.folder,
        arguments.output_path,
        alpha=arguments.alpha,
        texts=not arguments.no_texts,
    ):
        print(file)
    return 0
