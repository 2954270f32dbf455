"""Draw the scores published with arXiv 2512.22671, alone and beside ours: ``python docs/make_study_figures.py``.

Reads them (``tests/data/study_benchmarks.csv``), and the ``results.csv`` of the two reports in ``docs/smollm2``. Writes
``docs/dichotomy.svg`` for the README, and one SVG and one PNG per benchmark to
``docs/smollm2/next-to-the-study``. Needs the extra ``report``.
"""

from __future__ import annotations

from pathlib import Path

import altair as alt
import pandas as pd

from lm_eval_pruned.util.figures import Plot, line_look, lines, over_ratios


ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "docs" / "smollm2"
#: Task and metric, label.
ALONE = {
    ("ifeval", "inst_level_strict_acc,none"): "IFEval",
    ("truthfulqa_mc2", "acc,none"): "TruthfulQA MC2",
    ("mmlu", "acc,none"): "MMLU",
    ("gsm8k", "exact_match,strict-match"): "GSM8K",
}
BESIDE = {
    ("truthfulqa_mc1", "acc,none"): "TruthfulQA MC1",
    ("truthfulqa_mc2", "acc,none"): "TruthfulQA MC2",
    ("boolq", "acc,none"): "BoolQ",
    ("ifeval", "inst_level_strict_acc,none"): "IFEval, instructions, strict",
}


def chart(rows: pd.DataFrame, look: alt.Color, **scale: bool) -> alt.LayerChart:
    """Return scores in percent of the largest model's, as lines over expansion ratios."""
    rows = rows.sort_values("expansion_ratio")
    largest = rows.groupby("line")["value"].transform("last")
    rows["percent"] = 100 * rows["value"] / largest
    y = alt.Y("percent:Q", title="score, % of the unpruned model")
    if scale:
        y = y.scale(**scale)
    level = alt.Chart(pd.DataFrame({"percent": [100]})).mark_rule().encode(y=y)
    columns = ["expansion_ratio", "line", "percent", "mark", "filled"]
    shown = rows[[column for column in columns if column in rows]]
    return level + lines(shown, over_ratios("expansion_ratio"), y, look)


def alone(study: pd.DataFrame) -> None:
    """Draw four benchmarks of one model."""
    rows = study[study["base_model"] == "Llama-3.2-1B"].copy()
    keys = zip(rows["task"], rows["metric"], strict=True)
    rows["line"] = [ALONE.get(key) for key in keys]
    drawn = chart(rows.dropna(subset=["line"]), line_look(list(ALONE.values())))
    plot = Plot("dichotomy", "Llama-3.2-1B, arXiv 2512.22671", "", drawn)
    (ROOT / "docs" / "dichotomy.svg").write_text(plot.svg, encoding="utf-8")


def beside(study: pd.DataFrame) -> None:
    """Draw our sweeps next to the curves of the study's two models."""
    ours = pd.concat(map(pd.read_csv, sorted(OURS.glob("*/results.csv"))))
    tested = {True: "not tested", False: "tested"}
    ours = ours.assign(
        line="SmolLM2-135M-Instruct",
        value=ours["score"],
        filled=ours["q"] < 0.05,
        mark=ours["q"].isna().map(tested),
    )
    study = study[~study["base_model"].str.endswith("-Instruct")]
    study = study.assign(
        line=study["base_model"] + " (study)", mark="not tested", filled=False
    )
    both = pd.concat([ours, study])
    folder = OURS / "next-to-the-study"
    folder.mkdir(exist_ok=True)
    for (task, metric), title in BESIDE.items():
        rows = both[(both["task"] == task) & (both["metric"] == metric)]
        look = line_look(sorted(rows["line"].unique(), reverse=True))
        plot = Plot(
            task,
            title,
            "In percent of the unpruned model's score. Filled points: q < 0.05; open ones: no "
            "difference shown; crosses: not tested.",
            chart(rows, look, zero=False),
        )
        (folder / f"{task}.svg").write_text(plot.svg, encoding="utf-8")
        (folder / f"{task}.png").write_bytes(plot.png)


def main() -> None:
    """Draw all figures."""
    study = pd.read_csv(ROOT / "tests" / "data" / "study_benchmarks.csv")
    alone(study)
    beside(study)


if __name__ == "__main__":
    main()
