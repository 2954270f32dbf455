"""Models that know nothing beside those of a sweep."""

from __future__ import annotations

import json

import pytest

from lm_eval_pruned.cli import main
from lm_eval_pruned.report.report import write_report
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.sweeps.plan import FLOORS


@pytest.mark.slow
def test_a_sweep_evaluates_floors_first_and_once(options, tmp_path, capsys):
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({**options, "floors": True}))

    def said(*more) -> str:
        assert main(["sweep", "--config", str(file), *more]) == 0
        return capsys.readouterr().out

    ran = said()
    started = [line.split()[1] for line in ran.splitlines() if "starts" in line]
    assert list(dict.fromkeys(started)) == [
        *(floor.id for floor in FLOORS),
        "baseline",
        "ratio-1.5",
    ]
    # What they took says nothing of the model's time.
    before = ran.split("baseline / tiny_choice starts")[0]
    assert before.count("time left unknown") == 8
    assert "12 units: 12 done" in said()
    sweep = read_sweep(options["output_path"])
    assert [run.name for run in sweep.runs] == ["baseline", "ratio-1.5"]
    models = [(run.name, run.is_floor, run.config["model"]) for run in sweep.floors]
    assert models == [(floor.id, True, floor.floor) for floor in FLOORS]
    # Half of the numbers are even, and an echo answers with the question.
    yes, *_, echo = sweep.floors
    assert yes.scores["tiny_choice", "acc,none"].value == 0.5
    assert echo.scores["tiny_sentence", "exact_match,none"].value == 1.0
    write_report(sweep.path)
    _, *lines = (sweep.path / "report" / "results.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines} == {"baseline", "ratio-1.5"}
    assert "4 units: 4 done" in said("--floors", "no")
    assert read_sweep(options["output_path"]).floors == ()
