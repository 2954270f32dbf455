"""What a report is made of: sections with text, a table, plots and notes."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.util.figures import Plot


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
    """A figure of which a page shows one plot at a time.

    Attributes:
        title: Heading.
        data: JSON that the page's script reads: Vega-Lite by name of the plot.
        scripts: Vega-Lite, and what draws the figure with it.
    """

    title: str
    data: str
    scripts: Sequence[str]


@dataclass(frozen=True)
class Section:
    """One section; any of its parts may be missing.

    Attributes:
        figure: Lets a reader choose among the plots.
        code: In `language`; shown when a reader clicks at `folded`, at once where this is empty.
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
    notes: Sequence[str] = ()
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
