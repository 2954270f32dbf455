"""Draw the SmolLM2 sweeps next to the study's curves: ``python docs/make_smollm2.py``.

Reads the ``results.csv`` of the two reports in ``docs/smollm2`` and the scores published
with arXiv 2512.22671 (``tests/data/study_benchmarks.csv``); writes one SVG and one PNG
per benchmark to ``docs/smollm2/next-to-the-study``. Needs the extra ``report``.
"""

from __future__ import annotations

import csv
from pathlib import Path

from lm_eval_pruned.report.plots import Line, lines_plot


ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "smollm2"
#: Task and metric, heading.
BENCHMARKS = {
    ("truthfulqa_mc1", "acc,none"): "TruthfulQA MC1",
    ("truthfulqa_mc2", "acc,none"): "TruthfulQA MC2",
    ("boolq", "acc,none"): "BoolQ",
    ("ifeval", "inst_level_strict_acc,none"): "IFEval, instructions, strict",
}
STUDY = ("Llama-3.2-1B", "Llama-3.2-3B")


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def relative(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return ratios from large to small, and scores in percent of the first one's."""
    points = sorted(points, reverse=True)
    return [x for x, _ in points], [100 * y / points[0][1] for _, y in points]


def main() -> None:
    """Draw and write."""
    ours = [row for path in FOLDER.glob("*/results.csv") for row in rows(path)]
    study = rows(ROOT / "tests" / "data" / "study_benchmarks.csv")
    folder = FOLDER / "next-to-the-study"
    folder.mkdir(exist_ok=True)
    for (task, metric), title in BENCHMARKS.items():
        here = [r for r in ours if (r["task"], r["metric"]) == (task, metric)]
        here.sort(key=lambda row: -float(row["expansion_ratio"]))
        ratios, scores = relative(
            [(float(r["expansion_ratio"]), float(r["score"])) for r in here]
        )
        marked = [None if row["q"] == "" else float(row["q"]) < 0.05 for row in here]
        lines = [Line("SmolLM2-135M-Instruct", ratios, scores, marked)]
        for model in STUDY:
            points = [
                (float(row["expansion_ratio"]), float(row["value"]))
                for row in study
                if row["base_model"] == model
                and (row["task"], row["metric"]) == (task, metric)
            ]
            if points:
                ratios, scores = relative(points)
                lines.append(
                    Line(f"{model} (study)", ratios, scores, [None] * len(ratios))
                )
        plot = lines_plot(
            f"{task}",
            title,
            f"{title} in percent of the unpruned model's score, over the expansion ratio.",
            lines,
            "score, % of the unpruned model",
            reference=100,
            marks="q < 0.05 (SmolLM2 only)",
        )
        (folder / f"{task}.svg").write_text(plot.svg, encoding="utf-8")
        (folder / f"{task}.png").write_bytes(plot.png)


if __name__ == "__main__":
    main()
