"""How a training ends that lacks memory or room, or that does not help."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.healing.options import Budget, HealingOptions
from lm_eval_pruned.healing.run import heal
from lm_eval_pruned.healing.trainer import HealingTrainer
from lm_eval_pruned.healing.training import Training
from lm_eval_pruned.pruning.arguments import OWN_TEXT


pytestmark = pytest.mark.usefixtures("one_thread")
TRAINING = {"use_cpu": True, "bf16": False}


def distilled(tiny, output, **options):
    how = HealingOptions(training_args={**TRAINING, **options.pop("training", {})})
    budget = Budget(tokens=2000)
    training = Training(how, output, [str(OWN_TEXT)], "text", budget, **options)
    size = {"prune_percent": 40}
    export_pruned(str(tiny), output, training=training, prune_arguments=size)
    return training.record


def failing(error):
    def compute_loss(*arguments, **named):
        raise error

    return compute_loss


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
        MemoryError(),
    ],
)
def test_too_little_memory_for_a_step_is_one_sentence(
    tiny_llama, tmp_path, monkeypatch, error
):
    monkeypatch.setattr(HealingTrainer, "compute_loss", failing(error))
    with pytest.raises(ValueError, match=r"2 blocks of 256 tokens needs more memory"):
        distilled(tiny_llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_while_a_step_is_kept_is_one_sentence(
    tiny_llama, tmp_path, monkeypatch
):
    full = RuntimeError("PytorchStreamWriter failed writing file data/1: file write")
    monkeypatch.setattr(HealingTrainer, "_save_checkpoint", failing(full))
    with pytest.raises(OSError, match=r"out\.checkpoints: pass an output_path on"):
        distilled(tiny_llama, tmp_path / "out")


def test_any_other_error_is_left_as_it_is(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(HealingTrainer, "compute_loss", failing(RuntimeError("odd")))
    with pytest.raises(RuntimeError, match="odd"):
        distilled(tiny_llama, tmp_path / "out")


def test_a_disk_without_room_for_checkpoints_is_refused_before_the_load(
    tiny_llama, tmp_path, monkeypatch
):
    usage, loads = shutil.disk_usage(tmp_path)._replace(free=700_000), []
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    monkeypatch.setattr(Checkpoint, "load_stored", lambda *_: loads.append(1))
    # 51,424 weights before the cut, 25,344 of them in MLPs; two checkpoints with 4 bytes of each and 8
    # more of what is trained, and 4 bytes of that as it was at the start.
    needed = 2 * (4 * 51_424 + 8 * 25_344) + 4 * 25_344
    with pytest.raises(OSError, match=f"needs {needed:,} bytes"):
        distilled(tiny_llama, tmp_path / "out")
    assert not loads


def test_training_that_does_not_help_says_so_and_changes_nothing(
    tiny_llama, tmp_path, caplog
):
    record = distilled(
        tiny_llama, tmp_path / "out", training={"learning_rate": 3.0, "warmup_steps": 0}
    )
    losses = record["held_loss"]
    assert losses["after"] == losses["before"]
    assert "Training did not lower the loss on held text" in caplog.text
    export_pruned(
        str(tiny_llama), tmp_path / "cut", prune_arguments={"prune_percent": 40}
    )
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("cut", "out")
    )
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(after[name], weight), name


def test_where_the_weights_do_not_fit_an_adapter_is_trained_and_merged(
    tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.setattr("lm_eval_pruned.pruning.lending.free_bytes", lambda device: 1)
    assert distilled(tiny_llama, tmp_path / "out")["method"] == "lora"
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    record = heal(
        {"pretrained": str(tiny_llama), "prune_percent": 40},
        None,
        tmp_path / "healed",
        HealingOptions(max_steps=1, training_args=TRAINING),
    )
    assert record["method"] == "lora"
    assert (tmp_path / "healed" / "adapter_config.json").exists()
