"""A sweep over allocations and criteria, from its options to its report."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from lm_eval_pruned.pruning.measuring import LoadedModel
from lm_eval_pruned.report.report import write_report
from lm_eval_pruned.results.groups import series_name
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers.sweeping import sweep_options, write_tasks


pytestmark = pytest.mark.usefixtures("quick")

TEXTS = ("the quick brown fox jumps over the lazy dog", "a text of its own")
SENSITIVE = "ratio-1.5_allocation-sensitivity"
#: By configuration, the name of its series in a report.
NAMES = {
    "ratio-1.5": "maw",
    "ratio-1.5_criterion-best": "best",
    SENSITIVE: "maw, allocation sensitivity",
    f"{SENSITIVE}_criterion-best": "best, allocation sensitivity",
}


@pytest.mark.slow
def test_curves_are_measured_once_and_every_model_is_told_apart(
    tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS))
    measured: Counter[str] = Counter()
    losses = LoadedModel.losses

    def counting(self, text, criterion, removed):
        measured[criterion] += 1
        return losses(self, text, criterion, removed)

    monkeypatch.setattr(LoadedModel, "losses", counting)
    options = sweep_options(
        tiny_llama,
        write_tasks(tmp_path / "tasks"),
        tmp_path / "sweep",
        model_args={"pretrained": str(tiny_llama), "calibration": str(text)},
        tasks=["tiny_choice"],
        allocations=["uniform", "sensitivity"],
        criteria=["maw", "best"],
    )
    assert run_sweep(options) == 0
    # By maw for two configurations, and among maw and act for two more.
    assert measured == {"maw": 1, "act": 1}

    folder = Path(options["output_path"])
    runs = {run.name: run for run in read_sweep(folder).runs}
    assert [*runs] == ["baseline", *NAMES]
    del runs["baseline"]
    assert {name: series_name(run) for name, run in runs.items()} == NAMES
    for name, run in runs.items():
        widths = run.pruning.get("layer_widths")
        assert (widths is not None) == name.startswith(SENSITIVE)
        assert widths is None or sum(widths.values()) == 3 * 48
        criteria = run.pruning.get("layer_criteria")
        assert (criteria is not None) == name.endswith("best")
        assert criteria is None or {*criteria.values()} <= {"maw", "act"}

    write_report(folder)
    report = (folder / "report" / "report.md").read_text()
    for name in NAMES.values():
        assert name in report

    # The same curves serve another size, in another sweep.
    more = {"ratios": ["2"], "output_path": str(tmp_path / "more")}
    assert run_sweep(options | more) == 0
    assert measured == {"maw": 1, "act": 1}
