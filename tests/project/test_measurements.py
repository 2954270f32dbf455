"""The pages of measurements: what each has to say, and figures that are those of their tables."""

from __future__ import annotations

import csv
import re

import pytest

from tests.helpers.checkpoints import ROOT


FOLDER = ROOT / "docs" / "measurements"
PAGES = [path for path in FOLDER.glob("*.md") if not path.name.startswith("gpu-")]
#: Rows of the dichotomy's first table: task and settings in its CSV file.
ROWS = {
    "TruthfulQA MC1 *": ("truthfulqa_mc1", "float32"),
    "TruthfulQA MC2 *": ("truthfulqa_mc2", "float32"),
    "BoolQ *": ("boolq", "float32"),
    "IFEval, 256 tokens *": ("ifeval", "float32, 256 tokens"),
    "IFEval, 128 tokens": ("ifeval", "bfloat16, 128 tokens"),
    "IFEval, no chat template": ("ifeval", "bfloat16, 128 tokens, no chat template"),
    "speeches, bits per byte": ("held_text", "bfloat16"),
    "TruthfulQA MC1": ("truthfulqa_mc1", "bfloat16"),
    "TruthfulQA MC2": ("truthfulqa_mc2", "bfloat16"),
    "BoolQ": ("boolq", "bfloat16"),
}


def table_under(name: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, without its head."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    of = text.partition(f"\n## {heading}\n")[2]
    table = re.search(r"(?m)(?:^\|.*\n)+", of)
    assert table, heading
    rows = [line.strip("|").split("|") for line in table[0].splitlines()]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def rows_of(name: str, **having: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if having.items() <= row.items()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_says_what_model_its_figures_are_of(page):
    assert "4-bit file" in page.read_text(encoding="utf-8")


def test_scores_by_size_are_those_of_the_data():
    model = ""
    for name, task, _, _, *cells in table_under("dichotomy.md", "Scores by size"):
        model = name or model
        of, settings = ROWS[task]
        if model == "Gemma-3":
            settings = settings.removesuffix(", no chat template")
        of_task = rows_of("dichotomy.csv", question="unpruned", model=model, task=of)
        for percent, cell in zip(range(0, 70, 10), cells, strict=True):
            (row,) = (
                row
                for row in of_task
                if row["percent"] == str(percent)
                and row["method"] == ("maw" if percent else "unpruned")
                and row["settings"] == settings
            )
            scale = 1 if of == "held_text" else 100
            shown = float(cell.strip("*"))
            assert shown == pytest.approx(scale * float(row["score"]), abs=0.06)
            assert cell.startswith("**") == (row["q"] != "" and float(row["q"]) < 0.05)


def test_losses_are_those_of_the_data():
    for name, *cells in table_under("price.md", "Loss by criterion and allocation"):
        method = name.replace("`", "").replace("kept", "left alone")
        for number, cell in enumerate(cells):
            if cell and "random" not in name and method != "unpruned":
                found = rows_of(
                    "price.csv",
                    table="loss",
                    model="SmolLM2" if number < 5 else "Gemma-3",
                    method=method,
                    percent=str(10 * (number % 5) + 10),
                )
                shown = float(cell.strip("*"))
                assert [float(row["value"]) for row in found] == [
                    pytest.approx(shown, abs=0.0051)
                ]
