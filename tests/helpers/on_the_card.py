"""Loading, pruning and calibrating for a device that is not the CPU, in a process of its own.

`tests.checkpoints.test_devices` runs these tests; ``python -m pytest tests/helpers/on_the_card.py`` does so alone.
"""

from __future__ import annotations

import contextlib
import gc
import json

import pytest
import torch

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning import staging
from lm_eval_pruned.pruning.calibration import calibrate
from tests.helpers import simulated_card as card
from tests.helpers.checkpoints import (
    auto_class,
    byte_tokenizer,
    tiny_config,
    tiny_model,
)
from tests.helpers.layouts import FAMILIES, logits, overrides, save_family


#: One of each way to store gate, up and down.
LAYOUTS = ("llama", "phi3", "mixtral", "granitemoeshared", "gpt_oss", "llama4_text")


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.fixture
def asynchronous(monkeypatch):
    """Let the card fetch pinned memory on its own, in blocks of a few rows."""
    monkeypatch.setattr(staging, "fetches_on_its_own", lambda d: d.type == "card")
    monkeypatch.setattr(
        staging,
        "new_block",
        lambda shape, dtype, pinned: torch.empty(shape, dtype=dtype),
    )
    monkeypatch.setattr(staging, "mark", lambda device: card.Event())
    monkeypatch.setattr(staging, "BLOCK_BYTES", 1 << 10)


def assert_same_on_the_card(model, expected):
    names = dict(expected.named_parameters())
    assert {p.device.type for p in model.parameters()} == {"card"}
    assert {b.device.type for b in model.buffers()} <= {"card"}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == names[name].dtype, name
        assert torch.equal(parameter.cpu(), names[name]), name
    assert model.prune_record.digest == expected.prune_record.digest


def test_the_card_refuses_what_cuda_refuses():
    here, there = torch.ones(3), torch.ones(3, device="card")
    for mix in (lambda: here + there, lambda: torch.cat([here, there])):
        with pytest.raises(RuntimeError, match=r"mixes|same device"):
            mix()
    assert torch.equal((there + there.sum()).cpu(), torch.full((3,), 4.0))
    before = card.held_bytes()
    more = torch.zeros(100, device="card")
    assert card.held_bytes() == before + 400
    del more
    assert card.held_bytes() == before


