"""What docs/healing.md promises of ``prune --distil``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned
from tests.contract.commands import in_a_terminal, pruned
from tests.helpers.checkpoints import copy_without_weights
from tests.helpers.ways_to_load import write_texts


#: Of the package's text, 2,000 tokens are seven blocks to train on.
SHORT = ("--distil", "2k")


def distil(tiny, output, *words, budget=SHORT, percent=40):
    command = ("prune", "--model_args", f"pretrained={tiny}", "--recipe", "study")
    command += ("--prune_percent", percent, "--output_path", output)
    threads = torch.get_num_threads()
    # The number decides how sums round.
    torch.set_num_threads(1)
    try:
        return pruned(*command, *budget, *words)
    finally:
        torch.set_num_threads(threads)


def record_of(folder):
    return json.loads((folder / "healing.json").read_text())


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def distilled(tiny_llama, tmp_path_factory):
    """What the command wrote and said."""
    output = tmp_path_factory.mktemp("distilled") / "out"
    done = distil(tiny_llama, output)
    assert done.code == 0, done.err
    return output, done


def test_one_command_cuts_distils_and_writes_an_ordinary_checkpoint(
    distilled, tiny_llama
):
    output, done = distilled
    model = AutoModelForCausalLM.from_pretrained(output)
    cut = load_pruned(str(tiny_llama), prune_percent=40, recipe="study")
    assert model.config.intermediate_size == cut.config.intermediate_size == 53
    assert model.dtype == cut.dtype
    trained, before = model.state_dict(), cut.state_dict()
    assert trained.keys() == before.keys()
    moved = {name for name in trained if not torch.equal(trained[name], before[name])}
    assert moved == {name for name in trained if ".mlp." in name}
    assert "||unpruned|pruned|distilled|" in done.out
    for said in (
        "Distilled 3 steps, 1,536 tokens",
        "divergence from the unpruned model",
    ):
        assert said in done.out
    assert f"{output}.checkpoints holds its checkpoints" in done.out
    card = (output / "README.md").read_text()
    assert "distilled from the unpruned model on 1,536 tokens of the text of" in card


def test_the_record_says_text_tokens_steps_seconds_and_divergence(distilled):
    record = record_of(distilled[0])
    assert record["data"]["file"] == "the text of lm-eval-pruned"
    assert len(record["data"]["sha256"]) == 64
    assert (record["data"]["tokens"], record["data"]["limit"]) == (7 * 256, 2000)
    assert record["data"]["held"] == "the package's"
    assert (record["steps"], record["planned_steps"]) == (3, 3)
    assert record["tokens_seen"] == 3 * 512
    assert record["seconds"] > 0
    losses = record["held_loss"]
    assert 0 < losses["after"] <= losses["before"]
    assert (record["method"], record["interrupted"]) == ("mlp", False)
    assert record["teacher"] == {"weight": 1.0, "temperature": 1.0}


def test_a_digest_tells_whether_two_runs_were_asked_for_the_same(
    distilled, tiny_llama, tmp_path
):
    digest = record_of(distilled[0])["digest"]
    same, other = tmp_path / "same", tmp_path / "other"
    assert distil(tiny_llama, same).code == 0
    assert distil(tiny_llama, other, percent=20).code == 0
    assert record_of(same)["digest"] == digest != record_of(other)["digest"]
    torch.testing.assert_close(weights(same), weights(distilled[0]))


def test_a_time_becomes_a_number_of_steps(tiny_llama, tmp_path):
    done = distil(tiny_llama, tmp_path / "out", budget=("--distil", "1s"))
    assert done.code == 0, done.err
    record = record_of(tmp_path / "out")
    assert record["steps"] == record["planned_steps"] >= 1


def test_text_of_your_own_is_added(distilled, tiny_llama, tmp_path):
    own = write_texts(tmp_path / "own.jsonl", ["The tide comes in. " * 40] * 3)
    done = distil(tiny_llama, tmp_path / "out", "--text", own)
    assert done.code == 0, done.err
    record, before = record_of(tmp_path / "out"), record_of(distilled[0])
    assert record["data"]["file"] == "the text of lm-eval-pruned,own.jsonl"
    assert record["data"]["texts"] == before["data"]["texts"] + 3
    assert record["digest"] != before["digest"]


def test_training_lowers_the_divergence_from_the_unpruned_model(tiny_llama, tmp_path):
    assert distil(tiny_llama, tmp_path / "out", budget=("--distil", "40k")).code == 0
    losses = record_of(tmp_path / "out")["held_loss"]
    assert losses["after"] < 0.95 * losses["before"]


def test_a_bar_shows_steps_time_left_and_the_loss_on_held_text(tiny_llama, tmp_path):
    words = ("prune", "--model_args", f"pretrained={tiny_llama}", "--recipe", "study")
    words += ("--prune_percent", 40, "--output_path", tmp_path / "out")
    shown = in_a_terminal(*words, *SHORT, stream=contextlib.redirect_stderr)
    assert re.search(r"training:.* 3/3 \[\d\d:\d\d<\d\d:\d\d, .*step", shown)
    assert re.search(r"\d\.\d{3} nats on held text", shown)
    assert "unpruned model reads text" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--distil 20x", "distil=20x is neither a time nor a number of tokens"),
        ("--distil 0m", "distil=0m is neither"),
        (
            "--text nowhere.jsonl",
            "text=nowhere.jsonl is not a file: pass JSON Lines, a .txt file",
        ),
        ("--resume", "resume continues from a checkpoint"),
        ("--output_path .", "output_path=. exists"),
    ],
)
def test_what_is_refused_before_a_weight_is_read(
    words, message, tiny_llama, tmp_path, monkeypatch
):
    bare = copy_without_weights(tiny_llama, tmp_path / "bare")
    monkeypatch.chdir(tmp_path)
    done = distil(bare, tmp_path / "out", *words.split())
    assert message in done.sentence
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


@pytest.mark.parametrize("words", [("--text", "x.jsonl"), ("--resume",)])
def test_options_of_a_distillation_without_one_are_named(words, tiny_llama, tmp_path):
    done = distil(tiny_llama, tmp_path / "out", *words, budget=())
    assert "add --distil" in done.sentence


def test_a_disk_that_fills_up_ends_in_one_sentence(tiny_llama, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        done = distil(tiny_llama, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in done.sentence
    assert not (tmp_path / "out").exists()


LONG = ("--distil", "30k")


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    assert distil(tiny_llama, output, budget=LONG).code == 0
    return output


def interrupted(run, folder):
    """Press Ctrl-C when the first checkpoint of a command is complete."""
    # Where tests run side by side, their processes ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press():
        while not [*folder.glob("checkpoint-*/healing.json")]:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    try:
        return run()
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_the_best_so_far_and_resume_ends_as_if_nothing_had_happened(
    tiny_llama, uninterrupted, tmp_path
):
    output = tmp_path / "out"
    stopped = interrupted(
        lambda: distil(tiny_llama, output, budget=LONG), tmp_path / "out.checkpoints"
    )
    assert stopped.code == 130
    assert "goes on" in stopped.out
    early = record_of(output)
    assert early["interrupted"]
    assert 0 < early["steps"] < early["planned_steps"] == 58
    AutoModelForCausalLM.from_pretrained(output)
    # It is not another training's.
    refused = distil(tiny_llama, output, "--resume", budget=LONG, percent=20)
    assert "comes from a training with kept_digest=" in refused.sentence
    assert record_of(output) == early
    done = distil(tiny_llama, output, "--resume", budget=LONG)
    assert done.code == 0, done.err
    record, whole = record_of(output), record_of(uninterrupted)
    assert not record["interrupted"]
    assert record["steps"] == whole["steps"]
    assert record["digest"] == whole["digest"]
    torch.testing.assert_close(weights(output), weights(uninterrupted), rtol=0, atol=0)
