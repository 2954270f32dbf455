"""Two ways to prune beside each other, on the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dichotomy.steps import MODELS, OF_LAYER_0
from dichotomy.tables import ALPHA, MEASURES
from dichotomy.words import (
    AGAINST,
    NOTHING,
    Cells,
    change,
    each_one,
    grouped,
    label_of,
    millions,
    model_of,
    number,
    score,
    verdict_tables,
)
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dichotomy.words import Tables

#: Heading and what is compared, by question; the first of the two is called "it".
QUESTIONS = {
    "depth": (
        "Width against depth",
        (
            "The narrower model beside the shallower one with as many parameters, to one neuron per layer. The sizes are the share of "
            "neurons that the narrower model lacks, and it is the narrower model that is better or worse. [How many documents](#how-the-page-is-made) there were stands at the end."
        ),
    ),
    "skip0": (
        "Layer 0 left alone",
        (
            "Cut in all layers but the first, beside cut in all by the same criterion. [The first layer](first_layer.md) says why this may matter. At the same percentage the model whose layer 0 is "
            "kept has a few more parameters."
        ),
    ),
    "best": (
        "The best criterion of each layer",
        "`criterion=best`, which chooses for each layer the criterion whose cut costs least on calibration text, beside `maw` in all layers.",
    ),
    "sensitivity": (
        "Widths by sensitivity",
        "`allocation=sensitivity`, which takes more from layers that bear it, beside the same share of each layer, with the same criterion.",
    ),
    "aligned": (
        "Aligned widths, scores",
        "Widths rounded down to multiples of 64, beside the widths that the percentages leave. The aligned model is at most 63 neurons a layer narrower.",
    ),
    "healed": (
        "Healing",
        (
            "Models cut by `maw` and trained again by LoRA on the calibration text, which shares no line with the held text: with the loss of the next "
            "token, or with the distance to the unpruned model alone. A step has 1,024 tokens, and [the settings](#how-the-page-is-made) have the number of steps. A seed chooses the adapter's first weights and the order of the text; intervals are over three seeds and documents, and with one seed there is none. "
            "The held text is of the same kind as what is trained on, so a part of what comes back there is that the model has learnt this kind of text."
        ),
    ),
    "sampled": (
        "Answers that are sampled",
        "IFEval at temperature 0.7 with three seeds; intervals are over seeds and documents.",
    ),
    "draws": (
        "Examples in the prompt",
        "GSM8K with three draws of five examples; intervals are over draws and documents.",
    ),
}
#: The model of `tables_of_other_pages`, and its sizes there, in percent.
_THEIRS = "smollm2"
_SIZES = {
    "first_layer.md": ("20", "40", "60"),
    "allocation.md": ("10", "20", "30", "40", "50"),
}
GPU = """\
On a machine with a CUDA card, one command measures the two kinds of widths there:

