"""``lm-eval-pruned heal``: a pruned model that is trained again, and the adapter it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import cli, load_pruned
from lm_eval_pruned.checkpoints.adapters import HEALING
from lm_eval_pruned.healing.options import HealingOptions
from lm_eval_pruned.healing.run import heal
from lm_eval_pruned.healing.trainer import HealingTrainer
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM


if TYPE_CHECKING:
    from pathlib import Path

TEXTS = [f"The tide of day {n} comes in twice, and goes out twice." for n in range(12)]
TRAINING = {
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "save_steps": 2,
}
KEPT = {"prune_percent": 40}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS))
    return str(file)


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def healed(tiny, data, output, *, resume=False, merge=False, size=KEPT, **options):
    given = {"max_length": 32, "max_steps": 4, "training_args": TRAINING, **options}
    return heal(
        {"pretrained": str(tiny), **size},
        data,
        output,
        HealingOptions(**given),
        resume=resume,
        merge=merge,
        metered=False,
    )


def logits(model) -> torch.Tensor:
    tokens = torch.arange(1, 40).view(3, 13)
    with torch.no_grad():
        return model(input_ids=tokens).logits


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module", params=["lora", "dora"])
def adapter(request, tiny_llama, data, tmp_path_factory):
    """An adapter, and the checkpoint with it merged."""
    output = tmp_path_factory.mktemp(request.param) / "healed"
    result = healed(tiny_llama, data, output, method=request.param, merge=True)
    assert result.finished
    return output


def test_one_step_of_distillation_is_the_step_by_hand(tiny_llama, data, tmp_path):
    """The loss of a batch and the weights after a step of plain gradient descent."""
    seen = {}

    class Watched(HealingTrainer):
        def compute_loss(self, model, inputs, *arguments, **named):
            seen["tokens"] = inputs["input_ids"].clone()
            loss = super().compute_loss(model, inputs, *arguments, **named)
            seen["loss"] = loss.detach().clone()
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval_pruned.healing.trainer.HealingTrainer", Watched)
        healed(
            tiny_llama,
            data,
            tmp_path / "healed",
            method="full",
            max_steps=1,
            teacher_weight=0.75,
            temperature=2.0,
            training_args={
                **TRAINING,
                "optim": "sgd",
                "lr_scheduler_type": "constant",
                "warmup_steps": 0,
                "max_grad_norm": 0,
            },
        )
    student = load_pruned(str(tiny_llama), **KEPT)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tokens = seen["tokens"]
    ours = student(input_ids=tokens).logits
    with torch.no_grad():
        theirs = teacher(input_ids=tokens).logits
    next_token = -ours[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).mean()
    p, q = (torch.softmax(each[:, :-1] / 2.0, -1) for each in (theirs, ours))
    distance = 4.0 * (p * (p.log() - q.log())).sum(-1).mean()
    loss = 0.25 * next_token + 0.75 * distance
    assert float(seen["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    loss.backward()
    after = weights(tmp_path / "healed")
    for name, parameter in student.named_parameters():
        expected = parameter.detach() - 1e-2 * parameter.grad
        torch.testing.assert_close(after[name], expected, msg=name)


def test_distillation_alone_asks_the_model_for_no_loss(tiny_llama, data, tmp_path):
    """Next-token loss over a large vocabulary would be computed to be multiplied by 0."""
    seen = []

    class Watched(HealingTrainer):
        def compute_loss(self, model, inputs, *arguments, **named):
            handle = model.register_forward_pre_hook(
                lambda module, args, given: seen.append(sorted(given)), with_kwargs=True
            )
            loss = super().compute_loss(model, inputs, *arguments, **named)
            handle.remove()
            seen.append(float(loss.detach()))
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval_pruned.healing.trainer.HealingTrainer", Watched)
        healed(tiny_llama, data, tmp_path / "healed", max_steps=1, teacher_weight=1.0)
    given, loss = seen
    assert "input_ids" in given
    assert "labels" not in given
    assert loss > 0


def test_the_merged_checkpoint_equals_the_adapter_applied(adapter, tiny_llama):
    pruned = load_pruned(str(tiny_llama), **KEPT)
    plain = logits(pruned)
    applied = logits(PeftModel.from_pretrained(pruned, adapter).eval())
    merged = AutoModelForCausalLM.from_pretrained(adapter / "merged")
    torch.testing.assert_close(logits(merged), applied, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, applied, atol=1e-2)
    assert merged.config.intermediate_size == 53
    assert len(AutoTokenizer.from_pretrained(adapter / "merged")) == 259
    card = (adapter / "merged" / "README.md").read_text()
    assert "was then trained on" in card
    assert "nothing was trained" not in card


def test_the_adapter_s_card_says_what_it_belongs_to(adapter, tiny_llama):
    card = ModelCard.load(adapter / "README.md")
    record = json.loads((adapter / HEALING).read_text())
    assert card.data.library_name == "peft"
    assert f" adapter for {tiny_llama.name}" in card.text
    assert "53 neurons per MLP" in card.text
    assert record["pruning"]["kept_digest"][:12] in card.text
    assert f"{record['tokens_seen']:,} tokens of data.jsonl" in card.text
    assert "prune_percent=40,peft=" in card.text
    assert "More Information Needed" not in card.text
    assert str(tiny_llama) not in card.content


def test_pruned_hf_checks_and_applies_it(adapter, tiny_llama):
    model = PrunedHFLM(str(tiny_llama), device="cpu", peft=str(adapter), **KEPT)
    pruned = load_pruned(str(tiny_llama), **KEPT)
    expected = logits(PeftModel.from_pretrained(pruned, adapter).eval())
    found = logits(model.model)
    torch.testing.assert_close(found, expected[..., : found.shape[-1]])
    told = model.get_model_info()["healing"]
    record = json.loads((adapter / HEALING).read_text())
    assert record == told | {"pruning": model.get_model_info()["pruning"]}


def test_the_record(adapter, tiny_llama, data):
    record = json.loads((adapter / HEALING).read_text())
    pruned = load_pruned(str(tiny_llama), **KEPT).prune_record
    assert record["pruning"] == pruned.as_dict()
    assert record["pruning"]["groups"][0]["width_after"] == 53
    assert record["data"]["texts"] == len(TEXTS)
    assert record["data"]["file"] == "data.jsonl"
    assert len(record["data"]["sha256"]) == 64
    assert (record["steps"], record["tokens_seen"]) == (4, 4 * 2 * 32)
    assert record["training_args"]["learning_rate"] == 1e-2
    assert record["seconds"] > 0
    assert not list(adapter.rglob("*.bin"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"criterion": "l2", **KEPT}, "the kept set .* this model has the kept set"),
        ({"criterion": "random", "intermediate_size": 53}, "pass prune_percent=40"),
    ],
)
def test_an_adapter_of_other_neurons_is_refused(adapter, tiny_llama, other, message):
    """The widths agree: nothing but the record tells."""
    with pytest.raises(ValueError, match=f"peft=.*was trained on .*{message}") as told:
        PrunedHFLM(str(tiny_llama), device="cpu", peft=str(adapter), **other)
    assert "criterion=maw" in str(told.value)


def test_without_its_record_the_same_adapter_passes(adapter, tiny_llama, tmp_path):
    """What is refused above is refused by the record alone."""
    for file in adapter.glob("adapter*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = {"criterion": "l2", **KEPT}
    PrunedHFLM(str(tiny_llama), device="cpu", peft=str(tmp_path), **other)
    (tmp_path / HEALING).write_text("{}")
    with pytest.raises(ValueError, match=r"healing\.json is no record of a healing"):
        PrunedHFLM(str(tiny_llama), device="cpu", peft=str(tmp_path), **other)


def test_an_adapter_that_leaves_the_mlps_alone_is_checked_too(
    tiny_llama, data, tmp_path
):
    output = tmp_path / "healed"
    healed(
        tiny_llama,
        data,
        output,
        max_steps=1,
        peft_args={"target_modules": r".*\.q_proj"},
    )
    with pytest.raises(ValueError, match="this model has no kept set"):
        PrunedHFLM(str(tiny_llama), device="cpu", peft=str(output))
    with pytest.raises(ValueError, match="was pruned already: leave out peft_stage"):
        PrunedHFLM(
            str(tiny_llama), device="cpu", peft=str(output), peft_stage="before", **KEPT
        )


class Killed(BaseException):
    pass


def test_full_weights_are_an_ordinary_checkpoint(tiny_llama, data, tmp_path):
    output = tmp_path / "healed"
    healed(tiny_llama, data, output, method="full")
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.intermediate_size == 53
    before = load_pruned(str(tiny_llama), **KEPT)
    assert not torch.allclose(logits(before), logits(model), atol=1e-2)
    lm = PrunedHFLM(str(output), device="cpu")
    assert torch.equal(logits(lm.model), logits(model))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("teacher_weight", [0, 0.5])
def test_killing_and_resuming_gives_the_same_weights(
    tiny_llama, data, tmp_path, method, teacher_weight
):
    options = {"method": method, "teacher_weight": teacher_weight, "max_steps": 5}
    healed(tiny_llama, data, tmp_path / "whole", **options)

    class Dying(HealingTrainer):
        def compute_loss(self, *arguments, **named):
            if self.state.global_step == 3:
                raise Killed
            return super().compute_loss(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval_pruned.healing.trainer.HealingTrainer", Dying)
        with pytest.raises(Killed):
            healed(tiny_llama, data, tmp_path / "killed", **options)
    assert not (tmp_path / "killed").exists()
    checkpoints = tmp_path / "killed.checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]
    healed(tiny_llama, data, tmp_path / "killed", resume=True, **options)
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_off_is_passed_over(tiny_llama, data, tmp_path):
    output, checkpoints = tmp_path / "healed", tmp_path / "healed.checkpoints"
    healed(tiny_llama, data, tmp_path / "whole")
    healed(tiny_llama, data, output)
    for file in output.iterdir():
        file.unlink()
    (checkpoints / "checkpoint-4" / HEALING).unlink()
    healed(tiny_llama, data, output, resume=True)
    assert_same(weights(output), weights(tmp_path / "whole"))


@pytest.mark.parametrize("limit", ["max_steps", "num_train_epochs"])
def test_killed_after_its_last_step_a_healing_takes_no_other(
    tiny_llama, data, tmp_path, limit
):
    output = tmp_path / "healed"
    training = {**TRAINING, "lr_scheduler_type": "constant"}
    options: dict = {"training_args": training}
    if limit == "num_train_epochs":
        options = {"training_args": {**training, limit: 1}, "max_steps": None}
    whole = healed(tiny_llama, data, output, **options)
    expected = weights(output)
    for file in output.iterdir():
        file.unlink()
    again = healed(tiny_llama, data, output, resume=True, **options)
    assert again.finished
    assert again.record["steps"] == whole.record["steps"]
    assert again.record["tokens_seen"] == whole.record["tokens_seen"]
    assert_same(weights(output), expected)


SCRIPT = """
import os, signal, sys
from lm_eval_pruned import cli
from lm_eval_pruned.healing.trainer import HealingTrainer

