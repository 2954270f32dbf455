"""Sweeps that run: what survives being killed, what counts as done, what fails alone."""

from __future__ import annotations

import functools
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import lm_eval
import pytest
import torch
from lm_eval import loggers
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.utils import add_env_info

from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.sweeps import unit as of_unit
from lm_eval_pruned.sweeps.plan import plan_sweep
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers.sweeping import (
    errors_of,
    files_of,
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
    assert run_sweep(plan_sweep(sweep_options(tiny_llama, tasks, folder))) == 0
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
    assert run_sweep(plan_sweep(options)) == 0
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
def test_a_model_is_loaded_once_and_one_that_cannot_be_fails_its_units(
    options, folder, calls
):
    calls.load.side_effect = [torch.OutOfMemoryError("no memory left"), DEFAULT]
    assert run_sweep(plan_sweep(options)) == 1
    assert sorted(errors_of(folder)) == UNITS[:2]
    assert len(files_of(folder)) == 4
    assert ratios_of(calls.load) == [None, 1.5]


@pytest.mark.slow
def test_an_engine_that_died_is_started_again(options, folder, calls, monkeypatch):
    def dying(self, requests, **kwargs):
        self.engine_died = True
        raise RuntimeError("the engine ended")

    monkeypatch.setattr(PrunedHFLM, "loglikelihood", dying)
    assert run_sweep(plan_sweep(options)) == 1
    assert sorted(errors_of(folder)) == UNITS[::2]
    assert ratios_of(calls.load) == [None, None, 1.5, 1.5]


def test_a_full_disk_is_a_failure_and_not_a_result(options, folder, monkeypatch):
    monkeypatch.setattr(EvaluationTracker, "save_results_samples", Mock())
    assert (
        run_sweep(plan_sweep({**options, "ratios": [], "tasks": ["tiny_choice"]})) == 1
    )
    assert "0 of 4 samples" in errors_of(folder)[UNITS[0]]["message"]


def test_the_machine_is_looked_at_once_for_all_units(monkeypatch):
    looks: list[str] = []
    look = functools.cache(lambda: looks.append("here") or looks[-1])
    monkeypatch.setattr(of_unit, "_environment", look)
    for _ in range(3):
        found: dict = {}
        with of_unit._asked_once():
            add_env_info(found)
        assert found["pretty_env_info"] == "here"
    assert looks == ["here"]


def test_a_harness_without_a_service_s_logger_evaluates(monkeypatch):
    """Release 0.5.0.dev1 has none for Trackio."""
    monkeypatch.delattr(loggers, "TrackioLogger", raising=False)
    assert "UnitRunner" in runpy.run_path(of_unit.__file__)