```bash
lm-eval-pruned profile --ratios 2.4 1.6 1.07 --multiple_of 1 64 --batch_sizes 1 8 32 --device cuda --output_path FOLDER
```"""


def contrast_section(question: str, rows: Sequence[Cells]) -> list[str]:
    """Compare the two ways to prune of one question."""
    title, text = QUESTIONS[question]
    blocks = [f"## {title}", text]
    if not rows:
        return [*blocks, NOTHING]
    heads = {"it": lambda row: row["one"], "beside": lambda row: row["other"]}
    return [*blocks, *verdict_tables(rows, heads, AGAINST), each_one(title)]


def contrast_details(question: str, rows: Sequence[Cells]) -> list[str]:
    """Show each comparison of one question, size by size."""
    if not rows:
        return []
    seeds = any(row["seeds"] for row in rows)
    table = [
        [
            *(model_of(row), label_of(row), row["one"], row["other"]),
            *(f"{row['percent']} %", *([row["seeds"]] if seeds else [])),
            f"{millions(row, 'parameters_one')} / {millions(row, 'parameters_other')}",
            *(score(row, "score_one"), score(row, "score_other"), change(row)),
            row["verdict"] or "not tested",
        ]
        for row in rows
    ]
    columns = [
        *("model", "task", "it", "beside", "removed", *(["seeds"] if seeds else [])),
        *("millions of parameters", "score", "beside it", "difference", "it is"),
    ]
    aligned = "llllr" + "r" * seeds + "rrrrl"
    return [f"## {QUESTIONS[question][0]}", markdown_table(columns, table, aligned)]


def latency_section(rows: Sequence[Cells]) -> list[str]:
    """Show the latency of aligned and odd widths, and how to measure it on a card."""
    blocks = [
        "### Aligned widths, latency",
        "[Latency and energy](energy.md) has a profile with both kinds of widths and with joules.",
    ]
    if not rows:
        return [*blocks, NOTHING, GPU]
    by = ("model", "device", "repeats")
    for (model, device, repeats), of in grouped(rows, *by).items():
        table = [
            [
                *(
                    row["width"],
                    f"{float(row['ratio']):.2f}",
                    row["batch_size"],
                    row["length"],
                ),
                *(
                    _fixed(row, "ms_first_token", 0),
                    _fixed(row, "ms_per_token", 1),
                    _fixed(row, "seconds", 2),
                ),
                ""
                if not row["seconds_change"]
                else f"{float(row['seconds_change']):+.0f} %"
                + (
                    f" ({float(row['seconds_low']):+.0f} to {float(row['seconds_high']):+.0f})"
                    if row["seconds_low"]
                    else ""
                ),
                row["seconds_verdict"],
            ]
            for row in of
        ]
        columns = [
            "width",
            "ratio",
            "batch",
            "length",
            "first token ms",
            "ms per token",
            "end to end s",
            "against unpruned",
            "verdict",
        ]
        blocks += [
            f"{MODELS[model]} on {device}, means of {repeats} repeats; widths that are multiples of 64 are aligned:",
            markdown_table(columns, table, "rrrlrrrrl"),
        ]
    return [*blocks, GPU]


def _fixed(row: Cells, column: str, digits: int) -> str:
    value = number(row, column)
    return "" if value is None else f"{value:.{digits}f}"


def tables_of_other_pages(tables: Tables) -> dict[str, str]:
    """Return the tables that are drawn from the same data on other pages, by page."""
    mine = [row for row in tables["scores"] if row["model"] == _THEIRS]
    by = ("step", "criterion", "percent", "task")
    scores = grouped(mine, *by)
    stars = grouped(
        (
            row
            for row in tables["contrasts"]
            if row["model"] == _THEIRS and row["question"] == "skip0"
        ),
        *by[1:],
    )
    return {
        "first_layer.md": _first_layer(scores, stars),
        "allocation.md": _by_widths(scores),
    }


def _first_layer(
    scores: Mapping[tuple[str, ...], Sequence[Cells]],
    stars: Mapping[tuple[str, ...], Sequence[Cells]],
) -> str:
    """Show cuts in all layers, and behind a stroke those that leave layer 0 alone."""
    tasks = ("held_text", "truthfulqa_mc1", "truthfulqa_mc2", "boolq", "ifeval")

    def cell(criterion: str, percent: str, task: str) -> str:
        found = [
            scores.get((f"{_step(task)}{kept}", criterion, percent, task), ())
            for kept in ("", "_skip0")
        ]
        # Of several seeds the ends stand for all.
        sides = [" to ".join(dict.fromkeys(map(_bold, _ends(side)))) for side in found]
        if not all(sides) or (criterion == "random" and task != "held_text"):
            return ""
        differs = any(map(_differs, stars.get((criterion, percent, task), ())))
        return (
            sides[0] if not criterion and sides[0] == sides[1] else " / ".join(sides)
        ) + "*" * differs

    sizes = [
        (f"`{name}`", name, size)
        for name in (*OF_LAYER_0, "random")
        for size in _SIZES["first_layer.md"]
    ]
    rows = [
        [head, f"{size} %" if name else "", *(cell(name, size, task) for task in tasks)]
        for head, name, size in [("unpruned", "", "0"), *sizes]
    ]
    columns = [
        "criterion",
        "removed",
        *(
            label.partition(",")[0]
            for label in (MEASURES[task].label for task in tasks)
        ),
    ]
    return markdown_table(columns, rows, "ll" + "r" * len(tasks))


def _by_widths(scores: Mapping[tuple[str, ...], Sequence[Cells]]) -> str:
    """Show uniform widths beside those by sensitivity, each by `maw` and `best`."""
    rows = []
    for task in ("held_text", "truthfulqa_mc1", "truthfulqa_mc2", "boolq", "ifeval"):
        (unpruned,) = scores[_step(task), "", "0", task]
        head = [label_of(unpruned), unpruned["n"]]
        for size in _SIZES["allocation.md"]:
            cells = [
                _bold(row)
                for kind in ("", "_sensitivity")
                for criterion in ("maw", "best")
                for row in scores[f"{_step(task)}{kind}", criterion, size, task]
            ]
            rows.append(
                [*head, f"{size} %", score(unpruned) if head[0] else "", *cells]
            )
            head = ["", ""]
    columns = ["task", "n", "removed", "unpruned", "uniform maw", "uniform best"]
    return markdown_table(
        [*columns, "sensitivity maw", "sensitivity best"], rows, "lrr" + "r" * 5
    )


def _step(task: str) -> str:
    return "instructions" if task == "ifeval" else "choice"


def _ends(rows: Sequence[Cells]) -> list[Cells]:
    ordered = sorted(rows, key=lambda row: float(row["score"]))
    return [*ordered[:1], *ordered[-1:]]


def _differs(row: Cells) -> bool:
    q = number(row, "q")
    return q is not None and q < ALPHA


def _bold(row: Cells) -> str:
    return f"**{score(row)}**" if _differs(row) else score(row)
