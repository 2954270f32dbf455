"""Draw what the study found, for the README: ``python docs/make_study_figure.py``.

Reads the scores published with arXiv 2512.22671 (``tests/data/study_benchmarks.csv``) and
writes ``docs/dichotomy.svg``. Needs the extra ``report``.
"""

from __future__ import annotations

from pathlib import Path

import altair as alt
import pandas as pd

from lm_eval_pruned.util.figures import Plot, line_look, lines, over_ratios


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
    rows = pd.read_csv(ROOT / "tests" / "data" / "study_benchmarks.csv")
    rows = rows[rows["base_model"] == MODEL].sort_values("expansion_ratio")
    keys = zip(rows["task"], rows["metric"], strict=True)
    rows["line"] = [BENCHMARKS.get(key) for key in keys]
    rows = rows.dropna(subset=["line"])
    largest = rows.groupby("line")["value"].transform("last")
    rows["score"] = 100 * rows["value"] / largest
    y = alt.Y("score:Q", title="score, % of the unpruned model")
    level = alt.Chart(pd.DataFrame({"score": [100]})).mark_rule().encode(y=y)
    drawn = rows[["expansion_ratio", "line", "score"]]
    look = line_look(list(BENCHMARKS.values()))
    chart = level + lines(drawn, over_ratios("expansion_ratio"), y, look)
    title = f"{MODEL}, arXiv 2512.22671"
    plot = Plot("dichotomy", title, "", chart)
    (ROOT / "docs" / "dichotomy.svg").write_text(plot.svg, encoding="utf-8")


if __name__ == "__main__":
    main()
