"""``lm-eval-pruned report``: a sweep as Markdown, CSV, HTML and plots."""

from __future__ import annotations

from lm_eval_pruned.cli.compare import add_alpha


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
    add_alpha(parser)
    parser.add_argument(
        "--no_texts",
        action="store_true",
        help="leave the texts of documents and answers out, for a report that is published",
    )
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Run the command; return its exit code."""
    from lm_eval_pruned.report.report import write_report

    where, texts = arguments.output_path, not arguments.no_texts
    files = write_report(arguments.folder, where, alpha=arguments.alpha, texts=texts)
    print(*files, sep="\n")
    return 0
