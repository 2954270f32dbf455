"""Sweeps that run: what survives being killed, what counts as done, what fails alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import lm_eval
import pytest
import torch
from lm_eval.loggers import EvaluationTracker

from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning import measuring
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.sweeps.folder import SweepFolder
from lm_eval_pruned.sweeps.plan import FLOORS, Sweep
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers.sweeping import (
    errors_of,
    files_of,
    forked,
    results_of,
    sweep_options,
)


UNITS = [
    f"{c}/{t}"
    for c in ("baseline", "ratio-1.5")
    for t in ("tiny_choice", "tiny_sentence")
]


@pytest.fixture
def folder(options):
    return Path(options["output_path"])


@pytest.fixture(scope="module")
def undisturbed(tiny_llama, tasks, tmp_path_factory):
    """Folder of one sweep that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_sweep(sweep_options(tiny_llama, tasks, folder)) == 0
    return folder


@pytest.fixture
def calls(monkeypatch):
    """Evaluations and loads, which go on unless a test gives them another effect."""
    evaluate = Mock(wraps=lm_eval.simple_evaluate)
    load = Mock(wraps=PrunedHFLM.create_from_arg_obj)
    monkeypatch.setattr("lm_eval.simple_evaluate", evaluate)
    monkeypatch.setattr(PrunedHFLM, "create_from_arg_obj", load)
    return SimpleNamespace(evaluate=evaluate, load=load)


