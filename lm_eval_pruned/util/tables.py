"""Tables in Markdown and CSV."""

from __future__ import annotations

import csv
import io
import re
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


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


def csv_table(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows by the names of their columns as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cell(value: object) -> str:
    text = re.sub(r"[\r\n]", " ", str(value))
    # A backslash in front of a bar would take the escape away from it.
    text = re.sub(r"\\+(?=\||$)", lambda found: 2 * found[0], text)
    return text.replace("|", "\\|")
