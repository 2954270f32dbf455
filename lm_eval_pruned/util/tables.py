"""Tables: columns that are declared once, for pages, terminals, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


#: Characters of a line on the narrowest screens.
_NARROW = 48


class Cell(NamedTuple):
    """One cell of a table; the verdicts ``better`` and ``worse`` have a colour on a page."""

    text: str
    verdict: str = ""


class Column(NamedTuple):
    """A column: its title, what it shows of a row, in which format.

    `value` returns a number or a text, None where there is nothing to say, or a finished `Cell`. The
    format is one of Python, or ``p`` for a p value; without one, the column holds words, which are
    aligned left. A `coloured` cell has the colour of the row's verdict, and a `terminal` shows what
    fits into it.
    """

    title: str
    value: Callable[[Any], Any]
    form: str = ""
    terminal: bool = False
    coloured: bool = False

    def cell(self, row: Any) -> Cell:
        """Return the cell of a row; a dash where there is nothing to say."""
        value = self.value(row)
        if isinstance(value, Cell):
            return value
        if value is None:
            text = "-"
        elif self.form == "p":
            text = "<0.0001" if value < 0.0001 else f"{value:.4f}"
        else:
            text = format(value, self.form)
        return Cell(text, row.verdict if self.coloured else "")


@dataclass(frozen=True)
class Table:
    """Rows of any kind, in columns that say what is shown of them."""

    label: str
    columns: Sequence[Column]
    rows: Sequence[Any]

    @property
    def is_wide(self) -> bool:
        """Whether a telephone cannot show it as a table, without cutting words or numbers.

        Words may go on in another line, if that leaves three lines at most.
        """
        width = 0
        for index, column in enumerate(self.columns):
            texts = [row[index].text for row in self.cells]
            words = re.split(r"[ _]", " ".join([column.title, *texts]))
            lines = 1 if column.form else 3
            width += (
                max(len(max(words, key=len)), max(map(len, texts), default=0) // lines)
                + 2
            )
        return width > _NARROW

    @cached_property
    def cells(self) -> list[list[Cell]]:
        """The rows as they are shown, in HTML, in Markdown and in a terminal alike."""
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    def markdown(
        self, *, padded: bool = False, escapes: Mapping[int, str] | None = None
    ) -> str:
        """Return the table in Markdown; `padded` is that of `markdown_table`, `escapes` of `str.translate`."""
        lines = [[column.title for column in self.columns]]
        lines += [[cell.text for cell in row] for row in self.cells]
        texts = [[text.translate(escapes or {}) for text in line] for line in lines]
        align = "".join("r" if column.form else "l" for column in self.columns)
        return markdown_table(texts[0], texts[1:], align, padded=padded)


def interval_text(low: float | None, high: float | None, digits: int = 4) -> str:
    """Return an interval as tables show it, or a dash where it lacks an end."""
    form = f"+.{digits}f"
    return "-" if None in (low, high) else f"[{low:{form}}, {high:{form}}]"


def markdown_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    align: str | None = None,
    *,
    padded: bool = False,
) -> str:
    r"""Return a Markdown table; no cell can end early or break its row.

    `align` has a letter for each column: ``l`` for words, ``r`` for numbers, by default words in the
    first one. If `padded`, the cells of a column are equally wide, for readers of a terminal.

    Raises:
        ValueError: `align` or a row has another length than `columns`.

    Example:
        >>> print(markdown_table(["task", "score"], [["a|b", 0.5]], "lr"))
        |task|score|
        |---|---:|
        |a\|b|0.5|
    """
    align = "l".ljust(len(columns), "r") if align is None else align
    lines = [[_cell(cell) for cell in row] for row in (columns, *rows)]
    lines.insert(1, ["---" if letter == "l" else "---:" for letter in align])
    by_column = []
    for cells, letter in zip(zip(*lines, strict=True), align, strict=True):
        width, side = max(map(len, cells)), "<" if letter == "l" else ">"
        rule = f"{cells[1]:-{side}{width}}"
        wide = [f"{cell:{side}{width}}" for cell in cells]
        by_column.append([wide[0], rule, *wide[2:]] if padded else cells)
    return "\n".join(f"|{'|'.join(line)}|" for line in zip(*by_column, strict=True))


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV, with a column for each name that one of them has, in their order.

    Texts that a spreadsheet would run as formulas get a leading apostrophe.
    """
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _no_formula(value) for name, value in row.items()})
    return text.getvalue()


def _no_formula(value: object) -> object:
    runs = isinstance(value, str) and value.startswith(("=", "+", "-", "@"))
    return f"'{value}" if runs else value


def _cell(value: object) -> str:
    text = re.sub(r"[\r\n]", " ", str(value))
    # A backslash in front of a bar would take the escape away from it.
    text = re.sub(r"\\+(?=\||$)", lambda match: 2 * match[0], text)
    return text.replace("|", "\\|")
