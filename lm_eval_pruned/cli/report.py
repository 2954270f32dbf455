"""Write report.md, results.csv, a self-contained report.html, plots and, from logged samples,
flips.html and flips.jsonl with the changed answers. Needs the extra `report`.
"""

from pathlib import Path

from lm_eval_pruned.cli.compare import ALPHA
from lm_eval_pruned.util.options import row


# fmt: off
OPTIONS = (
    row("folder", "DIR", "sweep folder"),
    row("--output_path", "DIR", "where to write (default: `report` in the sweep folder)"),
    ALPHA,
    row("--no_texts", "",
        "leave out the texts of documents and answers, for a report to be published"),
)
# fmt: on


def run(arguments) -> None:
    """Write the report, and print the names of its files."""
    from lm_eval_pruned.results.runs import read_definition, read_sweep

    # A wrong folder is told before a missing package.
    read_definition(Path(arguments.folder))
    from lm_eval_pruned.report.report import compared, write_report

    where, texts = arguments.output_path, not arguments.no_texts
    sweep = read_sweep(arguments.folder)
    comparison = compared(sweep, alpha=arguments.alpha)
    files = write_report(sweep, comparison, where, texts=texts)
    print(*files, sep="\n")
