"""Criteria beside neurons that are removed at random, on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dichotomy.steps import MODELS
from dichotomy.tables import MEASURES
from dichotomy.words import (
    AGAINST,
    NOTHING,
    Cells,
    by_size,
    change,
    each_one,
    label_of,
    model_of,
    score,
    step_text,
    verdict_tables,
)
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Sequence

TITLE = "Whether the criterion beats chance"
TEXT = """\
Each criterion is compared with neurons that are removed at random, at the same size and in the same layers. The interval is over seeds and documents: the variance
of the mean over documents and that over seeds are added, so another experiment may draw both anew. With a single seed there is no such interval, and no test.
Three seeds say little about how far seeds are apart, so even a large difference may stand as not shown: the figures have the range of the seeds, the tables the intervals, and `--seeds` takes more of them."""


def chance_section(rows: Sequence[Cells], figures: Sequence[str]) -> list[str]:
    """Say where a criterion beats chance, in which family and at which sizes."""
    blocks = [f"## {TITLE}", TEXT]
    if not rows:
        return [*blocks, NOTHING]
    heads = {"criterion": _criterion}
    blocks += [*verdict_tables(_in_order(rows), heads, AGAINST), each_one(TITLE)]
    return blocks + [
        f"![Scores of {label} over size, by criterion and by chance](dichotomy/{name})"
        for model, label in MODELS.items()
        if (name := f"scores-{model}.svg") in figures
    ]


def chance_details(rows: Sequence[Cells]) -> list[str]:
    """Show each comparison with chance, size by size."""
    table = [
        [
            *(model_of(row), step_text(row["step"]), f"`{row['criterion']}`"),
            *(label_of(row), f"{row['percent']} %", score(row)),
            *(score(row, "random"), row["seeds"], change(row)),
        ]
        for row in _in_order(rows)
    ]
    columns = [
        *("model", "sweep", "criterion", "task", "removed", "score"),
        *("at random", "seeds", "difference"),
    ]
    return [f"## {TITLE}", markdown_table(columns, table, "llllrrrrr")] if table else []


def _criterion(row: Cells) -> str:
    kept = ", layer 0 kept" if row["step"].endswith("_skip0") else ""
    return f"{row['criterion']}{kept}"


def _in_order(rows: Sequence[Cells]) -> list[Cells]:
    models, tasks = list(MODELS), list(MEASURES)
    return sorted(
        rows,
        key=lambda row: (
            *(models.index(row["model"]), row["step"], row["criterion"]),
            *(tasks.index(row["task"]), by_size(row)),
        ),
    )
