"""Sweeps that run: what survives being killed, what counts as done, what fails alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.loggers import EvaluationTracker

from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning import measuring
from lm_eval_pruned.results.groups import series_name
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.sweeps.folder import SweepFolder
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers.sweeping import (
    change,
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
def loaded(monkeypatch):
    """The ratio of each model that is loaded; loading may raise what `at` has for it."""
    create = PrunedHFLM.create_from_arg_obj.__func__

    class Loaded(list):
        def __init__(self):
            self.at = {}

    ratios = Loaded()

    def counted(cls, arguments, more=None):
        ratios.append(arguments.get("ratio"))
        if errors := ratios.at.get(ratios[-1]):
            raise errors.pop()
        return create(cls, arguments, more)

    monkeypatch.setattr(PrunedHFLM, "create_from_arg_obj", classmethod(counted))
    return ratios


@pytest.fixture
def at_second(monkeypatch):
    """Have something happen instead of the second evaluation; count all of them."""
    evaluate, calls = lm_eval.simple_evaluate, []

    def patched(happens):
        def counted(**arguments):
            calls.append(arguments)
            if len(calls) == 2:
                happens()
            return evaluate(**arguments)

        monkeypatch.setattr("lm_eval.simple_evaluate", counted)
        return calls

    return patched


def raising(error):
    def happens():
        raise error

    return happens


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


def test_same_as_the_stock_command(options, undisturbed, tmp_path, monkeypatch):
    model = f"pretrained={options['model_args']['pretrained']},ratio=1.5"
    words = ["lm_eval", "run", "--model", "pruned-hf", "--tasks", "tiny_sentence"]
    words += ["--model_args", model, "--include_path", options["include_path"]]
    words += ["--log_samples", "--output_path", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    cli_evaluate()
    (stock,) = tmp_path.rglob("results_*.json")
    expected = json.loads(stock.read_text())
    found = results_file(undisturbed, "ratio-1.5/tiny_sentence")
    for results in (expected, found):
        # A group may set what the task leaves open.
        results["configs"]["tiny_sentence"]["custom_dataset"] = None
        for name in ("date", "start_time", "end_time", "total_evaluation_time_seconds"):
            results.pop(name, None)
    assert found["config"].pop("weight_bytes") > 0
    assert found == expected
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    (ours,) = results_of(undisturbed)["ratio-1.5/tiny_sentence"]["samples"].values()
    assert ours == [json.loads(line) for line in samples.read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_sweep_goes_on(options, folder, undisturbed, at_second):
    at_second(lambda: os.kill(os.getpid(), signal.SIGKILL))
    before: dict = {}
    for _ in UNITS[1:]:
        assert forked(lambda: run_sweep(options)) == -signal.SIGKILL
        # Nothing that was finished is lost or made again.
        assert before.items() < files_of(folder).items()
        before = files_of(folder)
    assert forked(lambda: run_sweep(options)) == 0
    assert before.items() < files_of(folder).items()
    assert results_of(folder) == results_of(undisturbed)
    assert not list(folder.glob(".unfinished/*/*"))


@pytest.mark.slow
def test_a_second_start_evaluates_what_changed_and_keeps_the_old(
    options, folder, capsys, monkeypatch
):
    assert run_sweep(options) == 0
    old = files_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr("lm_eval.simple_evaluate", lambda **_: pytest.fail("again"))
        assert run_sweep({**options, "batch_size": "2"}) == 0
    assert files_of(folder) == old
    assert "4 done, 0 failed before, 0 to run" in capsys.readouterr().out
    assert run_sweep({**options, "limit": 2.0}) == 0
    assert "another definition (settings)" in capsys.readouterr().out
    kept = [
        sorted(p.name for p in k.iterdir()) for k in folder.glob("superseded/*/*/*")
    ]
    assert sorted(map(tuple, kept)) == sorted(old.values())
    assert results_file(folder, UNITS[0])["n-samples"]["tiny_choice"]["effective"] == 2


@pytest.mark.slow
def test_a_second_sweep_says_which_sizes_of_the_first_it_leaves_out(options, capsys):
    folder = options["output_path"]
    assert run_sweep({**options, "tasks": ["tiny_choice"]}) == 0
    second = {**options, "ratios": ["1"], "tasks": ["tiny_sentence"]}
    assert run_sweep(second) == 0
    assert f"{folder} also holds ratio-1.5, which" in capsys.readouterr().out
    assert [run.name for run in read_sweep(folder).runs] == ["baseline", "ratio-1"]
    assert run_sweep({**second, "ratios": ["1.5", "1"]}) == 0
    both = ["tiny_choice", "tiny_sentence"]
    found = {run.name: run.tasks() for run in read_sweep(folder).runs}
    assert found == {"baseline": both, "ratio-1.5": both, "ratio-1": both[1:]}


def test_a_failed_unit_is_recorded_and_the_rest_goes_on(
    options, folder, tasks, tmp_path, capsys
):
    broken = shutil.copytree(tasks, tmp_path / "tasks")
    change(broken, "choice.yaml", ".load", ".cannot_be_had")
    options = {**options, "include_path": str(broken)}
    assert run_sweep(options) == 1
    for unit, names in files_of(folder).items():
        is_error = names == ("error.json", "unit.json")
        assert is_error == unit.endswith("tiny_choice")
    error = errors_of(folder)[UNITS[0]]
    assert error["type"] == "ConnectionError"
    assert error["message"] == "the data set cannot be had"
    assert "cannot_be_had" in error["traceback"]
    for retry, said in (
        (False, "2 failed before, 0 to run"),
        (True, "0 failed before, 2"),
    ):
        capsys.readouterr()
        assert run_sweep(options, retry_failed=retry) == 1
        assert f"2 done, {said}" in capsys.readouterr().out
    # A task that was mended has another definition: no option is needed.
    assert run_sweep({**options, "include_path": str(tasks)}) == 0
    assert not errors_of(folder)
    assert not (folder / "superseded").exists()


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_sweep_whose_device_fails_ends(options, at_second, capsys, wrapped):
    error = getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: an assert")
    if wrapped:
        cause, error = error, ValueError("it cannot be evaluated")
        error.__cause__ = cause
    calls = at_second(raising(error))
    assert run_sweep(options) == 1
    assert "Stopped: after an error of its device" in capsys.readouterr().out
    assert len(calls) == 2
    # The same command goes on, behind the unit that may be to blame.
    assert run_sweep(options) == 1
    assert len(calls) == 4
    assert run_sweep(options, retry_failed=True) == 0


@pytest.mark.slow
def test_too_little_memory_of_a_device_fails_one_unit(options, folder, at_second):
    at_second(raising(RuntimeError("CUDA error: out of memory")))
    assert run_sweep(options) == 1
    assert [*errors_of(folder)] == UNITS[1:2]


@pytest.mark.slow
def test_ctrl_c_stops_and_the_next_start_goes_on(options, folder, at_second, capsys):
    at_second(raising(KeyboardInterrupt()))
    assert run_sweep(options) == 130
    assert "1 of 4 units are done" in capsys.readouterr().out
    assert len(files_of(folder)) == 1
    assert run_sweep(options) == 0


@pytest.mark.slow
def test_a_model_is_loaded_once_and_one_that_cannot_be_fails_its_units(
    options, folder, loaded
):
    loaded.at[None] = [torch.OutOfMemoryError("no memory left")]
    assert run_sweep(options) == 1
    assert sorted(errors_of(folder)) == UNITS[:2]
    assert len(list(folder.glob("units/ratio-1.5/*/results_*.json"))) == 2
    assert loaded == [None, 1.5]


def test_a_unit_that_the_hub_refuses_waits_longer_and_longer(
    options, loaded, monkeypatch
):
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    refusal = "Client error '429 Too Many Requests' for url"
    loaded.at[None] = [OSError("429 documents"), OSError(refusal), OSError(refusal)]
    assert run_sweep({**options, "ratios": [], "tasks": ["tiny_choice"]}) == 1
    assert slept[1] > slept[0] > 0
    assert len(slept) == 2 and loaded == [None] * 3


@pytest.mark.slow
def test_an_engine_that_died_is_started_again(options, folder, loaded, monkeypatch):
    def dying(self, requests, **kwargs):
        self.engine_died = True
        raise RuntimeError("the engine ended")

    monkeypatch.setattr(PrunedHFLM, "loglikelihood", dying)
    monkeypatch.setattr(PrunedHFLM, "close", lambda self: None, raising=False)
    assert run_sweep(options) == 1
    assert sorted(errors_of(folder)) == UNITS[::2]
    assert len(list(folder.glob("units/*/tiny_sentence/results_*.json"))) == 2
    assert loaded == [None, None, 1.5, 1.5]


@pytest.mark.slow
def test_neurons_are_scored_once_for_all_sizes(options, folder, monkeypatch):
    scored = []

    def counted(*args, name, score=measuring.score_neurons, **kwargs):
        scored.append(name)
        return score(*args, name=name, **kwargs)

    monkeypatch.setattr(measuring, "score_neurons", counted)
    sizes = {"ratios": ["1", "1.5", "2"], "drop_layers": ["1"]}
    assert run_sweep({**options, **sizes, "tasks": ["tiny_choice"]}) == 0
    assert sorted(scored) == [f"model.layers.{layer}.mlp" for layer in range(3)]
    assert not [f for f in folder.rglob("*.json") if "known_scores" in f.read_text()]
    pruning = results_file(folder, "drop_layers-1/tiny_choice")["config"]["pruning"]
    assert pruning["layers_kept"] == "0,2"


@pytest.mark.slow
def test_losses_are_measured_once_and_every_model_is_told_apart(
    options, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "texts.jsonl"
    text.write_text('{"text": "the quick brown fox"}\n{"text": "a second text"}\n')
    measured: Counter[str] = Counter()
    losses = measuring.LoadedModel.losses

    def counting(self, text, criterion, removed):
        measured[criterion] += 1
        return losses(self, text, criterion, removed)

    monkeypatch.setattr(measuring.LoadedModel, "losses", counting)
    options["model_args"] |= {"calibration": str(text)}
    more = {"allocations": ["uniform", "sensitivity"], "criteria": ["maw", "best"]}
    assert run_sweep({**options, **more, "tasks": ["tiny_choice"]}) == 0
    # By maw for two configurations, and among maw and act for two more.
    assert measured == {"maw": 1, "act": 1}
    _, *runs = read_sweep(folder).runs
    assert len({series_name(run) for run in runs}) == 4
    assert all(sum(r.pruning["layer_widths"].values()) == 3 * 48 for r in runs[2:])


def test_a_full_disk_is_a_failure_and_not_a_result(options, folder, monkeypatch):
    writing = "save_results_samples"
    monkeypatch.setattr(EvaluationTracker, writing, lambda *_, **__: None)
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
    """One holds a unit and dies, two go on side by side."""
    with SweepFolder(folder, shared=True).claimed(("baseline", "tiny_choice")) as mine:
        assert mine
        assert run_sweep(options, shard="next") == 0
        assert "Other processes have 1 of 4 units." in capsys.readouterr().out
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
