"""What a report is made of: sections with text, a table, plots and notes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.analysis.plots import Plot
    from lm_eval_pruned.analysis.results_file import Run


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, ``better`` or ``worse``, and a remark."""

    text: str
    mark: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first `text` columns hold words and are aligned left."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    text: int = 1

    def cells(self) -> list[list[Cell]]:
        """Return the rows; text alone is a cell without mark and remark."""
        return [
            [Cell(each) if isinstance(each, str) else each for each in row]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Section:
    """One section; any of its parts may be missing. `code` is JSON, or of another language.

    `links` are texts with the names of files beside the report.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    plots: Sequence[Plot] = ()
    code: str = ""
    language: str = "json"
    notes: Sequence[str] = field(default_factory=tuple)
    links: Sequence[tuple[str, str]] = ()


def run_label(run: Run) -> str:
    """Return what a run is called where its size matters, such as ``p20 (3.20)``."""
    if run.is_shallow:
        return f"{run.name} ({run.pruning.get('layers')} layers)"
    ratio = run.expansion_ratio
    label = "unpruned, " if run.is_baseline else ""
    return f"{run.name} ({label}{ratio:.2f})" if ratio is not None else run.name
