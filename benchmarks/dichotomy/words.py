"""How numbers, tests and lists stand on the page; everything is read from the CSV files."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

from dichotomy.steps import MODELS, PERCENTS, STEPS, place_of
from dichotomy.tables import ALPHA, MEASURES, TABLES
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

#: Verdict on two ways to prune whose difference is small for certain.
WITHIN = "equal within the margin"
NOTHING = "Nothing of this has been measured yet; [the list below](#not-measured-yet) has the commands."
#: What two ways to prune are to each other, in the order in which it is said.
AGAINST = ("better", "worse", WITHIN, "not shown")
#: What a score does when a model is pruned, in the order in which it is said.
CHANGES = ("falls", "rises", "holds", "undecided")
#: A row of a CSV file.
Cells = dict[str, str]
Tables = dict[str, list[Cells]]


def read_tables(folder: Path) -> Tables:
    """Return the rows of the CSV files by table, in the order of models and steps.

    A file that is not there has no rows.
    """
    tables: Tables = {}
    for name in TABLES:
        file = folder / f"{name}.csv"
        tables[name] = []
        if file.is_file():
            with file.open(encoding="utf-8", newline="") as lines:
                tables[name] = sorted(csv.DictReader(lines), key=place_of)
    return tables


def number(row: Cells, column: str) -> float | None:
    """Return a number of a row, or None where the cell is empty."""
    return float(row[column]) if row.get(column) else None


def score(row: Cells, column: str = "score") -> str:
    """Return a score: a share in percent, anything else in its own unit."""
    value = number(row, column)
    if value is None:
        return ""
    return f"{100 * value:.1f}" if is_share(row) else f"{value:.3f}"


def has_nothing_to_lose(unpruned: Cells) -> bool:
    """Whether an unpruned model's score is not shown to be above what needs no knowledge, or is 0."""
    if number(unpruned, "score") == 0:
        return True
    p = number(unpruned, "p_levels")
    tested = unpruned.get("chance") or unpruned.get("majority")
    return bool(tested) and (p is None or p >= ALPHA)


def is_share(row: Cells) -> bool:
    """Return whether scores of a row are shares; without a task they are."""
    return row.get("task", "") not in MEASURES or MEASURES[row["task"]].share


def change(row: Cells, test: str = "", *, interval: bool = True) -> str:
    """Return a difference with its interval, in bold where q is below 0.05.

    Args:
        row: A row.
        test: What the columns begin with, such as ``rest``; default: nothing.
        interval: Whether to say it.
    """
    names = [
        f"{test}_{each}" if test else each
        for each in ("difference", "low", "high", "q")
    ]
    if test in row:
        names[0] = test
    value, low, high, q = (number(row, name) for name in names)
    if value is None:
        return ""
    text = signed(row, value)
    if q is not None and q < ALPHA:
        text = f"**{text}**"
    if interval and low is not None and high is not None:
        text += f" ({signed(row, low)} to {signed(row, high)})"
    return text


def signed(row: Cells, value: float) -> str:
    """Return a difference with its sign: of shares in points."""
    text = f"{100 * value:+.1f}" if is_share(row) else f"{value:+.3f}"
    return text.replace("-0.0", "+0.0") if float(text) == 0 else text


def millions(row: Cells, column: str = "parameters") -> str:
    """Return parameters in millions."""
    value = number(row, column)
    return "" if value is None else f"{value / 1e6:.1f}"


def model_of(row: Cells) -> str:
    """Return the whole name of a row's model."""
    return MODELS.get(row["model"], row["model"])


def label_of(row: Cells) -> str:
    """Return the label of a row's task."""
    return MEASURES[row["task"]].label


def step_text(name: str) -> str:
    """Return what a step is for, or its name where it is none of the list."""
    return next((step.text for step in STEPS if step.name == name), name)


def each_one(heading: str) -> str:
    """Return the sentence that leads to the numbers of a section, by its heading."""
    anchor = "".join(
        each
        for each in heading.lower().replace(" ", "-")
        if each.isalnum() or each == "-"
    )
    return f"[Every comparison, with its interval](dichotomy-tables.md#{anchor})."


def verdict_tables(
    rows: Sequence[Cells],
    heads: Mapping[str, Callable[[Cells], str]],
    order: Sequence[str],
) -> list[str]:
    """Return the verdicts on each model as Markdown tables with a column for each task.

    Args:
        rows: Rows with a model, a task, a size and a verdict.
        heads: By column, what to say of a row; rows that say the same share a line.
        order: Verdicts in the order in which they are said.
    """
    blocks = []
    for (model,), of_model in grouped(rows, "model").items():
        tasks = [task for task in MEASURES if task in {row["task"] for row in of_model}]
        lines: dict[tuple[str, ...], list[Cells]] = {}
        for row in of_model:
            lines.setdefault(tuple(say(row) for say in heads.values()), []).append(row)
        table = []
        for key, of in lines.items():
            by_task = grouped(of, "task")
            cells = [spans(by_task.get((task,), []), order) for task in tasks]
            table.append([*key, *cells])
        columns = [*heads, *(MEASURES[task].label for task in tasks)]
        shown = markdown_table(columns, table, "l" * len(columns))
        blocks += [f"**{MODELS[model]}**", shown]
    return blocks


def listed(parts: Iterable[str]) -> str:
    """Join with commas and a last ``and``."""
    parts = list(parts)
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def by_size(row: Cells) -> float:
    """Sort by percentage; what has none comes last."""
    return float(row["percent"]) if row.get("percent") else 1e9


def sizes_text(sizes: Sequence[str]) -> str:
    """Say percentages in order, such as ``10 to 40 and 60 %``; two neighbours are named singly.

    Args:
        sizes: Percentages as they stand in the tables, ascending.
    """
    known = [str(percent) for percent in PERCENTS]
    runs: list[list[str]] = []
    for size in sizes:
        last = runs[-1][-1] if runs else None
        if (
            size in known
            and last in known
            and known.index(last) + 1 == known.index(size)
        ):
            runs[-1].append(size)
        else:
            runs.append([size])
    parts = [
        part
        for run in runs
        for part in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else run)
    ]
    return f"{listed(parts)} %"


def spans(rows: Sequence[Cells], order: Sequence[str]) -> str:
    """Say at which sizes which verdict stands, such as ``falls at 30 to 60 %, undecided at 10 and 20 %``."""
    parts = []
    for verdict in order:
        sizes = [
            row["percent"]
            for row in sorted(rows, key=by_size)
            if row["verdict"] == verdict
        ]
        if sizes:
            parts.append(f"{verdict} at {sizes_text(sizes)}")
    return ", ".join(parts) or ("not tested" if rows else "")


def grouped(rows: Iterable[Cells], *columns: str) -> dict[tuple[str, ...], list[Cells]]:
    """Return rows by the values of some columns, in the order in which they come."""
    groups: dict[tuple[str, ...], list[Cells]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    return groups


def shown(rows: Iterable[Cells], test: str, sign: int = 0) -> int:
    """Count rows whose test has q below 0.05, and whose difference has the sign, if one is given."""
    count = 0
    for row in rows:
        column = test if test in row else f"{test}_difference"
        value, q = number(row, column), number(row, f"{test}_q")
        count += q is not None and value is not None and q < ALPHA and sign * value >= 0
    return count
