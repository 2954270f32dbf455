"""Draw the SmolLM2 sweeps next to the study's curves: ``python docs/make_smollm2.py``.

Reads the ``results.csv`` of the two reports in ``docs/smollm2`` and the scores published
with arXiv 2512.22671 (``tests/data/study_benchmarks.csv``); writes one SVG and one PNG
per benchmark to ``docs/smollm2/next-to-the-study``. Needs the extra ``report``.
"""

from __future__ import annotations

from pathlib import Path

import altair as alt
import pandas as pd

from lm_eval_pruned.util.figures import Plot, line_look, lines, over_ratios


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


def main() -> None:
    """Draw and write."""
    ours = pd.concat(map(pd.read_csv, sorted(FOLDER.glob("*/results.csv"))))
    ours["line"], ours["value"] = "SmolLM2-135M-Instruct", ours["score"]
    ours["filled"] = ours["q"] < 0.05
    ours["mark"] = ours["q"].isna().map({True: "not tested", False: "tested"})
    study = pd.read_csv(ROOT / "tests" / "data" / "study_benchmarks.csv")
    study = study[study["base_model"].isin(STUDY)]
    study["line"], study["mark"] = study["base_model"] + " (study)", "not tested"
    columns = ["line", "expansion_ratio", "value", "mark", "filled"]
    folder = FOLDER / "next-to-the-study"
    folder.mkdir(exist_ok=True)
    for (task, metric), title in BENCHMARKS.items():
        rows = pd.concat(
            [
                of[(of["task"] == task) & (of["metric"] == metric)]
                for of in (ours, study.assign(filled=False))
            ]
        )
        rows = rows.sort_values("expansion_ratio")[columns]
        rows["value"] *= 100 / rows.groupby("line")["value"].transform("last")
        scale = alt.Scale(zero=False)
        y = alt.Y("value:Q", title="score, % of the unpruned model", scale=scale)
        level = alt.Chart(pd.DataFrame({"value": [100]})).mark_rule().encode(y=y)
        look = line_look(sorted(rows["line"].unique(), reverse=True))
        plot = Plot(
            task,
            title,
            "In percent of the unpruned model's score. Filled points: q < 0.05; open ones: no "
            "difference shown; crosses: not tested.",
            level + lines(rows, over_ratios("expansion_ratio"), y, look),
        )
        (folder / f"{task}.svg").write_text(plot.svg, encoding="utf-8")
        (folder / f"{task}.png").write_bytes(plot.png)


if __name__ == "__main__":
    main()
