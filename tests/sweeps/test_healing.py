"""``sweep --heal``: each pruned model before and after, trained once, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lm_eval_pruned.healing.trainer import HealingTrainer
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers.sweeping import errors_of, files_of, forked, sweep_options


TEXTS = [f"The tide of day {n} comes in twice, and goes out twice." for n in range(12)]
TRAINING = {
    "per_device_train_batch_size": 2,
    "disable_tqdm": True,
    "learning_rate": "1e-2",
    "save_steps": 2,
}
UNITS = [f"{c}/tiny_choice" for c in ("baseline", "ratio-1.5", "ratio-1.5_healed")]


@pytest.fixture(scope="module", autouse=True)
def unmetered(quick):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval_pruned.healing.cost.meters_the_machine", lambda: False)
        yield


def write_data(file, texts):
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return str(file)


@pytest.fixture(scope="module")
def done(tiny_llama, tasks, tmp_path_factory):
    """The options of a sweep of one size before and after that has run."""
    folder = tmp_path_factory.mktemp("sweep")
    heal = {"data": write_data(folder / "data.jsonl", TEXTS), "training_args": TRAINING}
    heal |= {"max_length": 32, "max_steps": 4}
    more = {"tasks": ["tiny_choice"], "heal": heal}
    options = sweep_options(tiny_llama, tasks, folder / "sweep", **more)
    assert run_sweep(options) == 0
    return options


@pytest.fixture
def options(done, tmp_path):
    return {**done, "output_path": str(tmp_path / "here")}


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

    before = defined(options)
    for change in (
        {"max_steps": 3},
        {"training_args": {**TRAINING, "learning_rate": 1e-3}},
        {"peft_args": {"r": 2}},
        {"teacher_weight": 0.5},
    ):
        found = zip(defined(options, **change), before, strict=True)
        assert [one == other for one, other in found] == [True, False, False]
    how = {**TRAINING, "save_steps": 3, "logging_steps": 1}
    moved = write_data(tmp_path / "moved.jsonl", TEXTS)
    assert defined(options, training_args=how, data=moved) == before
    for more, same in (({"logits_cache": False}, True), ({"dtype": "bfloat16"}, False)):
        here = {**options, "model_args": {**options["model_args"], **more}}
        assert (defined(here)[2] == before[2]) is same


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "step", "code", "left"),
    [(signal.SIGKILL, 3, -9, [2, 3]), (signal.SIGINT, 2, 130, [3])],
)
def test_stopped_while_it_trains_it_goes_on_from_the_checkpoint(
    options, trainer, stop, step, code, left
):
    trainer.at[step] = lambda: os.kill(os.getpid(), stop)
    assert forked(lambda: run_sweep(options)) == code
    assert sorted(files_of(options["output_path"])) == UNITS[:2]
    del trainer.at[step]
    assert run_sweep(options) == 0
    assert trainer.steps == left


@pytest.mark.slow
def test_a_training_that_fails_fails_its_own_units(options, trainer):
    def failing():
        if len(trainer.trainings) == 1:
            raise RuntimeError("the memory ran out")

    trainer.at[0] = failing
    asked = {**options, "tasks": ["tiny_both"], "prune_percents": ["20"]}
    assert run_sweep(asked) == 1
    failed = errors_of(options["output_path"])
    assert {*failed} == {UNITS[2], UNITS[2].replace("choice", "sentence")}
    assert all("memory ran out" in error["message"] for error in failed.values())
    assert (len(files_of(options["output_path"])), len(trainer.trainings)) == (10, 2)


@pytest.mark.slow
def test_two_shards_train_one_adapter_once(options, tmp_path):
    """They share a healed configuration: one trains, the other waits for it."""
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps({**options, "tasks": ["tiny_both"]}))
    command = [sys.executable, "-m", "lm_eval_pruned.cli", "sweep", "--config", file]
    parts = [subprocess.Popen([*command, "--shard", f"{n}/2"]) for n in range(2)]
    assert [part.wait() for part in parts] == [0, 0]
    assert len(files_of(options["output_path"])) == 6
    assert len(list(tmp_path.rglob("adapter_model.safetensors"))) == 1
