"""Draw what the study found, for the README: ``python docs/make_dichotomy.py``.

Reads the scores published with arXiv 2512.22671 (``tests/data/study_benchmarks.csv``) and
writes ``docs/dichotomy.svg``. Needs the extra ``report``.
"""

from __future__ import annotations

import csv
from pathlib import Path

from lm_eval_pruned.plots import Line, lines_plot


ROOT = Path(__file__).resolve().parents[1]
MODEL = "Llama-3.2-1B"
#: Task and metric, entry in the legend.
BENCHMARKS = {
    ("ifeval", "inst_level_strict_acc,none"): "IFEval (instruction following)",
    ("truthfulqa_mc2", "acc,none"): "TruthfulQA MC2 (truthfulness)",
    ("mmlu", "acc,none"): "MMLU (knowledge)",
    ("gsm8k", "exact_match,strict-match"): "GSM8K (knowledge)",
}


def main() -> None:
    """Draw and write."""
    path = ROOT / "tests" / "data" / "study_benchmarks.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["base_model"] == MODEL]
    lines = []
    for benchmark, label in BENCHMARKS.items():
        points = sorted(
            (
                (float(row["expansion_ratio"]), float(row["value"]))
                for row in rows
                if (row["task"], row["metric"]) == benchmark
            ),
            reverse=True,
        )
        ratios, scores = zip(*points, strict=True)
        lines.append(Line(label, ratios, [100 * score / scores[0] for score in scores]))
    title = f"{MODEL}, scores published with arXiv 2512.22671"
    plot = lines_plot(
        "dichotomy",
        title,
        f"{title}: in percent of the unpruned model's score, over the expansion ratio.",
        lines,
        "score, % of the unpruned model",
        reference=100,
    )
    (ROOT / "docs" / "dichotomy.svg").write_text(plot.svg, encoding="utf-8")


if __name__ == "__main__":
    main()
