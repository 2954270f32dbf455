"""Draw what the study found, for the README: ``python docs/make_study_figure.py``.

Reads the scores published with arXiv 2512.22671 (``tests/data/study_benchmarks.csv``) and
writes ``docs/dichotomy.svg``. Needs the extra ``report``.
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

from lm_eval_pruned.util.figures import as_svg, line_look, over_ratios, style


ROOT = Path(__file__).resolve().parents[1]
MODEL = "Llama-3.2-1B"
#: Task and metric, label.
BENCHMARKS = {
    ("ifeval", "inst_level_strict_acc,none"): "IFEval",
    ("truthfulqa_mc2", "acc,none"): "TruthfulQA MC2",
    ("mmlu", "acc,none"): "MMLU",
    ("gsm8k", "exact_match,strict-match"): "GSM8K",
}


def main() -> None:
    """Draw and write."""
    path = ROOT / "tests" / "data" / "study_benchmarks.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["base_model"] == MODEL]
    with style("dichotomy", font_size=11):
        figure = Figure(figsize=(6.4, 4.2))
        axes = figure.subplots()
        axes.axhline(100, color="black", linewidth=0.8)
        for number, ((task, metric), label) in enumerate(BENCHMARKS.items()):
            points = sorted(
                (
                    (float(row["expansion_ratio"]), float(row["value"]))
                    for row in rows
                    if (row["task"], row["metric"]) == (task, metric)
                ),
                reverse=True,
            )
            ratios = [ratio for ratio, _ in points]
            scores = [100 * score / points[0][1] for _, score in points]
            look = line_look(number)
            axes.plot(ratios, scores, **look)
            axes.annotate(
                label,
                (ratios[-1], scores[-1]),
                xytext=(9, 0),
                textcoords="offset points",
                color=look["color"],
                verticalalignment="center",
                annotation_clip=False,
            )
        over_ratios(axes, ratios)
        axes.set_ylim(0)
        axes.grid(axis="y", alpha=0.2)
        axes.set_ylabel("score, % of the unpruned model")
        axes.set_title(f"{MODEL}, arXiv 2512.22671", fontsize=11, loc="left")
        drawing = as_svg(figure)
    (ROOT / "docs" / "dichotomy.svg").write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
