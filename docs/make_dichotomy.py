"""Draw what the study found, for the README: ``python docs/make_dichotomy.py``.

Reads the scores published with arXiv 2512.22671 (``tests/data/study_benchmarks.csv``) and
writes ``docs/dichotomy.svg``. Needs the extra ``report``.
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


ROOT = Path(__file__).resolve().parents[1]
MODEL = "Llama-3.2-1B"
#: Task and metric: label, colour (Okabe and Ito 2008) and marker.
BENCHMARKS = {
    ("ifeval", "inst_level_strict_acc,none"): ("IFEval", "#0072B2", "o"),
    ("truthfulqa_mc2", "acc,none"): ("TruthfulQA MC2", "#D55E00", "s"),
    ("mmlu", "acc,none"): ("MMLU", "#009E73", "^"),
    ("gsm8k", "exact_match,strict-match"): ("GSM8K", "#CC79A7", "D"),
}
SETTINGS = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.size": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "dichotomy",
}


def main() -> None:
    """Draw and write."""
    path = ROOT / "tests" / "data" / "study_benchmarks.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["base_model"] == MODEL]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, 4.2))
        axes = figure.subplots()
        axes.axhline(100, color="black", linewidth=0.8)
        for (task, metric), (label, colour, marker) in BENCHMARKS.items():
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
            axes.plot(ratios, scores, color=colour, marker=marker)
            axes.annotate(
                label,
                (ratios[-1], scores[-1]),
                xytext=(9, 0),
                textcoords="offset points",
                color=colour,
                verticalalignment="center",
                annotation_clip=False,
            )
        axes.set_xticks(ratios, [f"{ratio:.1f}" for ratio in ratios])
        axes.invert_xaxis()
        axes.set_ylim(0)
        axes.grid(axis="y", alpha=0.2)
        axes.set_xlabel("expansion ratio (intermediate size / hidden size)")
        axes.set_ylabel("score, % of the unpruned model")
        axes.set_title(f"{MODEL}, arXiv 2512.22671", fontsize=11, loc="left")
        figure.savefig(
            ROOT / "docs" / "dichotomy.svg",
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
            facecolor="white",
        )


if __name__ == "__main__":
    main()
