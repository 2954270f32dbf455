"""What docs/healing.md promises of ``heal``."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from subprocess import DEVNULL, Popen

import pytest
import torch
from lm_eval.api.registry import get_model
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import load_pruned
from tests.contract.commands import lm_eval, pruned
from tests.helpers import evaluations
from tests.helpers.checkpoints import copy_without_weights
from tests.helpers.layouts import logits
from tests.helpers.sweeping import write_tasks
from tests.helpers.ways_to_load import write_texts
from tests.sweeps.conftest import quick  # noqa: F401


TEXTS = [f"The tide of day {n} comes in twice, and goes out twice." for n in range(12)]
TRAINING = (
    "per_device_train_batch_size=2,use_cpu=true,disable_tqdm=true,learning_rate=1e-2,"
    "save_steps=2,bf16=false"
)
SIZE = "prune_percent=40"


def trained_on(tokens):
    """Return how many tokens are left of whole blocks of 32 when one in 24 is held."""
    blocks = tokens // 32
    return (blocks - math.ceil(blocks / 24)) * 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "data.jsonl", TEXTS)


@pytest.fixture(scope="module")
def words_of(tiny_llama, data):
    """Return the words of a command that trains 4 steps on 64 tokens each."""

    def words_of(output, *more, size=SIZE, text=data, training=TRAINING):
        model_args = f"pretrained={tiny_llama}" + f",{size}" * bool(size)
        words = ["heal", "--model_args", model_args, "--data", text]
        words += ["--method", "lora", "--teacher_weight", 0]
        words += ["--max_length", 32, "--max_steps", 4, "--training_args", training]
        return [*words, "--output_path", output, *more]

    return words_of


@pytest.fixture(scope="module")
def healed(words_of):
    """Return a function that runs that command."""
    return lambda *words, **named: pruned(*words_of(*words, **named))


@pytest.fixture(
    scope="module", params=["lora", pytest.param("dora", marks=pytest.mark.slow)]
)
def adapter(request, healed, tmp_path_factory):
    """An adapter, and the checkpoint with it merged."""
    output = tmp_path_factory.mktemp(request.param) / "healed"
    done = healed(output, "--method", request.param, "--merge")
    assert done.code == 0, done.err
    assert f"Trained 4 steps on 256 tokens; wrote {output}." in done.out
    return output


@pytest.fixture(scope="module")
def record(adapter):
    return json.loads((adapter / "healing.json").read_text())


@pytest.fixture(scope="module")
def evaluated(tiny_llama):
    """Return a function that loads ``pruned-hf`` with an adapter."""

    def evaluated(adapter, **more):
        cls, more = get_model("pruned-hf"), {"prune_percent": 40, **more}
        return cls(str(tiny_llama), device="cpu", peft=str(adapter), **more)

    return evaluated


def assert_same_weights(found, expected, rtol=0.0, atol=0.0):
    ours, theirs = (
        load_file(next(folder.glob("*model.safetensors")))
        for folder in (found, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


# --- the adapter and its record


def test_the_adapter_is_applied_and_merged(adapter, record, evaluated, tiny_llama):
    whole = load_pruned(str(tiny_llama), prune_percent=40)
    plain = logits(whole)
    parts = whole.named_modules()
    linear = {n.rpartition(".")[2] for n, m in parts if isinstance(m, torch.nn.Linear)}
    applied = logits(PeftModel.from_pretrained(whole, adapter).eval())
    assert not torch.allclose(plain, applied, atol=1e-2)
    model = evaluated(adapter)
    found = logits(model.model)
    torch.testing.assert_close(found, applied[..., : found.shape[-1]])
    # The results file holds the record.
    info = model.get_model_info()
    assert record == info["healing"] | {"pruning": info["pruning"]}
    merged = AutoModelForCausalLM.from_pretrained(adapter / "merged")
    # Rank 16 at every linear layer but the head.
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], {*config["target_modules"]}) == (16, linear - {"lm_head"})
    # Merging rounds.
    torch.testing.assert_close(logits(merged), applied, atol=1e-4, rtol=1e-4)
    assert len(AutoTokenizer.from_pretrained(adapter / "merged")) == 259
    assert "was then trained on" in (adapter / "merged" / "README.md").read_text()


def test_a_cut_is_compared_with_the_same_cut_after_training(
    adapter, tiny_llama, tmp_path
):
    made = ("--include_path", write_tasks(tmp_path / "tasks"), "--device", "cpu")
    swept = pruned(
        *("sweep", "--model_args", f"pretrained={tiny_llama}"),
        *("--prune_percents", 40, "--floors", "no", "--tasks", "tiny_choice", *made),
        *("--output_path", tmp_path / "sweep"),
    )
    model_args = f"pretrained={tiny_llama},{SIZE},peft={adapter}"
    after = lm_eval(
        *("run", "--model", "pruned-hf", "--model_args", model_args, *made),
        *("--tasks", "tiny_choice", "--log_samples", "--output_path", tmp_path / "b"),
    )
    assert (swept.code, after.code) == (0, 0)
    for before in ("prune_percent-40", "baseline"):
        unit = tmp_path / "sweep" / "units" / before
        done = pruned("compare", unit, tmp_path / "b", "--format", "json")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        (row,) = found["rows"]
        assert (found["base"], row["documents"]) == (before, 4)
        # The adapter moves the probabilities of answers.
        assert row["answers"]["kl"] > 0


def test_the_record_says_what_was_pruned_trained_and_spent(record, data, tiny_llama):
    whole = load_pruned(str(tiny_llama), prune_percent=40).prune_record
    assert record["pruning"] == whole.as_dict()
    assert record["pruning"]["kept_digest"] == whole.digest
    with open(data, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    # The texts are joined with one token of end of text each, and cut into blocks of 32.
    tokens = trained_on(sum(map(len, TEXTS)) + len(TEXTS))
    assert record["data"] == {
        "file": "data.jsonl",
        "sha256": digest,
        "texts": len(TEXTS),
        "tokens": tokens,
        "limit": None,
        "held": "one block in 24",
    }
    assert record["method"] in ("lora", "dora")
    assert record["teacher"] is None
    assert record["training_args"]["learning_rate"] == 1e-2
    assert (record["steps"], record["tokens_seen"]) == (4, 4 * 2 * 32)
    assert record["seconds"] > 0


def test_an_adapter_comes_with_a_readme(adapter, record, tiny_llama):
    card = (adapter / "README.md").read_text()
    digest = record["pruning"]["kept_digest"][:12]
    for words in ("53 neurons per MLP", digest, "256 tokens of data.jsonl"):
        assert words in card
    # Not the folder of this machine, and not peft's empty template.
    assert str(tiny_llama) not in card
    assert "More Information Needed" not in card


def test_an_adapter_of_other_neurons_is_refused_even_at_the_same_width(
    adapter, evaluated, data, tmp_path
):
    with pytest.raises(ValueError, match=r"peft=.*was trained on .*the kept set"):
        evaluated(adapter, criterion="l2")
    with pytest.raises(ValueError, match=r"peft=.*repair"):
        evaluated(adapter, repair="least_squares", calibration=data)
    # Without the record, only widths are checked.
    for file in adapter.glob("adapter*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert evaluated(tmp_path, criterion="l2").get_model_info()["pruning"]
    with pytest.raises(ValueError, match="peft="):
        evaluated(tmp_path, prune_percent=20)
    (tmp_path / "healing.json").write_text("{}")
    with pytest.raises(ValueError, match=r"healing\.json is not a healing record"):
        evaluated(tmp_path, criterion="l2")


def test_without_a_recipe_heal_trains_the_study_s_cut(record, tiny_llama):
    cut = load_pruned(str(tiny_llama), prune_percent=40, criterion="maw").prune_record
    assert record["pruning"]["kept_digest"] == cut.digest


PLAIN = "use_cpu=true,disable_tqdm=true"


def trained_by_default(folder, learning_rate):
    """Assert what the page says of a training of which nothing was asked; return its record."""
    record = json.loads((folder / "healing.json").read_text())
    found = record["training_args"]
    assert (found["learning_rate"], found["lr_scheduler_type"]) == (
        learning_rate,
        "cosine",
    )
    assert (found["warmup_steps"], found["num_train_epochs"]) == (0.03, 1)
    names = ("logging_steps", "save_steps", "per_device_train_batch_size")
    assert [found[name] for name in names] == [10, 0.2, 2]
    return record


def test_full_writes_an_ordinary_checkpoint(healed, tmp_path):
    output = tmp_path / "healed"
    more = ("--method", "full", "--max_steps", 1)
    assert healed(output, *more, training=PLAIN).code == 0
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.intermediate_size == 53
    assert not (output / "adapter_config.json").exists()
    trained_by_default(output, 2e-5)


def test_by_default_it_distils_the_mlps_on_the_text_of_the_package(
    tiny_llama, tmp_path
):
    words = ("heal", "--model_args", f"pretrained={tiny_llama},{SIZE}")
    output = tmp_path / "healed"
    done = pruned(*words, "--max_steps", 1, "--output_path", output)
    assert done.code == 0, done.err
    record = trained_by_default(output, 3e-4)
    assert record["teacher"] == {"weight": 1.0, "temperature": 1.0}
    assert record["data"]["file"] == "the text of lm-eval-pruned"
    assert (record["method"], record["max_length"]) == ("mlp", 256)
    assert AutoModelForCausalLM.from_pretrained(output)


def test_text_is_json_lines_of_texts_or_chats_or_a_plain_file(healed, tmp_path):
    plain, chats = tmp_path / "plain.txt", tmp_path / "chats.jsonl"
    plain.write_text("\n".join(TEXTS))
    messages = [{"role": "user", "content": text} for text in TEXTS]
    chats.write_text(json.dumps({"messages": messages}))
    letters = sum(map(len, TEXTS))
    added = {plain: len(TEXTS) - 1 + 1, chats: len("<user>\n") * len(TEXTS) + 1}
    for file, more in added.items():
        output = tmp_path / file.stem
        bf16 = f"{PLAIN},bf16=true"
        assert healed(output, "--max_steps", 1, text=file, training=bf16).code == 0
        found = trained_by_default(output, 2e-4)
        assert found["data"]["tokens"] == trained_on(letters + more)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--data nowhere.jsonl",
            "data=nowhere.jsonl is not a file: pass JSON Lines, a .txt file",
        ),
        ("--teacher_weight 2", "teacher_weight=2.0 is not a share"),
        ("--teacher_weight 0 --temperature 2", "temperature=2.0 has no effect"),
        ("--teacher_weight 1 --temperature 0", "temperature=0.0 is not a dist"),
        ("--max_length 500", "takes at least two blocks of max_length=500"),
        ("--max_length 5000", "the 512 positions of the model: pass at most 512."),
        ("--training_args learning_rte=1", "learning_rte"),
        ("--training_args max_steps=3", "other options of heal set"),
        ("--method full --peft_args r=3", "method=full trains none"),
        ("--method full --merge", "method=full trains none"),
        ("--resume", "resume continues from a checkpoint"),
        ("--output_path .", "output_path=. exists"),
        ("--model_args pretrained=TINY,load_in_8bit=true", "quantised weights"),
        ("--model_args pretrained=TINY,peft=x", "model_args has peft=x"),
        ("--model_args pretrained=TINY --teacher_weight 1", "teach itself"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(
    words, message, healed, tiny_llama, tmp_path, monkeypatch
):
    bare = copy_without_weights(tiny_llama, tmp_path / "bare")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "Not 500 tokens of text."}))
    model = ("--model_args", f"pretrained={bare},{SIZE}")
    more = words.replace("TINY", str(bare)).split()
    done = healed(tmp_path / "out", *model, *more, text=file, training="use_cpu=true")
    assert message in done.sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_launcher_trains_on_several_devices(words_of, tmp_path):
    """Two processes take the step that one takes with the rows of both."""

    def words(output, rows, more=""):
        training = f"{PLAIN},learning_rate=1e-2,optim=sgd{more}"
        training += f",per_device_train_batch_size={rows}"
        steps = ("--max_steps", 2, "--teacher_weight", 0.5)
        return words_of(output, *steps, training=training)

    several, one = tmp_path / "several", tmp_path / "one"
    command = [*evaluations.TWO_PROCESSES, "-m", "lm_eval_pruned.cli"]
    command += words(several, 2, ",ddp_backend=gloo")
    launched = evaluations.run(command, check=True)
    assert launched.stdout.count("Trained 2 steps on 256 tokens") == 1
    assert pruned(*words(one, 4)).code == 0
    assert_same_weights(several, one, rtol=1.3e-6, atol=1e-5)


# --- stop and resume


def test_another_healing_is_not_resumed(healed, data, tmp_path):
    healing = tmp_path / "healed"
    assert healed(healing).code == 0
    checkpoints = sorted(p.name for p in tmp_path.glob("healed.checkpoints/c*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    healing.rename(tmp_path / "moved")
    other = write_texts(tmp_path / "data.jsonl", TEXTS[1:])
    repaired = f"{SIZE},repair=least_squares,calibration={data}"
    for words, named, message in (
        (("--method", "dora"), {}, "method=lora, but this one has method=dora"),
        (("--teacher_weight", 0.5), {}, "teacher=None, but this one has teacher="),
        ((), {"text": other}, "with data="),
        ((), {"size": f"{SIZE},criterion=l2"}, "kept_digest="),
        ((), {"size": repaired}, "repair=None, but this one has repair=least_squares"),
    ):
        assert message in healed(healing, *words, "--resume", **named).sentence
    assert "holds checkpoints of a training: add --resume" in healed(healing).sentence
    # The pickle of transformers is never read. The last checkpoint has nothing left to train.
    for file in tmp_path.glob("healed.checkpoints/*/training_args.bin"):
        file.write_bytes(b"no pickle")
    assert healed(healing, "--resume").code == 0
    assert_same_weights(healing, tmp_path / "moved")


def wait_for_a_checkpoint(output):
    """Return when the first checkpoint is complete; the training goes on for many steps."""
    checkpoint = output.with_name(f"{output.name}.checkpoints") / "checkpoint-2"
    while not (checkpoint / "healing.json").exists():
        time.sleep(0.002)


LONG = ("--max_steps", 30, "--teacher_weight", 0.5)


@pytest.fixture(scope="module")
def uninterrupted(healed, tmp_path_factory):
    """The adapter of an uninterrupted run of many steps."""
    output = tmp_path_factory.mktemp("whole") / "healed"
    assert healed(output, *LONG).code == 0
    return output


def test_ctrl_c_keeps_the_best_so_far_and_resume_goes_on(
    healed, uninterrupted, tmp_path
):
    output = tmp_path / "healed"
    # Where tests run side by side, their processes ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt():
        wait_for_a_checkpoint(output)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        stopped = healed(output, *LONG)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.code == 130
    assert json.loads((output / "healing.json").read_text())["interrupted"]
    assert healed(output, *LONG, "--resume").code == 0
    assert_same_weights(output, uninterrupted)


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_weights_of_an_uninterrupted_run(
    healed, words_of, uninterrupted, tmp_path
):
    output = tmp_path / "healed"
    command = [sys.executable, "-m", "lm_eval_pruned.cli", *words_of(output, *LONG)]
    running = Popen([*map(str, command)], stdout=DEVNULL, stderr=DEVNULL)
    wait_for_a_checkpoint(output)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    assert not output.exists()
    assert healed(output, *LONG, "--resume").code == 0
    assert_same_weights(output, uninterrupted)