@pytest.mark.parametrize(
    ("family", "criterion"),
    [
        *((family, "maw") for family in FAMILIES),
        *((family, criterion) for family in LAYOUTS for criterion in ("l2", "random")),
    ],
)
def test_loading_moves_what_is_kept_and_nothing_else(family, criterion, tmp_path):
    width = 48 if criterion == "maw" else 40
    save_family(tmp_path, family, 64)
    arguments = {
        "intermediate_size": width,
        "criterion": criterion,
        "auto_class": auto_class(tiny_config(family)),
        "experts_implementation": "eager",
    }
    # Of the tests before.
    gc.collect()
    before = card.held_bytes()
    card.forget_peak()
    model = load_pruned(str(tmp_path), device="card", **arguments)
    peak = card.peak_bytes() - before
    held = size([*model.parameters(), *model.buffers()])
    assert card.held_bytes() - before == held
    # No layer is there twice, not even one whose experts were stored one by one.
    assert peak == held
    expected = load_pruned(str(tmp_path), **arguments)
    assert_same_on_the_card(model, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", LAYOUTS)
def test_blocks_are_not_written_to_before_they_are_fetched(
    family, stored, dtype, tmp_path, asynchronous
):
    config = tiny_config(family, **overrides(family, 64))
    tiny_model(config).to(stored).save_pretrained(tmp_path)
    arguments = {"intermediate_size": 56, "dtype": dtype, "layers": "0"}
    if family not in ("llama", "phi3"):
        del arguments["layers"]
    model = load_pruned(str(tmp_path), device="card", **arguments)
    assert_same_on_the_card(model, load_pruned(str(tmp_path), **arguments))


def test_nobody_waits_in_vain(tiny_llama, asynchronous, monkeypatch):
    # Without waiting, the simulated card reads blocks that were filled anew.
    monkeypatch.setattr(card.Event, "synchronize", lambda self: None)
    model = load_pruned(str(tiny_llama), ratio=1, device="card")
    with pytest.raises(AssertionError):
        assert_same_on_the_card(model, load_pruned(str(tiny_llama), ratio=1))


def test_only_the_narrower_dtype_crosses(tiny_llama, monkeypatch, asynchronous):
    sent = []
    run = card._copy

    def watched(target, source, non_blocking=False):
        # transformers waits for what it sends.
        if non_blocking:
            sent.append(size([source]))
        return run(target, source, non_blocking)

    monkeypatch.setattr(card, "_copy", watched)
    for target, item in ((torch.bfloat16, 2), (torch.float32, 4), (torch.float64, 4)):
        sent.clear()
        load_pruned(str(tiny_llama), ratio=1, device="card", dtype=target)
        # Three layers of gate, up and down with 32 of 88 neurons.
        assert sum(sent) == 3 * 3 * 32 * 32 * item


@pytest.mark.parametrize("criterion", ["maw", "max_abs", "l2", "vow", "random"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_pruning_in_memory_stays_on_the_card(family, criterion, tmp_path):
    whole = save_family(tmp_path, family, 64)
    expected = prune_model(whole, intermediate_size=40, criterion=criterion)
    model = auto_class(whole.config).from_pretrained(
        tmp_path, device_map={"": "card"}, experts_implementation="eager"
    )
    prune_model(model, intermediate_size=40, criterion=criterion)
    assert_same_on_the_card(model, expected)


@pytest.mark.parametrize("criterion", ["maw_act", "act"])
@pytest.mark.parametrize("route", ["load", "prune"])
def test_calibration_runs_where_the_model_is(criterion, route, tiny_llama, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for t in ("one two", "three")))
    arguments = {"ratio": 1, "criterion": criterion, "calibration": str(text)}
    expected = load_pruned(str(tiny_llama), **arguments)
    if route == "load":
        model = load_pruned(str(tiny_llama), device="card", **arguments)
    else:
        model = load_pruned(str(tiny_llama), device="card")
        prune_model(model, tokenizer=byte_tokenizer(), **arguments)
    assert_same_on_the_card(model, expected)


@pytest.mark.parametrize("criterion", ["act", "maw_act"])
def test_observing_holds_the_pruned_model_and_one_layer_at_most(criterion, tmp_path):
    wide = {"intermediate_size": 1024, "num_hidden_layers": 8}
    model = tiny_model(tiny_config("llama", **wide))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    full, layer = size(model.parameters()), size(model.model.layers[0].parameters())
    del model
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": t}) for t in ("one two", "three")))
    gc.collect()
    before = card.held_bytes()
    card.forget_peak()
    pruned = load_pruned(
        str(tmp_path / "model"),
        device="card",
        prune_percent=60,
        criterion=criterion,
        calibration=str(text),
    )
    peak = card.peak_bytes() - before
    kept = size(pruned.parameters())
    # Hidden states, and what a layer computes of a text of seven tokens.
    states = 4 * 7 * (12 * 32 + 4 * 1024 + 260)
    assert peak <= kept + layer + states < full


def test_activity_is_kept_on_the_cpu(tiny_llama, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "one two"}))
    seen = calibrate(
        load_pruned(str(tiny_llama), device="card"), byte_tokenizer(), str(text)
    )
    for activity in seen.activity.values():
        assert activity.norm.device.type == activity.summed_norms.device.type == "cpu"


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_pruned_model_runs_on_the_card(family, tmp_path):
    save_family(tmp_path, family, 64)
    arguments = {"intermediate_size": 40, "experts_implementation": "eager"}
    expected = load_pruned(str(tmp_path), **arguments)
    model = load_pruned(str(tmp_path), device="card", **arguments)
    tokens = torch.arange(40, 62).view(2, 11)
    with torch.no_grad():
        found = model(tokens.to("card"), use_cache=False).logits.cpu()
    assert torch.allclose(found, logits(expected), atol=1e-4)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("criterion", ["maw", "l2", "random"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_oss"])
def test_a_default_device_changes_nothing(family, criterion, tmp_path, monkeypatch):
    # In the calling thread, where the default holds.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    whole = save_family(tmp_path, family, 64)
    arguments = {"intermediate_size": 40, "criterion": criterion}
    expected = load_pruned(str(tmp_path), **arguments)
    with default_device("card"):
        model = load_pruned(str(tmp_path), device="card", **arguments)
        assert_same_on_the_card(model, expected)
        prune_model(whole, **arguments)
    assert whole.prune_record.digest == expected.prune_record.digest
