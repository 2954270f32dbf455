"""``lm-eval-pruned heal``: a pruned model that is trained again, and the adapter it leaves."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.adapters import HEALING
from lm_eval_pruned.healing.options import HealingOptions
from lm_eval_pruned.healing.run import heal
from lm_eval_pruned.healing.text import training_text
from lm_eval_pruned.healing.trainer import HealingTrainer
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning.arguments import OWN_TEXT
from tests.helpers.ways_to_load import write_texts


if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [f"The tide of day {n} comes in twice, and goes out twice." for n in range(12)]
TRAINING = {
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "save_steps": 2,
    "bf16": False,
}
KEPT = {"prune_percent": 40}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "data.jsonl", TEXTS)


def healed(tiny, data, output, *, resume=False, **options):
    given = {"max_length": 32, "max_steps": 4, "training_args": TRAINING, **options}
    model_args, how = {"pretrained": str(tiny), **KEPT}, HealingOptions(**given)
    return heal(model_args, data, output, how, resume=resume)


@contextmanager
def watching(before=lambda trainer, model: None, after=lambda inputs, loss: None):
    """Call functions around each computation of a loss."""
    inner = HealingTrainer.compute_loss

    def compute_loss(trainer, model, inputs, *arguments, **named):
        before(trainer, model)
        loss = inner(trainer, model, inputs, *arguments, **named)
        after(inputs, loss)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HealingTrainer, "compute_loss", compute_loss)
        yield


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def assert_same(found: Path, expected: Path, **tolerance):
    slack = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(weights(found), weights(expected), **slack)


def test_one_step_of_distillation_is_the_step_by_hand(tiny_llama, data, tmp_path):
    """The loss of a batch and the weights after a step of plain gradient descent."""
    seen = {}

    def note(inputs, loss):
        # The first losses are those of held text.
        if isinstance(loss, torch.Tensor):
            seen.update(tokens=inputs["input_ids"].clone(), loss=float(loss.detach()))

    descent = {**TRAINING, "optim": "sgd", "lr_scheduler_type": "constant"}
    descent |= {"warmup_steps": 0, "max_grad_norm": 0}
    options = {"method": "full", "teacher_weight": 0.75, "temperature": 2.0}
    options |= {"max_steps": 1, "training_args": descent}
    with watching(after=note):
        healed(tiny_llama, data, tmp_path / "healed", **options)
    student = load_pruned(str(tiny_llama), **KEPT)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokens = seen["tokens"]
    ours = student(input_ids=tokens).logits
    with torch.no_grad():
        theirs = teacher(input_ids=tokens).logits
    next_token = -ours[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).mean()
    p, q = (torch.softmax(logits / 2.0, -1) for logits in (theirs, ours))
    likeliest = p.topk(64).indices
    p, q = p.gather(-1, likeliest), q.gather(-1, likeliest)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    distance = 4.0 * (p * (p.log() - q.log())).sum(-1).mean()
    loss = 0.25 * next_token + 0.75 * distance
    assert seen["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    loss.backward()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "healed").state_dict()
    for name, parameter in student.named_parameters():
        expected = parameter.detach() - 1e-2 * parameter.grad
        torch.testing.assert_close(after[name], expected, msg=name)


def test_an_adapter_that_leaves_the_mlps_alone_is_checked_too(
    tiny_llama, data, tmp_path
):
    adapter = tmp_path / "healed"
    attention = {"target_modules": r".*\.q_proj"}
    healed(tiny_llama, data, adapter, max_steps=1, peft_args=attention)
    given = {"device": "cpu", "peft": str(adapter)}
    with pytest.raises(ValueError, match="no kept set"):
        PrunedHFLM(str(tiny_llama), **given)
    with pytest.raises(ValueError, match="leave out peft_stage"):
        PrunedHFLM(str(tiny_llama), peft_stage="before", **given, **KEPT)


class Killed(BaseException):
    pass


def test_killing_and_resuming_gives_the_same_weights(tiny_llama, data, tmp_path):
    """Of all weights; the contract has the same of an adapter with a teacher."""
    options = {"method": "full"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    healed(tiny_llama, data, whole, max_steps=5, **options)

    def die(trainer, model):
        if trainer.state.global_step == 3:
            raise Killed

    with watching(before=die), pytest.raises(Killed):
        healed(tiny_llama, data, killed, max_steps=5, **options)
    assert not killed.exists()
    checkpoints = tmp_path / "killed.checkpoints"
    assert sorted(p.name for p in checkpoints.glob("ch*")) == ["checkpoint-2"]
    healed(tiny_llama, data, killed, resume=True, max_steps=5, **options)
    assert_same(killed, whole)


@pytest.mark.parametrize("case", ["cut off", "max_steps", "num_train_epochs"])
def test_from_its_last_checkpoint_a_healing_takes_no_step_too_many(
    tiny_llama, data, tmp_path, case
):
    training = {**TRAINING, "lr_scheduler_type": "constant", "num_train_epochs": 1}
    options: dict = {"training_args": training}
    options |= {"max_steps": None} if case == "num_train_epochs" else {}
    output, moved = tmp_path / "healed", tmp_path / "moved"
    whole = healed(tiny_llama, data, output, **options)
    output.rename(moved)
    if case == "cut off":
        # A checkpoint without its record is passed over.
        (tmp_path / "healed.checkpoints" / "checkpoint-4" / HEALING).unlink()
    again = healed(tiny_llama, data, output, resume=True, **options)
    assert again["steps"] == whole["steps"]
    assert_same(output, moved)


def test_gradient_checkpointing_and_accumulation_change_no_step(
    tiny_llama, data, tmp_path
):
    """The same batch, in one piece or in two, recomputed or kept."""
    whole = {"per_device_train_batch_size": 4}
    parts = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    for name, way in (("whole", whole), ("parts", parts)):
        training = {**TRAINING, "optim": "sgd", "warmup_steps": 0, **way}
        options = {"max_steps": 1, "teacher_weight": 0.5, "training_args": training}
        healed(tiny_llama, data, tmp_path / name, **options)
    assert_same(tmp_path / "parts", tmp_path / "whole", rtol=1.3e-6, atol=1e-5)


def test_what_tells_when_to_stop_is_no_text_that_is_trained_on(tiny_llama, data):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def rows(blocks):
        return {tuple(row.tolist()) for row in blocks}

    ours = training_text([str(OWN_TEXT), data], tokenizer, 32, "text")
    again = training_text([str(OWN_TEXT)], tokenizer, 32, "text", 320)
    assert len(ours.held) == 32
    assert rows(ours.held) == rows(again.held)
    assert not rows(ours.held) & rows(ours.blocks)
    assert len(again.blocks) == 10
    theirs = training_text([data], tokenizer, 32, "data")
    assert len(theirs.held) == 1
    assert not rows(theirs.held) & rows(ours.held)
    assert theirs.about["held"] == "one block in 24"
    with pytest.raises(ValueError, match=r"max_length=30000 exceeds the \d+ tokens"):
        training_text([str(OWN_TEXT)], tokenizer, 30_000, "data")