def test_outside_of_a_repository_git_does_not_complain(
    options, folder, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    assert run_sweep(options) == 0
    assert "fatal" not in capfd.readouterr().err
    files = [json.loads(p.read_text()) for p in folder.glob("units/*/*/results_*")]
    assert [file["git_hash"] for file in files] == [None] * len(UNITS)


def at_second(effect):
    return [DEFAULT, effect, *[DEFAULT] * 20]


def ratios_of(load):
    return [call.args[0].get("ratio") for call in load.call_args_list]


def results_file(folder, unit):
    (file,) = (folder / "units" / unit).glob("results_*.json")
    return json.loads(file.read_text())


@pytest.mark.smoke
def test_units_are_results_of_the_harness(undisturbed):
    units = files_of(undisturbed)
    assert sorted(units) == UNITS
    for unit, names in units.items():
        starts = ("results_2", f"samples_{unit.rpartition('/')[2]}_2", "unit.json")
        assert all(map(str.startswith, names, starts))
    # What it computed on, where nothing was asked for.
    assert results_file(undisturbed, UNITS[0])["config"]["device"] == "cpu"
    definition = json.loads((undisturbed / "sweep.json").read_text())
    assert definition["schema_version"] == 1
    found = definition["configurations"]
    sizes = [(c["id"], c["arguments"], c["kept_width"]) for c in found]
    assert sizes == [("baseline", {}, 88), ("ratio-1.5", {"ratio": 1.5}, 48)]
    assert not list(undisturbed.glob(".unfinished/*/*"))


@pytest.mark.slow
def test_a_killed_sweep_goes_on(options, folder, undisturbed, calls):
    def dying(**_):
        if calls.evaluate.call_count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return DEFAULT

    calls.evaluate.side_effect = dying
    before: dict = {}
    for code in (-9, -9, -9, 0):
        assert forked(lambda: run_sweep(options)) == code
        # Nothing that was finished is lost or made again.
        assert before.items() < files_of(folder).items()
        before = files_of(folder)
    assert results_of(folder) == results_of(undisturbed)
    assert not list(folder.glob(".unfinished/*/*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("message", "count"),
    [("CUDA error: an assert", 2), ("CUDA error: out of memory", 4)],
)
def test_a_sweep_whose_device_fails_ends(options, folder, calls, message, count):
    error = ValueError("it cannot be evaluated")
    error.__cause__ = getattr(torch, "AcceleratorError", RuntimeError)(message)
    calls.evaluate.side_effect = at_second(error)
    assert run_sweep(options) == 1
    assert [*errors_of(folder)] == UNITS[1:2]
    assert calls.evaluate.call_count == count
    # The same command goes on, behind the unit that may be to blame.
    assert run_sweep(options) == 1
    assert calls.evaluate.call_count == 4
    assert run_sweep(options, retry_failed=True) == 0


@pytest.mark.slow
def test_ctrl_c_stops_and_the_next_start_goes_on(options, folder, calls, capsys):
    calls.evaluate.side_effect = at_second(KeyboardInterrupt())
    assert run_sweep(options) == 130
    assert "1 of 4 units are done" in capsys.readouterr().out
    assert len(files_of(folder)) == 1
    assert run_sweep(options) == 0


@pytest.mark.slow
def test_a_model_is_loaded_once_and_one_that_cannot_be_fails_its_units(
    options, folder, calls
):
    calls.load.side_effect = [torch.OutOfMemoryError("no memory left"), DEFAULT]
    assert run_sweep(options) == 1
    assert sorted(errors_of(folder)) == UNITS[:2]
    assert len(files_of(folder)) == 4
    assert ratios_of(calls.load) == [None, 1.5]


@pytest.mark.slow
def test_an_engine_that_died_is_started_again(options, folder, calls, monkeypatch):
    def dying(self, requests, **kwargs):
        self.engine_died = True
        raise RuntimeError("the engine ended")

    monkeypatch.setattr(PrunedHFLM, "loglikelihood", dying)
    assert run_sweep(options) == 1
    assert sorted(errors_of(folder)) == UNITS[::2]
    assert ratios_of(calls.load) == [None, None, 1.5, 1.5]


@pytest.mark.slow
def test_neurons_are_scored_once_for_all_sizes(options, monkeypatch):
    score = Mock(wraps=measuring.score_neurons)
    monkeypatch.setattr(measuring, "score_neurons", score)
    sizes = {"ratios": ["1", "1.5"], "drop_layers": ["1"]}
    assert run_sweep({**options, **sizes, "tasks": ["tiny_choice"]}) == 0
    scored = sorted(call.kwargs["name"] for call in score.call_args_list)
    assert scored == [f"model.layers.{layer}.mlp" for layer in range(3)]


def test_a_full_disk_is_a_failure_and_not_a_result(options, folder, monkeypatch):
    monkeypatch.setattr(EvaluationTracker, "save_results_samples", Mock())
    assert run_sweep({**options, "ratios": [], "tasks": ["tiny_choice"]}) == 1
    assert "0 of 4 samples" in errors_of(folder)[UNITS[0]]["message"]


@pytest.mark.slow
def test_shards_together_are_the_sweep(options, folder, undisturbed):
    definitions = set()
    for part in range(3):
        assert run_sweep(options, shard=(part, 3)) == 0
        definitions.add((folder / "sweep.json").read_bytes())
    assert len(definitions) == 1
    assert results_of(folder) == results_of(undisturbed)


@pytest.mark.slow
def test_processes_take_the_next_open_unit(options, folder, undisturbed, capsys):
    """One holds a unit and dies."""
    with SweepFolder(folder).held(f"units/{UNITS[0]}"):
        assert run_sweep(options, shard="next") == 0
        assert "Other processes have taken 1 of 4 units." in capsys.readouterr().out
        assert sorted(results_of(folder)) == UNITS[1:]
    before = files_of(folder)
    assert run_sweep(options, shard="next") == 0
    assert results_of(folder) == results_of(undisturbed)
    assert before.items() <= files_of(folder).items()


@pytest.mark.slow
def test_answers_are_kept_for_one_model_each(options, folder, undisturbed, tmp_path):
    options = {**options, "use_cache": str(tmp_path / "cache" / "responses")}
    for _ in range(2):
        assert run_sweep(options) == 0
        assert results_of(folder) == results_of(undisturbed)
        names = [file.name.split("_")[1] for file in (tmp_path / "cache").glob("*.db")]
        assert sorted(names) == ["baseline", "ratio-1.5"]
        shutil.rmtree(folder)


def test_groups_with_a_score_are_one_unit_and_keep_their_settings(options, folder):
    options = {**options, "tasks": ["tiny_nested"], "ratios": []}
    names = ["tiny_scored", "tiny_sentence"]
    assert [task.name for task in Sweep(options).tasks] == names
    assert run_sweep(options) == 0
    results = results_file(folder, "baseline/tiny_scored")
    assert set(results["groups"]) == {"tiny_scored"}
    assert results["n-shot"]["tiny_choice"] == 1


@pytest.mark.slow
def test_a_sweep_evaluates_floors_first_and_once(options, folder, capsys):
    options["floors"] = True
    assert run_sweep(options) == 0
    ran = capsys.readouterr().out
    started = [line.split()[1] for line in ran.splitlines() if "starts" in line]
    ids = [floor.id for floor in FLOORS]
    assert [*dict.fromkeys(started)] == [*ids, "baseline", "ratio-1.5"]
    # What they took says nothing of the model's time.
    before = ran.split("baseline / tiny_choice starts")[0]
    assert before.count("time left unknown") == 8
    assert run_sweep(options) == 0
    assert "12 units: 12 done" in capsys.readouterr().out
    models = [(run.name, run.config["model"]) for run in read_sweep(folder).floors]
    assert models == [(floor.id, floor.floor) for floor in FLOORS]
    # Half of the numbers are even, and an echo answers with the question.
    yes, *_, echo = read_sweep(folder).floors
    assert yes.scores["tiny_choice", "acc,none"].value == 0.5
    assert echo.scores["tiny_sentence", "exact_match,none"].value == 1.0
