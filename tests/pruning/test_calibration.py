"""What neurons do on calibration text; the criteria that use it are in `test_loading_contract`."""

from __future__ import annotations

import copy
import json
import sys
import threading

import pytest
import torch
from hypothesis import given, strategies as st

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning import calibration
from lm_eval_pruned.pruning.calibration import calibrate, progress_bar
from lm_eval_pruned.pruning.calibration_text import TextSource, read_texts
from lm_eval_pruned.pruning.criteria import ACTIVITY, CALIBRATED, OBS
from tests.helpers import checkpoints
from tests.helpers.checkpoints import byte_tokenizer
from tests.helpers.ways_to_load import TEXTS, write_texts


@pytest.fixture
def text(tmp_path):
    return write_texts(tmp_path / "texts.jsonl")


def kept_by(folder, text, criterion="act", **asked):
    asked = {"ratio": 1, "criterion": criterion, "calibration": text, **asked}
    return load_pruned(str(folder), **asked).prune_record


def test_prune_model_observes_the_model_it_gets_and_leaves_no_hook(tiny_llama, text):
    asked = {"criterion": "act", "calibration": text, "calibration_samples": 2}
    model = load_pruned(str(tiny_llama)).train()
    pruned = prune_model(model, ratio=2, tokenizer=byte_tokenizer(), **asked)
    assert pruned.training
    assert not any(module._forward_hooks for module in pruned.modules())
    record = pruned.prune_record.as_dict()["calibration"]
    tokens = sum(len(each.encode()) for each in TEXTS[:2])
    assert (record["texts"], record["tokens"]) == (2, tokens)
    assert record["file"] == "texts.jsonl" and len(record["sha256"]) == 64
    assert json.dumps(record)


def test_chats_go_through_the_template(tiny_llama, tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    model, tokenizer, file = load_pruned(str(tiny_llama)), byte_tokenizer(), "a.jsonl"
    file = tmp_path / file
    file.write_text(json.dumps({"messages": chat}) + "\n\n")
    before = TextSource(str(file)).read(model, tokenizer)
    observed = calibrate(model, before.tokens)
    write_texts(file, [tokenizer.apply_chat_template(chat, tokenize=False)])
    after = TextSource(str(file)).read(model, tokenizer)
    again = calibrate(model, after.tokens)
    assert before.as_dict()["tokens"] == after.as_dict()["tokens"]
    for name, norms in observed.items():
        assert torch.equal(norms[0], again[name][0])


def test_long_texts_are_cut_at_the_models_positions(tmp_path, text):
    folder = checkpoints.save_tiny(tmp_path / "model", max_position_embeddings=8)
    found = kept_by(folder, text).calibration
    assert found["tokens"] == 8 * len(TEXTS)


# `obs` draws tokens in the order of the texts, of which it takes as many as it needs.
@pytest.mark.parametrize("criterion", sorted({*CALIBRATED} - {OBS}))
def test_scores_do_not_depend_on_the_order_of_texts(
    tiny_llama, tmp_path, text, criterion
):
    backwards = write_texts(tmp_path / "backwards.jsonl", TEXTS[::-1])
    one, other = (kept_by(tiny_llama, file, criterion) for file in (text, backwards))
    assert one.digest == other.digest


@given(silent=st.sets(st.integers(0, 87), min_size=1, max_size=60))
def test_silent_neurons_go_first(tiny_llama, tmp_path_factory, silent):
    file = write_texts(tmp_path_factory.mktemp("texts") / "t.jsonl", TEXTS[:1])
    model = load_pruned(str(tiny_llama))
    # gate = 0 makes silu(gate) * up = 0, whatever up and down are.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[sorted(silent)] = 0
            layer.mlp.up_proj.weight[sorted(silent)] *= 100
    asked = {"intermediate_size": 88 - len(silent), "calibration": file}
    asked["tokenizer"] = byte_tokenizer()
    for criterion in ACTIVITY:
        observed = prune_model(copy.deepcopy(model), criterion=criterion, **asked)
        for kept in observed.prune_record.kept:
            assert not silent & set(kept.tolist())


def test_overflowing_activations_are_named(tiny_llama, text):
    model = load_pruned(str(tiny_llama))
    with torch.no_grad():
        for weight in model.model.layers[1].mlp.parameters():
            weight *= 1e30
    asked = {"ratio": 2, "criterion": "act", "calibration": text}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp produce NaN or infinite"):
        prune_model(model, tokenizer=byte_tokenizer(), **asked)
    assert model.config.intermediate_size == 88


def test_samples_are_the_first_lines(text):
    assert read_texts(text, 2) == [*TEXTS[:2]]
    assert read_texts(text) == [*TEXTS]


def test_the_clock_of_a_bar_goes_on_while_a_layer_takes_long(monkeypatch, capsys):
    again = threading.Event()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(calibration, "_TICK", 0)
    with progress_bar(2, "repair", [torch.ones(1, 1200)], "layer") as bar:
        redraw = bar.refresh
        monkeypatch.setattr(bar, "refresh", lambda: (redraw(), again.set()))
        assert again.wait(60)
    assert "repair, 1,200 tokens:   0%" in (seen := capsys.readouterr().err)
    assert seen.count("0/2 [") > 1
    assert "layer/s]" in seen


def test_a_bar_shows_nothing_where_no_one_looks(capsys):
    with progress_bar(2, "repair", [torch.ones(1, 1200)]) as bar:
        bar.update()
    assert capsys.readouterr().err == ""
