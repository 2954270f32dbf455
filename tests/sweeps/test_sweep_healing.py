"""``sweep --heal``: each pruned model before and after, trained once, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from lm_eval_pruned.checkpoints.adapters import HEALING
from lm_eval_pruned.cli import main
from lm_eval_pruned.healing.options import HealingOptions
from lm_eval_pruned.healing.trainer import HealingTrainer
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers.meters import FakeMeter
from tests.helpers.sweeping import files_of, forked, sweep_options, write_tasks


TEXTS = [f"The tide of day {n} comes in twice, and goes out twice." for n in range(12)]
TRAINING = {
    "per_device_train_batch_size": 2,
    "disable_tqdm": True,
    "learning_rate": "1e-2",
    "save_steps": 2,
}


class Now:
    """A clock that nobody has to move."""

    @property
    def now(self) -> float:
        return time.perf_counter()


@pytest.fixture(scope="module", autouse=True)
def ten_watts(quick):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lm_eval_pruned.healing.cost.CodecarbonMeter",
            lambda: FakeMeter(Now(), {"cpu": 10.0}),
        )
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data.jsonl", TEXTS)


def write_data(file, texts):
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return file


def heal_options(data, **more):
    return {
        "data": str(data),
        "max_length": 32,
        "max_steps": 4,
        "training_args": TRAINING,
        **more,
    }


@pytest.fixture(scope="module")
def options(tiny_llama, tasks, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    chosen = {"tasks": ["tiny_choice"], "heal": heal_options(data)}
    return sweep_options(tiny_llama, tasks, folder, **chosen)


@pytest.fixture(scope="module")
def done(options):
    """A sweep of one size before and after, and how often something was trained."""
    trainings = []

    class Counting(HealingTrainer):
        def train(self, *arguments, **named):
            trainings.append(self.args.output_dir)
            return super().train(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval_pruned.healing.trainer.HealingTrainer", Counting)
        assert run_sweep(options) == 0
        yield SimpleNamespace(trainings=trainings, options=options)


def folder_of(options):
    (found,) = Sweep(options).configurations[2:]
    return Sweep(options).adapter(found)


def results_of(options, configuration, task="tiny_choice"):
    unit = Path(options["output_path"], "units", configuration, task)
    (file,) = unit.glob("results_*.json")
    return json.loads(file.read_text())


def test_each_size_is_evaluated_before_and_after(done):
    assert set(files_of(Path(done.options["output_path"]))) == {
        f"{configuration}/tiny_choice"
        for configuration in ("baseline", "ratio-1.5", "ratio-1.5_healed")
    }
    assert len(done.trainings) == 1
    adapter = folder_of(done.options)
    record = json.loads((adapter / HEALING).read_text())
    before, after = (
        results_of(done.options, each)["config"]
        for each in ("ratio-1.5", "ratio-1.5_healed")
    )
    assert "healing" not in before
    assert after["healing"] | {"pruning": after["pruning"]} == record
    assert after["pruning"] == before["pruning"]
    assert (record["steps"], record["tokens_seen"]) == (4, 4 * 2 * 32)
    assert record["training_args"]["learning_rate"] == 1e-2
    assert record["energy"]["sources"] == {
        "cpu": "measured",
        "gpu": "none",
        "ram": "none",
    }
    joules = record["energy"]["joules"]["total"]
    assert joules == pytest.approx(10 * record["seconds"], abs=2)
    # The checkpoints have done their duty.
    assert [each.name for each in adapter.parent.iterdir() if each.is_dir()] == [
        adapter.name
    ]


@pytest.mark.slow
def test_another_task_trains_nothing_again(done):
    more = {**done.options, "tasks": ["tiny_choice", "tiny_sentence"]}
    count, before = len(done.trainings), files_of(Path(done.options["output_path"]))
    assert run_sweep(more) == 0
    after = files_of(Path(done.options["output_path"]))
    assert "ratio-1.5_healed/tiny_sentence" in after
    assert {unit: after[unit] for unit in before} == before
    assert len(done.trainings) == count


def test_how_it_is_logged_and_where_the_text_lies_change_nothing(done, tmp_path):
    moved = write_data(tmp_path / "moved.jsonl", TEXTS)
    training = {**TRAINING, "save_steps": 3, "logging_steps": 1}
    other = heal_options(moved, training_args=training)
    sweep, here = Sweep({**done.options, "heal": other}), Sweep(done.options)
    task, healed = sweep.tasks[0], sweep.configurations[2]
    assert sweep.definition(healed, task) == here.definition(healed, task)
    assert sweep.adapter(healed) == here.adapter(healed)


@pytest.mark.parametrize(
    "change",
    [
        {"max_steps": 3},
        {"training_args": {**TRAINING, "learning_rate": 1e-3}},
        {"peft_args": {"r": 2}},
        {"teacher_weight": 0.5},
    ],
)
def test_what_decides_the_weights_decides_the_unit(done, data, change):
    other = Sweep({**done.options, "heal": heal_options(data, **change)})
    here = Sweep(done.options)
    task, before, healed = here.tasks[0], *here.configurations[1:]
    assert other.definition(healed, task) != here.definition(healed, task)
    assert other.definition(before, task) == here.definition(before, task)
    assert other.adapter(healed) != here.adapter(healed)


@pytest.mark.slow
def test_other_text_trains_again(done, tmp_path):
    other = write_data(tmp_path / "data.jsonl", TEXTS[1:])
    count, old = len(done.trainings), folder_of(done.options)
    options = {**done.options, "heal": heal_options(other)}
    assert run_sweep(options) == 0
    assert len(done.trainings) == count + 1
    assert old.is_dir()
    # Back to the first text: its adapter is still there.
    assert run_sweep(done.options) == 0
    assert len(done.trainings) == count + 1


@pytest.mark.slow
def test_killed_while_it_trains_it_goes_on_from_the_checkpoint(options, done, tmp_path):
    here = {**options, "output_path": str(tmp_path / "killed")}
    steps = tmp_path / "steps"

    class Noting(HealingTrainer):
        dying = False

        def compute_loss(self, *arguments, **named):
            with open(steps, "a") as file:
                file.write(f"{self.state.global_step}\n")
            if self.dying and self.state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().compute_loss(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval_pruned.healing.trainer.HealingTrainer", Noting)
        patch.setattr(Noting, "dying", True)
        assert forked(lambda: run_sweep(here)) == -signal.SIGKILL
        assert set(files_of(tmp_path / "killed")) == {
            "baseline/tiny_choice",
            "ratio-1.5/tiny_choice",
        }
        adapter = folder_of(here)
        assert not adapter.exists()
        steps.unlink()
        patch.setattr(Noting, "dying", False)
        assert forked(lambda: run_sweep(here)) == 0
    assert steps.read_text().split() == ["2", "3"]
    found, expected = (
        load_file(each / "adapter_model.safetensors")
        for each in (adapter, folder_of(options))
    )
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    scores = [
        results_of(each, "ratio-1.5_healed")["results"] for each in (here, options)
    ]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_training_that_fails_fails_its_own_units(options, tmp_path):
    here = {**options, "output_path": str(tmp_path / "failing")}
    here |= {"tasks": ["tiny_both"], "prune_percents": ["20"]}
    started = []

    class Failing(HealingTrainer):
        def compute_loss(self, *arguments, **named):
            if len(started) == 1:
                raise RuntimeError("the memory ran out")
            return super().compute_loss(*arguments, **named)

        def train(self, *arguments, **named):
            started.append(self)
            return super().train(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval_pruned.healing.trainer.HealingTrainer", Failing)
        assert run_sweep(here) == 1
    failed = sorted((tmp_path / "failing").glob("units/*/*/error.json"))
    assert [file.parent.name for file in failed] == ["tiny_choice", "tiny_sentence"]
    assert {file.parent.parent.name for file in failed} == {"ratio-1.5_healed"}
    assert json.loads(failed[0].read_text())["message"] == "the memory ran out"
    assert len(files_of(tmp_path / "failing")) == 10
    assert len(started) == 2
    assert run_sweep(here, retry_failed=True) == 0


@pytest.mark.slow
def test_ctrl_c_while_it_trains_keeps_the_step(options, tmp_path, capsys):
    here = {**options, "output_path": str(tmp_path / "stopped")}

    class Interrupted(HealingTrainer):
        def compute_loss(self, *arguments, **named):
            if self.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().compute_loss(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval_pruned.healing.trainer.HealingTrainer", Interrupted)
        assert run_sweep(here) == 130
    assert "Stopped: 2 of 3 units are done" in capsys.readouterr().out
    assert list((tmp_path / "stopped").rglob("checkpoint-3/healing.json"))
    assert run_sweep(here) == 0


def test_the_plan_shows_them(done, capsys):
    assert run_sweep(done.options, dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "ratio-1.5_healed" in shown
    assert "Healing: 1 of 1 trained, 0 to train, on " in shown


def test_command_line_and_yaml_ask_for_the_same(tmp_path):
    from lm_eval_pruned.sweeps.options import add_arguments, read_options

    def read(*words):
        import argparse

        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return read_options(parser.parse_args(words))["heal"]

    rest = ("--tasks", "boolq", "--output_path", "out")
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "heal:\n  data: a.jsonl\n  max_steps: 200\n  training_args:\n    bf16: true\n"
    )
    expected = {"data": "a.jsonl", "max_steps": 200, "training_args": {"bf16": True}}
    assert read("--config", str(file), *rest) == expected
    words = 'data=a.jsonl,max_steps=200,training_args={"bf16": true}'
    assert HealingOptions.of(
        {k: v for k, v in read("--heal", words, *rest).items() if k != "data"}, "heal"
    ) == HealingOptions(max_steps=200, training_args={"bf16": True})
    assert read("--heal", json.dumps(expected), *rest) == expected


@pytest.mark.parametrize(
    ("heal", "more", "message"),
    [
        ({"data": None}, {}, "heal has no text to train on: add data=FILE.jsonl"),
        ({"data": "nowhere.jsonl"}, {}, "data=nowhere.jsonl cannot be read"),
        ({"max_step": 3}, {}, "unknown key max_step: did you mean max_steps?"),
        ({"max_steps": 2.5}, {}, "heal has max_steps=2.5: pass a whole number"),
        ({"training_args": 3}, {}, "heal has training_args=3: pass a mapping"),
        (
            {"training_args": {"learning_rte": 1}},
            {},
            "unexpected keyword argument 'learning_rte'",
        ),
        ({"max_length": 5000}, {}, "more than the 512 positions"),
        ({"max_length": 500, "data": "short.txt"}, {}, "tokens, but each step needs"),
        ({"peft_args": {"target_modules": "q"}}, {}, "Target modules q not found"),
        ({"method": "full"}, {}, "pass method=lora or method=dora"),
        (
            {"teacher_weight": 1.0},
            {"ratios": [], "drop_layers": ["1"]},
            "no size was asked for",
        ),
        ({}, {"ratios": []}, "the sweep has none: add sizes"),
        ({}, {"model": "pruned-vllm"}, "the sweep has model=pruned-vllm"),
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
    here = {**options, **more, "output_path": str(tmp_path / "out")}
    here["heal"] = {**options["heal"], **heal}
    here["model_args"] = options["model_args"] | more.get("model_args", {})
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        run_sweep(here)
    assert not (tmp_path / "out").exists()


def test_a_launcher_of_several_processes_is_refused(options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2"):
        Sweep(options)


def test_arguments_of_the_evaluation_alone_train_nothing_else(options):
    args = {
        **options["model_args"],
        "energy": True,
        "max_length": 100,
        "logits_cache": False,
    }
    sweep, here = Sweep({**options, "model_args": args}), Sweep(options)
    healed = sweep.configurations[2]
    assert sweep.adapter(healed) == here.adapter(healed)
    dtype = {**options, "model_args": {**options["model_args"], "dtype": "bfloat16"}}
    assert Sweep(dtype).adapter(healed) != here.adapter(healed)


@pytest.mark.slow
def test_two_shards_train_one_adapter_once(options, tasks, tmp_path):
    """They share a healed configuration: one trains, the other waits for it."""
    heal = json.dumps(options["heal"])
    command = [sys.executable, "-m", "lm_eval_pruned.cli", "sweep", "--heal", heal]
    command += ["--model_args", f"pretrained={options['model_args']['pretrained']}"]
    command += ["--ratios", "1.5", "--tasks", "tiny_choice", "tiny_sentence"]
    command += ["--include_path", str(tasks), "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "sweep")]
    parts = [
        subprocess.Popen(
            [*command, "--shard", f"{part}/2"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for part in range(2)
    ]
    assert [part.wait() for part in parts] == [0, 0]
    assert len(files_of(tmp_path / "sweep")) == 6
    assert len(list((tmp_path / "sweep").rglob("adapter_model.safetensors"))) == 1


def test_compare_and_report_show_both(done, capsys):
    folder = done.options["output_path"]
    assert main(["compare", folder]) == 0
    shown = capsys.readouterr().out
    assert "|ratio-1.5|" in shown
    assert "|ratio-1.5_healed|" in shown
