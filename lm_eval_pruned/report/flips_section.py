"""The section of a report on answers that changed, its CSV and the page beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_pruned.report.flips import find_flips
from lm_eval_pruned.report.flips_page import as_flips_page
from lm_eval_pruned.report.page import Section, Table, run_label
from lm_eval_pruned.util.tables import csv_table


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.report.flips import FlipCounts, Flips
    from lm_eval_pruned.results.files import Run

PAGE = "flips.html"
CSV = "flips.csv"
_COLUMNS = (
    *("run", "expansion_ratio", "task", "metric", "documents"),
    *("right_to_wrong", "wrong_to_right", "flipped_share", "changed", "changed_share"),
)


def flips_section(
    title: str, base: Run, others: Sequence[Run], *, texts: bool = True
) -> tuple[Section | None, dict[str, str]]:
    """Return the section on changed answers and the files that it links.

    Args:
        title: Heading of the report.
        base: The unpruned model.
        others: The other runs of the sweep.
        texts: Whether the page shows the texts of documents and answers.

    Returns:
        The section and the files by name; None and no file where no task logged samples
        of answers that are right or wrong.

    Raises:
        ResultsError: A file of samples cannot be read or is incomplete.
    """
    counts = find_flips(base, others)
    if not counts.rows:
        return None, {}
    files = {
        PAGE: as_flips_page(title, base, others, counts.changed, texts=texts),
        CSV: csv_table(
            _COLUMNS,
            [{name: getattr(row, name) for name in _COLUMNS} for row in counts.rows],
        ),
    }
    explanation = (
        "A pruned model with the accuracy of the unpruned one may answer other questions right "
        "(Dutta et al. 2024, Accuracy is Not All You Need, arXiv 2407.09141). Each cell: "
        "\u2212 documents that turned from right to wrong, + documents that turned from wrong to "
        "right, and the share of all documents with another answer, be it right or wrong. The answer is the most likely "
        "choice, or the text after the task's filter; free texts nearly always differ in something. "
        "A - stands where the samples do not tell which answer was chosen."
    )
    section = Section(
        "Changed answers",
        [explanation],
        table=_table(counts, others),
        notes=_notes(counts),
        links=(
            ("The changed answers, document by document", PAGE),
            ("The counts as CSV", CSV),
        ),
    )
    return section, files


def _table(counts: FlipCounts, others: Sequence[Run]) -> Table:
    found = {(row.task, row.run): row for row in counts.rows}
    runs = [run for run in others if any(run.name == name for _, name in found)]
    rows = []
    for task in dict.fromkeys(row.task for row in counts.rows):
        cells = [found.get((task, run.name)) for run in runs]
        first = next(cell for cell in cells if cell is not None)
        metric = first.metric.removesuffix(",none")
        rows.append([task, metric, str(first.documents), *map(_cell, cells)])
    columns = ["task", "right by", "documents", *map(run_label, runs)]
    return Table("Changed answers", columns, rows, text=2)


def _cell(row: Flips | None) -> str:
    if row is None:
        return "-"
    share = "-" if row.changed_share is None else f"{row.changed_share:.0%}"
    return f"\u2212{row.right_to_wrong} +{row.wrong_to_right}, {share}"


def _notes(counts: FlipCounts) -> list[str]:
    notes = []
    if counts.not_counted:
        notes.append(
            "No metric counts single documents as right or wrong: "
            f"{', '.join(counts.not_counted)}."
        )
    if counts.not_logged:
        notes.append(f"No samples were logged: {', '.join(counts.not_logged)}.")
    return notes
