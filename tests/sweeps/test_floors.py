"""Models that know nothing beside those of a sweep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lm_eval_pruned.cli import main
from lm_eval_pruned.compare.comparison import compare, read_comparands
from lm_eval_pruned.compare.power import power_of
from lm_eval_pruned.compare.verdicts import Margin
from lm_eval_pruned.gate.check import read_results
from lm_eval_pruned.report.report import write_report
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.sweeps.plan import Sweep
from tests.helpers.results_files import write_sweep
from tests.sweeps.test_plan import prints


FLOORS = [
    *("floor-yes-commonest", "floor-dot-shortest", "floor-the-the-longest"),
    "floor-echo-equal",
]


@pytest.fixture
def options(options):
    del options["floors"]
    return options


@pytest.mark.slow
def test_a_sweep_evaluates_floors_first_and_once(options, tmp_path, capsys):
    folder, file = Path(options["output_path"]), tmp_path / "sweep.json"
    file.write_text(json.dumps(options))

    def said(*more) -> str:
        assert main(["sweep", "--config", str(file), *more]) == 0
        return capsys.readouterr().out

    plan = said("--dry_run")
    assert "|floor-echo-equal|-|-|-|-|0|0|2|" in plan
    assert "|baseline|88|2.7500|51,424|0.00%|0|0|2|" in plan
    ran = said()
    started = [line.split()[1] for line in ran.splitlines() if "starts" in line]
    assert list(dict.fromkeys(started)) == [*FLOORS, "baseline", "ratio-1.5"]
    # What they took says nothing of the model's time.
    before = ran.split("baseline / tiny_choice starts")[0]
    assert before.count("time left unknown") == 8
    assert "12 units: 12 done" in said()

    sweep = read_sweep(folder)
    assert [run.name for run in sweep.runs] == ["baseline", "ratio-1.5"]
    models = [(run.name, run.is_floor, run.config["model"]) for run in sweep.floors]
    kinds = ["constant", "constant", "constant", "echo"]
    assert models == [*zip(FLOORS, [True] * 4, kinds, strict=True)]
    # Half of the numbers are even, and an echo answers with the question.
    yes, *_, echo = sweep.floors
    assert yes.scores["tiny_choice", "acc,none"].value == 0.5
    assert echo.scores["tiny_sentence", "exact_match,none"].value == 1.0
    write_report(folder)
    _, *lines = (folder / "report" / "results.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines} == {"baseline", "ratio-1.5"}

    assert "4 units: 4 done" in said("--floors", "no")
    assert read_sweep(folder).floors == ()


def test_floors_are_no_runs_to_compare(tmp_path):
    def read(floors) -> list:
        sizes = {"baseline": 0, "p20": 20, "p40": 40, "p60": 60}
        runs: dict = {name: (n, values(n)) for name, n in sizes.items()}
        runs |= {name: ({}, values(90)) for name in floors}
        folder = write_sweep(tmp_path / "sweep", runs, **dict.fromkeys(floors, "other"))
        for name in floors:
            (file,) = folder.glob(f"units/{name}/boolq/results_*.json")
            file.write_text(file.read_text().replace('"pruned-hf"', '"constant"'))
        base, others = read_comparands([str(folder)])
        found = compare(base, others)
        numbers = [(row.run, row.p, row.q, row.low, row.high) for row in found.rows]
        power = power_of(base, others, "boolq", Margin("equivalent", "5pt"))
        held = [*read_results(folder)]
        shutil.rmtree(folder)
        return [numbers, found.trends, power, held]

    assert read(FLOORS) == read([])


def values(percent: int) -> dict:
    return {"boolq": {"acc,none": [float(n >= percent) for n in range(100)]}}


def test_floors_share_nothing_with_the_model_but_the_documents(options):
    model = {**options["model_args"], "dtype": "bfloat16"}
    before, after = prints(options), prints({**options, "model_args": model})
    kept = {names[0] for names in before if before[names] == after[names]}
    assert kept == set(FLOORS)
    assert not {*prints({**options, "limit": 2.0}).values()} & {*before.values()}
    # Neither the correction of a rule that stops units nor the cut into shards counts them.
    sweep = Sweep({**options, "stop_when": "decided"})
    assert len(sweep.configurations) == 2
    assert not any(sweep.may_stop(each) for each in (*sweep.floors, sweep.baseline))
    parts = [unit.names for part in range(3) for unit in sweep.units((part, 3))]
    assert sorted(parts) == sorted(unit.names for unit in sweep.units())
