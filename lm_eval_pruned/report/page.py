"""What a report is made of: sections with text, a table, plots and notes."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.report.plots import Plot
    from lm_eval_pruned.results.files import Run


#: How a verdict is shown. What is significant says which way; `restated` has no mark.
MARKS = {
    "better": "\u25b2",
    "worse": "\u25bc",
    "different": "\u25c6",
    "not shown": "\u25cb",
    "not tested": "\u00d7",
    "not comparable": "\u00d7",
}


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, and ``better`` or ``worse``."""

    text: str
    mark: str = ""


def tone_of(verdict: str) -> str:
    """Return the mark of a cell with this verdict: its colour."""
    return verdict if verdict in ("better", "worse") else ""


@dataclass(frozen=True)
class Table:
    """A table; the first `text` columns hold words and are aligned left."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    text: int = 1

    def cells(self) -> list[list[Cell]]:
        """Return the rows; text alone is a cell without mark."""
        return [
            [Cell(each) if isinstance(each, str) else each for each in row]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Figure:
    """A figure that a page draws, and what can be chosen in it.

    Attributes:
        title: Heading.
        description: What it shows, for those who see it and for those who do not.
        choices: By name of the control: legend, and the label of each value.
        families: Labels of the families that are in it, by name.
        data: JSON that the page's script reads: points and specifications.
        panels: Title and ``<svg>`` of each panel as it is first shown, for readers without
            scripts.
        scripts: Vega-Lite, and what draws the figure with it.
    """

    title: str
    description: str
    choices: Mapping[str, tuple[str, Mapping[str, str]]]
    families: Mapping[str, str]
    data: str
    panels: Sequence[tuple[str, str]]
    scripts: Sequence[str]


@dataclass(frozen=True)
class Section:
    """One section; any of its parts may be missing.

    Attributes:
        heading: Heading.
        paragraphs: Text.
        figure: Drawn by the page itself; its files are among the plots, which the page then
            leaves out.
        table: A table.
        plots: Pictures.
        code: JSON, or of another language.
        language: Of the code.
        folded: What a reader clicks at to see the code; shown at once where this is empty.
        notes: Remarks.
        links: Texts with the names of files beside the report.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    figure: Figure | None = None
    table: Table | None = None
    plots: Sequence[Plot] = ()
    code: str = ""
    language: str = "json"
    folded: str = ""
    notes: Sequence[str] = field(default_factory=tuple)
    links: Sequence[tuple[str, str]] = ()


def only_these(scripts: Sequence[str]) -> str:
    """Return the ``script-src`` of a page's policy that runs these scripts and no other.

    Example:
        >>> only_these([])
        "'none'"
    """
    digests = (hashlib.sha256(script.encode("utf-8")).digest() for script in scripts)
    sources = [f"'sha256-{base64.b64encode(each).decode()}'" for each in digests]
    return " ".join(sources) or "'none'"


def run_label(run: Run) -> str:
    """Return what a run is called where its size matters, such as ``p20 (3.20)``."""
    if run.is_shallow:
        return f"{run.name} ({run.pruning.get('layers')} layers)"
    ratio = run.expansion_ratio
    label = "unpruned, " if run.is_baseline else ""
    return f"{run.name} ({label}{ratio:.2f})" if ratio is not None else run.name
