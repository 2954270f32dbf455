"""``lm-eval-pruned heal``: a pruned model that is trained again, and the adapter it leaves."""

from __future__ import annotations

import json
import signal
from contextlib import contextmanager
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
from tests.helpers import evaluations
from tests.helpers.layouts import logits
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
}
KEPT = {"prune_percent": 40}
#: The same neurons are kept, and their weights are others.
SOLVED = {**KEPT, "repair": "least_squares"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "data.jsonl", TEXTS)


def healed(tiny, data, output, *, resume=False, merge=False, size=KEPT, **options):
    given = {"max_length": 32, "max_steps": 4, "training_args": TRAINING, **options}
    model_args, how = {"pretrained": str(tiny), **size}, HealingOptions(**given)
    more = {"resume": resume, "merge": merge, "metered": False}
    return heal(model_args, data, output, how, **more)


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

    def note(inputs, loss):
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
    p, q = (torch.softmax(each[:, :-1] / 2.0, -1) for each in (theirs, ours))
    distance = 4.0 * (p * (p.log() - q.log())).sum(-1).mean()
    loss = 0.25 * next_token + 0.75 * distance
    assert seen["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    loss.backward()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "healed").state_dict()
    for name, parameter in student.named_parameters():
        expected = parameter.detach() - 1e-2 * parameter.grad
        torch.testing.assert_close(after[name], expected, msg=name)


def test_the_adapter_is_applied_and_merged(adapter, tiny_llama):
    pruned = load_pruned(str(tiny_llama), **KEPT)
    plain = logits(pruned)
    applied = logits(PeftModel.from_pretrained(pruned, adapter).eval())
    assert not torch.allclose(plain, applied, atol=1e-2)
    merged = AutoModelForCausalLM.from_pretrained(adapter / "merged")
    torch.testing.assert_close(logits(merged), applied, atol=1e-4, rtol=1e-4)
    assert len(AutoTokenizer.from_pretrained(adapter / "merged")) == 259
    assert "was then trained on" in (adapter / "merged" / "README.md").read_text()
    model = PrunedHFLM(str(tiny_llama), device="cpu", peft=str(adapter), **KEPT)
    found = logits(model.model)
    torch.testing.assert_close(found, applied[..., : found.shape[-1]])
    info = model.get_model_info()
    record = json.loads((adapter / HEALING).read_text())
    assert record == info["healing"] | {"pruning": info["pruning"]}


def test_the_record_and_the_card_say_what_an_adapter_belongs_to(adapter, tiny_llama):
    record = json.loads((adapter / HEALING).read_text())
    assert (record["data"]["texts"], len(record["data"]["sha256"])) == (12, 64)
    assert (record["steps"], record["tokens_seen"]) == (4, 4 * 2 * 32)
    assert record["training_args"]["learning_rate"] == 1e-2
    card = ModelCard.load(adapter / "README.md")
    digest = record["pruning"]["kept_digest"][:12]
    for words in ("53 neurons per MLP", digest, "256 tokens of data.jsonl"):
        assert words in card.text
    # Not the folder of this machine, and not peft's empty template.
    assert str(tiny_llama) not in card.content
    assert "More Information Needed" not in card.text


def test_an_adapter_of_other_neurons_is_refused_by_its_record(
    adapter, tiny_llama, tmp_path
):
    """The widths agree: nothing but the record tells."""
    given = {"device": "cpu", "criterion": "l2", **KEPT}
    with pytest.raises(ValueError, match=r"peft=.*was trained on .*the kept set"):
        PrunedHFLM(str(tiny_llama), peft=str(adapter), **given)
    for file in adapter.glob("adapter*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    PrunedHFLM(str(tiny_llama), peft=str(tmp_path), **given)
    (tmp_path / HEALING).write_text("{}")
    with pytest.raises(ValueError, match=r"healing\.json is not a healing record"):
        PrunedHFLM(str(tiny_llama), peft=str(tmp_path), **given)


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


@pytest.mark.parametrize("options", [{"method": "full"}, {"teacher_weight": 0.5}])
def test_killing_and_resuming_gives_the_same_weights(
    tiny_llama, data, tmp_path, options
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    healed(tiny_llama, data, whole, max_steps=5, **options)

    def die(trainer, model):
        if trainer.state.global_step == 3:
            raise Killed

    with watching(before=die), pytest.raises(Killed):
        healed(tiny_llama, data, killed, max_steps=5, **options)
    assert not killed.exists()
    checkpoints = tmp_path / "killed.checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]
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
    assert again.record["steps"] == whole.record["steps"]
    assert_same(output, moved)


def words_of(tiny, data, training=TRAINING, **options):
    """Return a command to which the output is to be added."""
    words = ["heal", "--model_args", f"pretrained={tiny},prune_percent=40"]
    words += ["--data", data, "--max_length", "32"]
    words += [word for k, v in options.items() for word in (f"--{k}", str(v))]
    written = ",".join(f"{name}={value}" for name, value in training.items())
    return [*words, "--training_args", written, "--output_path"]


def test_interrupted_by_hand_it_keeps_the_step_and_goes_on(
    tiny_llama, data, tmp_path, capsys
):
    words = words_of(tiny_llama, data, {**TRAINING, "save_steps": 100}, max_steps=5)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"

    def interrupt(trainer, model):
        if trainer.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)

    with watching(before=interrupt):
        assert cli.main([*words, str(stopped)]) == 130
    assert "Stopped after 3 steps" in capsys.readouterr().err
    assert not stopped.exists()
    assert cli.main([*words, str(whole)]) == 0
    assert cli.main([*words, str(stopped), "--resume"]) == 0
    assert_same(stopped, whole)


def test_the_teacher_shares_what_stays_as_it_is(tiny_llama, data, tmp_path):
    own: set[str] = set()

    def compare(trainer, model):
        storages = {p.data_ptr() for p in model.parameters()}
        named = trainer._teacher.named_parameters()
        own.update(name for name, p in named if p.data_ptr() not in storages)

    options = {"max_steps": 1, "teacher_weight": 1.0}
    with watching(before=compare):
        healed(tiny_llama, data, tmp_path / "a", **options)
        assert own
        assert all(".mlp." in name for name in own)
        healed(tiny_llama, data, tmp_path / "b", method="full", **options)
        assert "model.embed_tokens.weight" in own


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


@pytest.mark.slow
def test_two_processes_take_the_step_that_one_takes(tiny_llama, data, tmp_path):
    def words(batch: int) -> list[str]:
        each = {**TRAINING, "optim": "sgd", "per_device_train_batch_size": batch}
        return words_of(tiny_llama, data, each, max_steps=2, teacher_weight=0.5)

    several, one = tmp_path / "several", tmp_path / "one"
    module = ("-m", "lm_eval_pruned.cli", *words(2), several)
    ended = evaluations.run(
        [*evaluations.TWO_PROCESSES, *module], check=True, ACCELERATE_USE_CPU="true"
    )
    assert ended.stdout.count("Trained 2 steps on 256 tokens") == 1
    assert cli.main([*words(4), str(one)]) == 0
    assert_same(several, one, rtol=1.3e-6, atol=1e-5)


def test_text_of_other_forms_and_bf16(tiny_llama, data, tmp_path):
    plain, chat = tmp_path / "plain.txt", tmp_path / "chat.jsonl"
    plain.write_text("\n".join(TEXTS))
    messages = [{"role": "user", "content": each} for each in TEXTS]
    chat.write_text(json.dumps({"messages": messages}))
    letters = sum(map(len, TEXTS))
    more = {plain: len(TEXTS) - 1 + 1, chat: len("<user>\n") * len(TEXTS) + 1}
    options = {"max_steps": 1, "training_args": {**TRAINING, "bf16": True}}
    for file, added in more.items():
        found = healed(tiny_llama, str(file), tmp_path / file.stem, **options)
        assert found.record["data"]["tokens"] == (letters + added) // 32 * 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data nowhere.jsonl", "data=nowhere.jsonl cannot be read"),
        ("--teacher_weight 2", "teacher_weight=2.0 is not a share"),
        ("--temperature 2", "temperature=2.0 has no effect"),
        ("--teacher_weight 1 --temperature 0", "temperature=0.0 is not a dist"),
        ("--max_length 500", "needs blocks"),
        ("--max_length 5000", "the 512 positions of the model: pass at most 512."),
        ("--training_args learning_rte=1", "learning_rte"),
        ("--training_args max_steps=3", "other options of heal set"),
        ("--method full --peft_args r=3", "method=full trains none"),
        ("--resume", "resume continues from a checkpoint"),
        ("--output_path .", "output=. exists"),
        ("--model_args pretrained=TINY,load_in_8bit=true", "quantised weights"),
        ("--model_args pretrained=TINY,peft=x", "model_args has peft=x"),
        ("--model_args pretrained=TINY --teacher_weight 1", "teach itself"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(
    words, message, tiny_llama, tmp_path, monkeypatch, capsys
):
    # A call would be a TypeError.
    monkeypatch.setattr("lm_eval_pruned.checkpoints.request.LoadRequest.load", None)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "Not 500 tokens of text."}))
    command = [
        *words_of(tiny_llama, str(file), {"use_cpu": True}),
        str(tmp_path / "out"),
    ]
    command += words.replace("TINY", str(tiny_llama)).split()
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "dora"}, "method=lora, but this one has method=dora"),
        ({"teacher_weight": 0.5}, "teacher=None, but this one has teacher="),
        ({"size": {"criterion": "l2", **KEPT}}, "with kept_digest="),
        ({"size": SOLVED}, "repair=None, but .* repair=least_squares"),
        ({"resume": False}, "holds checkpoints of a healing: add --resume"),
    ],
)
def test_another_healing_is_not_resumed(
    tiny_llama, data, tmp_path, changed, message, monkeypatch
):
    healed(tiny_llama, data, tmp_path / "healed", max_steps=2)
    (tmp_path / "healed").rename(tmp_path / "moved")
    if changed.get("size") == SOLVED:
        changed = {"size": {**SOLVED, "calibration": data}}
    elif "size" not in changed:
        # Which neurons are kept is known once the model is pruned, all else before.
        monkeypatch.delattr("lm_eval_pruned.healing.run.load_request")
    with pytest.raises(ValueError, match=message):
        healed(tiny_llama, data, tmp_path / "healed", **{"resume": True, **changed})
