"""``sweep --heal``: each pruned model before and after, trained once, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from lm_eval_pruned.checkpoints.adapters import HEALING
from lm_eval_pruned.cli import main
from lm_eval_pruned.healing.trainer import HealingTrainer
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers.meters import FakeMeter
from tests.helpers.sweeping import (
    errors_of,
    files_of,
    forked,
    results_of,
    sweep_options,
)


TEXTS = [f"The tide of day {n} comes in twice, and goes out twice." for n in range(12)]
TRAINING = {
    "per_device_train_batch_size": 2,
    "disable_tqdm": True,
    "learning_rate": "1e-2",
    "save_steps": 2,
}
NAMES = ("baseline", "ratio-1.5", "ratio-1.5_healed")


@pytest.fixture(scope="module", autouse=True)
def ten_watts(quick):
    with pytest.MonkeyPatch.context() as patch:
        clock = type("Clock", (), {"now": property(lambda self: time.perf_counter())})
        meter = "lm_eval_pruned.healing.cost.CodecarbonMeter"
        patch.setattr(meter, lambda: FakeMeter(clock(), {"cpu": 10.0}))
        yield


def write_data(file, texts):
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return str(file)


@pytest.fixture(scope="module")
def options(tiny_llama, tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    heal = {"data": write_data(folder / "data.jsonl", TEXTS), "training_args": TRAINING}
    heal |= {"max_length": 32, "max_steps": 4}
    more = {"tasks": ["tiny_choice"], "heal": heal}
    return sweep_options(tiny_llama, tasks, folder / "sweep", **more)


def healing(options, **more):
    """Return options of a sweep that heals in another way."""
    return {**options, "heal": {**options["heal"], **more}}


@pytest.fixture
def trainer(monkeypatch):
    """Replace the trainer by one that notes its steps, and can act at one of them."""
    noted = SimpleNamespace(steps=[], trainings=[], at={})

    class Noting(HealingTrainer):
        def train(self, *arguments, **named):
            noted.trainings.append(self.args.output_dir)
            return super().train(*arguments, **named)

        def compute_loss(self, *arguments, **named):
            noted.steps.append(self.state.global_step)
            noted.at.get(self.state.global_step, lambda: None)()
            return super().compute_loss(*arguments, **named)

    monkeypatch.setattr("lm_eval_pruned.healing.trainer.HealingTrainer", Noting)
    return noted


@pytest.fixture(scope="module")
def done(options):
    """The options of a sweep of one size before and after that has run."""
    assert run_sweep(options) == 0
    return options


def adapter_of(options):
    sweep = Sweep(options)
    return sweep.adapter(sweep.configurations[2])


def test_each_size_is_evaluated_before_and_after(done, capsys):
    assert set(files_of(done["output_path"])) == {
        f"{name}/tiny_choice" for name in NAMES
    }
    adapter = adapter_of(done)
    record = json.loads((adapter / HEALING).read_text())
    runs = read_sweep(done["output_path"]).runs
    before, after = (run.config for run in runs[1:])
    assert "healing" not in before
    assert after["healing"] | {"pruning": after["pruning"]} == record
    assert after["pruning"] == before["pruning"]
    assert (record["steps"], record["tokens_seen"]) == (4, 4 * 2 * 32)
    assert record["training_args"]["learning_rate"] == 1e-2
    joules = record["energy"]["joules"]["total"]
    assert joules == pytest.approx(10 * record["seconds"], abs=2)
    # The checkpoints have done their duty.
    assert [p for p in adapter.parent.iterdir() if p.is_dir()] == [adapter]
    assert main(["compare", done["output_path"]]) == 0
    assert all(f"|{name}|" in capsys.readouterr().out for name in NAMES[2:])


@pytest.mark.slow
def test_another_task_trains_nothing_again_and_another_text_does(
    done, trainer, tmp_path
):
    before = files_of(done["output_path"])
    assert run_sweep({**done, "tasks": ["tiny_both"]}) == 0
    assert before.items() < files_of(done["output_path"]).items()
    assert trainer.trainings == []
    other = healing(done, data=write_data(tmp_path / "data.jsonl", TEXTS[1:]))
    for options in (other, done):
        assert run_sweep(options) == 0
        assert len(trainer.trainings) == 1


def test_what_decides_the_weights_defines_the_unit(options, tmp_path):
    def defined(options, **heal):
        sweep = Sweep(healing(options, **heal))
        _, *both = (sweep.definition(c, sweep.tasks[0]) for c in sweep.configurations)
        return (*both, sweep.adapter(sweep.configurations[2]))

    pruned, healed, adapter = before = defined(options)
    for change in (
        {"max_steps": 3},
        {"training_args": {**TRAINING, "learning_rate": 1e-3}},
        {"peft_args": {"r": 2}},
        {"teacher_weight": 0.5},
    ):
        found = defined(options, **change)
        assert found[0] == pruned
        assert found[1] != healed
        assert found[2] != adapter
    how = {**TRAINING, "save_steps": 3, "logging_steps": 1}
    moved = write_data(tmp_path / "moved.jsonl", TEXTS)
    assert defined(options, training_args=how, data=moved) == before
    for more, same in (
        ({"energy": True, "logits_cache": False}, True),
        ({"dtype": "bfloat16"}, False),
    ):
        here = {**options, "model_args": {**options["model_args"], **more}}
        assert (defined(here)[2] == adapter) is same


@pytest.mark.slow
def test_killed_while_it_trains_it_goes_on_from_the_checkpoint(done, trainer, tmp_path):
    here = {**done, "output_path": str(tmp_path)}
    trainer.at[3] = lambda: os.kill(os.getpid(), signal.SIGKILL)
    assert forked(lambda: run_sweep(here)) == -signal.SIGKILL
    assert set(files_of(tmp_path)) == {f"{name}/tiny_choice" for name in NAMES[:2]}
    assert not adapter_of(here).exists()
    del trainer.at[3]
    assert run_sweep(here) == 0
    assert trainer.steps == [2, 3]
    file = "adapter_model.safetensors"
    found, expected = (load_file(adapter_of(each) / file) for each in (here, done))
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    found, expected = (results_of(each["output_path"]) for each in (here, done))
    assert all(found[unit] == expected[unit] for unit in found)


@pytest.mark.slow
def test_a_training_that_fails_fails_its_own_units(options, trainer, tmp_path):
    here = {**options, "output_path": str(tmp_path), "tasks": ["tiny_both"]}

    def failing():
        if len(trainer.trainings) == 1:
            raise RuntimeError("the memory ran out")

    trainer.at[0] = failing
    assert run_sweep({**here, "prune_percents": ["20"]}) == 1
    failed = errors_of(tmp_path)
    assert {*failed} == {f"{NAMES[2]}/tiny_{task}" for task in ("choice", "sentence")}
    assert all("memory ran out" in error["message"] for error in failed.values())
    assert (len(files_of(tmp_path)), len(trainer.trainings)) == (10, 2)


@pytest.mark.slow
def test_ctrl_c_while_it_trains_keeps_the_step(options, trainer, tmp_path, capsys):
    here = {**options, "output_path": str(tmp_path)}
    trainer.at[2] = lambda: os.kill(os.getpid(), signal.SIGINT)
    assert run_sweep(here) == 130
    assert "Stopped: 2 of 3 units are done" in capsys.readouterr().out
    assert list(tmp_path.rglob("checkpoint-3/healing.json"))
    assert run_sweep(here) == 0


@pytest.mark.slow
def test_two_shards_train_one_adapter_once(options, tmp_path):
    """They share a healed configuration: one trains, the other waits for it."""
    file, folder = tmp_path / "sweep.yaml", tmp_path / "sweep"
    more = {"tasks": ["tiny_both"], "output_path": str(folder)}
    file.write_text(json.dumps({**options, **more}))
    command = [sys.executable, "-m", "lm_eval_pruned.cli", "sweep", "--config", file]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    parts = [
        subprocess.Popen([*command, "--shard", f"{n}/2"], env=env) for n in range(2)
    ]
    assert [part.wait() for part in parts] == [0, 0]
    assert len(files_of(folder)) == 6
    assert len(list(folder.rglob("adapter_model.safetensors"))) == 1


@pytest.mark.parametrize(
    ("heal", "more", "message"),
    [
        ({"data": None}, {}, "add data=FILE"),
        ({"data": "nowhere.jsonl"}, {}, "data=nowhere.jsonl"),
        ({"max_step": 3}, {}, "did you mean max_steps"),
        ({"max_steps": 2.5}, {}, "max_steps=2.5"),
        ({"training_args": {"learning_rte": 1}}, {}, "learning_rte"),
        ({"max_length": 5000}, {}, "512 positions"),
        ({"max_length": 500, "data": "short.txt"}, {}, "each step needs"),
        ({"peft_args": {"target_modules": "q"}}, {}, "Target modules q"),
        ({"method": "full"}, {}, "pass method=lora"),
        ({"teacher_weight": 1.0}, {"ratios": [], "drop_layers": ["1"]}, "no size"),
        ({}, {"ratios": []}, "add sizes"),
        ({}, {"model": "pruned-vllm"}, "model=pruned-vllm"),
        ({}, {"ray": True}, "leave out --ray"),
        ({}, {"model_args": {"peft": "x"}}, "model_args has peft=x"),
        ({}, {"model_args": {"delta": "x"}}, "model_args has delta=x"),
        ({}, {"model_args": {"load_in_8bit": True}}, "quantised weights"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(
    options, heal, more, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Not 500 tokens of text.")
    here = {**healing(options, **heal), **more, "output_path": str(tmp_path / "out")}
    here["model_args"] = options["model_args"] | more.get("model_args", {})
    with pytest.raises(ValueError, match=message):
        run_sweep(here)
    assert not (tmp_path / "out").exists()
