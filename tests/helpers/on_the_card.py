"""Loading, pruning and calibrating for a device that is not the CPU, in a process of its own.

`tests.checkpoints.test_devices` runs these tests; ``python -m pytest tests/helpers/on_the_card.py`` does so alone.
"""

from __future__ import annotations

import gc
import json

import pytest
import torch

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.repair import Moments
from tests.helpers import simulated_card as card
from tests.helpers.checkpoints import (
    auto_class,
    byte_tokenizer,
    tiny_config,
)
from tests.helpers.layouts import FAMILIES, logits, save_family


#: One of each way to store gate, up and down.
LAYOUTS = ("llama", "phi3", "mixtral", "granitemoeshared", "gpt_oss", "llama4_text")


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
    if not model.config.is_encoder_decoder:
        tokens = torch.arange(40, 62, device="cpu").view(2, 11).to("card")
        with torch.no_grad():
            found = model(tokens, use_cache=False).logits.cpu()
        assert torch.allclose(found, logits(expected), atol=1e-4)


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


@pytest.mark.parametrize("route", ["load", "prune"])
def test_repair_runs_on_the_card_one_layer_at_a_time(route, tiny_llama, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "one two three " * 20}) + "\n")
    arguments = {"ratio": 1, "recipe": "best", "calibration": str(text)}
    expected = load_pruned(str(tiny_llama), **arguments)
    ran = []
    observed = Moments.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            *(Moments, "add"), lambda self, x: (ran.append(x.device), observed(self, x))
        )
        if route == "load":
            model = load_pruned(str(tiny_llama), device="card", **arguments)
        else:
            model = load_pruned(str(tiny_llama), device="card")
            prune_model(model, tokenizer=byte_tokenizer(), **arguments)
    assert {device.type for device in ran} == {"card"}
    assert model.prune_record.digest == expected.prune_record.digest
    for name, weight in expected.state_dict().items():
        own = model.state_dict()[name].cpu()
        torch.testing.assert_close(own, weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("criterion", ["maw", "l2", "random"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_oss"])
def test_a_default_device_changes_nothing(family, criterion, tmp_path, monkeypatch):
    # In the calling thread, where the default holds.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    whole = save_family(tmp_path, family, 64)
    arguments = {"intermediate_size": 40, "criterion": criterion}
    expected = load_pruned(str(tmp_path), **arguments)
    with torch.device("card"):
        model = load_pruned(str(tmp_path), device="card", **arguments)
        assert_same_on_the_card(model, expected)
        prune_model(whole, **arguments)
    assert whole.prune_record.digest == expected.prune_record.digest