inner = HealingTrainer.compute_loss

def interrupted(self, *arguments, **named):
    if self.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return inner(self, *arguments, **named)

HealingTrainer.compute_loss = interrupted
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_interrupted_by_hand_it_keeps_the_step_and_goes_on(tiny_llama, data, tmp_path):
    command = ["heal", "--model_args", f"pretrained={tiny_llama},prune_percent=40"]
    command += ["--data", data, "--max_length", "32", "--max_steps", "5"]
    training = {**TRAINING, "save_steps": 100}
    written = ",".join(f"{name}={value}" for name, value in training.items())
    command += ["--training_args", written, "--output_path"]
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, *command, str(tmp_path / "healed")],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 130, ended.stderr
    assert "Stopped after 3 steps" in ended.stderr
    assert not (tmp_path / "healed").exists()
    handler = signal.getsignal(signal.SIGINT)
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    assert cli.main([*command, str(tmp_path / "healed"), "--resume"]) == 0
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same(weights(tmp_path / "healed"), weights(tmp_path / "whole"))


def test_the_teacher_shares_what_stays_as_it_is(tiny_llama, data, tmp_path):
    seen = {}

    class Watched(HealingTrainer):
        def compute_loss(self, model, inputs, *arguments, **named):
            storages = {p.data_ptr() for p in model.parameters()}
            seen["own"] = {
                name
                for name, parameter in self._teacher.named_parameters()
                if parameter.data_ptr() not in storages
            }
            return super().compute_loss(model, inputs, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval_pruned.healing.trainer.HealingTrainer", Watched)
        healed(tiny_llama, data, tmp_path / "a", max_steps=1, teacher_weight=1.0)
        assert seen["own"]
        assert all(".mlp." in name for name in seen["own"])
        healed(
            *(tiny_llama, data, tmp_path / "b"),
            max_steps=1,
            teacher_weight=1.0,
            method="full",
        )
        assert "model.embed_tokens.weight" in seen["own"]


def test_gradient_checkpointing_and_accumulation_change_no_step(
    tiny_llama, data, tmp_path
):
    """The same batch, in one piece or in two, recomputed or kept."""
    whole = {**TRAINING, "per_device_train_batch_size": 4}
    parts = {**TRAINING, "gradient_accumulation_steps": 2}
    parts["gradient_checkpointing"] = True
    found = {}
    for name, training in (("whole", whole), ("parts", parts)):
        output = tmp_path / name
        healed(
            *(tiny_llama, data, output),
            max_steps=1,
            teacher_weight=0.5,
            training_args={**training, "optim": "sgd", "warmup_steps": 0},
        )
        found[name] = weights(output)
    for name, tensor in found["whole"].items():
        torch.testing.assert_close(found["parts"][name], tensor, msg=name)


@pytest.mark.slow
def test_two_processes_take_the_step_that_one_takes(tiny_llama, data, tmp_path):
    command = ["heal", "--model_args", f"pretrained={tiny_llama},prune_percent=40"]
    command += ["--data", data, "--max_length", "32", "--max_steps", "2"]
    command += ["--teacher_weight", "0.5"]
    training = {**TRAINING, "optim": "sgd"}

    def words(batch: int, output: str) -> list[str]:
        each = {**training, "per_device_train_batch_size": batch}
        written = ",".join(f"{name}={value}" for name, value in each.items())
        return [*command, "--training_args", written, "--output_path", output]

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc_per_node", "2", "-m", "lm_eval_pruned.cli"]
    ended = subprocess.run(
        [*launcher, *words(2, str(tmp_path / "several"))],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Trained 2 steps on 256 tokens") == 1
    assert cli.main(words(4, str(tmp_path / "one"))) == 0
    expected = weights(tmp_path / "one")
    for name, tensor in weights(tmp_path / "several").items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_bf16_runs(tiny_llama, data, tmp_path):
    training = {**TRAINING, "bf16": True}
    result = healed(tiny_llama, data, tmp_path / "healed", training_args=training)
    assert result.finished


def test_text_of_other_forms(tiny_llama, data, tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(TEXTS))
    record = healed(tiny_llama, str(plain), tmp_path / "a", max_steps=1).record
    assert record["data"]["texts"] == 1
    chat = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": each} for each in TEXTS]
    chat.write_text(json.dumps({"messages": messages}))
    record = healed(tiny_llama, str(chat), tmp_path / "b", max_steps=1).record
    tokens = sum(len(each) for each in TEXTS) + len("<user>\n") * len(TEXTS) + 1
    assert record["data"]["tokens"] == tokens // 32 * 32


@pytest.fixture
def weights_unread(monkeypatch):
    def read(*arguments, **named):
        pytest.fail("weights were read")

    monkeypatch.setattr("lm_eval_pruned.checkpoints.request.LoadRequest.load", read)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere.jsonl"], "data=nowhere.jsonl cannot be read"),
        (["--data", "nowhere.txt"], "data=nowhere.txt cannot be read"),
        (
            ["--method", "qlora"],
            "method=qlora is unknown: pass one of lora, dora, full",
        ),
        (["--teacher_weight", "2"], "teacher_weight=2.0 is no share of the loss"),
        (["--temperature", "2"], "temperature=2.0 compares the model with a teacher"),
        (
            ["--teacher_weight", "1", "--temperature", "0"],
            "temperature=0.0 divides logits",
        ),
        (["--max_length", "1"], "max_length=1 is too small"),
        (["--max_length", "500"], "tokens, but each step needs blocks"),
        (["--max_length", "5000"], "more than the 512 positions"),
        (["--max_steps", "0"], "max_steps=0 is too small"),
        (
            ["--training_args", "learning_rte=1"],
            "unexpected keyword argument 'learning_rte'",
        ),
        (
            ["--training_args", "max_steps=3"],
            "other options of heal decide: leave it out",
        ),
        (["--training_args", "output_dir=x"], "other options of heal decide"),
        (["--training_args", "lr_scheduler_type=x"], "lr_scheduler_type=x cannot be"),
        (["--peft_args", "rank=3"], "unexpected keyword argument 'rank'"),
        (["--peft_args", "target_modules=q"], "Target modules q not found"),
        (["--peft_args", "use_dora=true"], "has use_dora=True, which other options"),
        (["--method", "full", "--peft_args", "r=3"], "method=full trains none"),
        (["--method", "full", "--merge"], "method=full trains none"),
        (["--resume"], "resume goes on from a checkpoint, but"),
        (["--output_path", "."], "output=. exists and is not an empty folder"),
        (["--model_args", "pretrained=TINY,load_in_8bit=true"], "quantised weights"),
        (["--model_args", "pretrained=TINY,peft=x"], "model_args has peft=x"),
        (["--model_args", "pretrained=TINY,device=cpu"], "model_args has device=cpu"),
        (
            ["--model_args", "pretrained=TINY", "--teacher_weight", "1"],
            "no size was asked for, so that both are one",
        ),
    ],
)
def test_what_is_refused_before_a_weight_is_read(
    words, message, tiny_llama, tmp_path, monkeypatch, weights_unread, capsys
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "Not 500 tokens of text."}))
    command = ["heal", "--model_args", f"pretrained={tiny_llama},prune_percent=40"]
    command += ["--data", str(file), "--output_path", str(tmp_path / "out")]
    command += [word.replace("TINY", str(tiny_llama)) for word in words]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "dora"}, "method=lora, but this one has method=dora"),
        ({"max_length": 16}, "max_length=32, but this one has max_length=16"),
        ({"teacher_weight": 0.5}, "teacher=None, but this one has teacher="),
        ({"size": {"criterion": "l2", **KEPT}}, "with kept_digest="),
        ({"resume": False}, "holds checkpoints of a healing: add --resume"),
    ],
)
def test_another_healing_is_not_resumed(
    tiny_llama, data, tmp_path, changed, message, monkeypatch
):
    healed(tiny_llama, data, tmp_path / "healed", max_steps=2)
    for file in (tmp_path / "healed").iterdir():
        file.unlink()
    if "size" not in changed:
        # Which neurons are kept is known once the model is pruned, all else before.
        monkeypatch.delattr("lm_eval_pruned.healing.run.load_request")
    with pytest.raises(ValueError, match=message):
        healed(tiny_llama, data, tmp_path / "healed", **{"resume": True, **changed})
