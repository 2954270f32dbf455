"""Where the tensors of a pass in slots lie, how often they move, and how large they get."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm_eval_pruned.model_wrappers.batching.forward import (
    ALIGNMENT,
    Forward,
    additive_mask,
)
from lm_eval_pruned.model_wrappers.batching.slots import SlotCache, run_rows
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.helpers.checkpoints import auto_class, tiny_config, tiny_model
from tests.model_wrappers.batching.test_slot_refilling import (
    generate,
    make,
    prompts,
    tiny,
)


class Devices(TorchDispatchMode):
    """Lets no operation but a copy see two devices; notes what is copied between them."""

    def __init__(self):
        super().__init__()
        self.moved: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        seen = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            if result.device != args[0].device:
                self.moved.append(args[0])
        elif len({t.device for t in seen if t.ndim}) > 1:
            raise AssertionError(f"{func} takes tensors of several devices")
        return result


def tokens(count):
    return np.arange(count) % 250


STEPS = [(0, tokens(1), 9), (1, tokens(1), 4), (2, tokens(1), 6)]
PASSES = {
    "prompts": [(0, tokens(9), 0), (1, tokens(3), 0)],
    "one prompt behind a prefix": [(2, tokens(4), 2)],
    "prompts behind prefixes": [(1, tokens(1), 3), (2, tokens(5), 1)],
    "step": STEPS,
}


def run_passes(forward):
    """Run each kind of pass; return what was moved in it."""
    cache = SlotCache(3, 16)
    moved = {}
    for name, work in PASSES.items():
        with Devices() as devices:
            logits = run_rows(forward, cache, work)
        assert logits.shape == (len(work), 260)
        moved[name] = devices.moved
        with Devices():
            cache.copy(0, 2, 2)
    with Devices():
        cache.permute(np.array([2, 0, 1]), 9)
    return moved


def forward_of(model, device):
    lm = SimpleNamespace(model=model, device=device, mixed_precision_dtype=None)
    return Forward(lm)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pass_stays_on_its_device_and_takes_one_copy_there(attention):
    config = tiny_config(num_hidden_layers=8)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = auto_class(config).from_config(config).eval()
    device = torch.device("meta")
    for name, moved in run_passes(forward_of(model, device)).items():
        assert len(moved) == 1, name
        assert moved[0].device.type == "cpu"


def test_layers_elsewhere_get_no_mask_for_prompts():
    # The CPU plays the first card, the device "meta" the second.
    model = tiny_model(tiny_config(num_hidden_layers=8))
    for module in (*model.model.layers[2:], model.model.norm, model.lm_head):
        module.to("meta")
        add_hook_to_module(
            module,
            AlignDevicesHook("meta", skip_keys=("past_key_values", "cache")),
        )
    moved = run_passes(forward_of(model, torch.device("cpu")))
    assert any(t.ndim == 4 for t in moved["step"])
    assert not any(t.ndim == 4 for t in moved["prompts"])


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 70))
def test_rows_of_a_mask_begin_where_kernels_want_them(rows, queries, keys):
    hidden = torch.rand(rows, queries, keys) < 0.5
    mask = additive_mask(hidden, torch.float16)
    assert mask.dtype == torch.float16
    assert torch.equal(mask[:, 0] == 0, ~hidden)
    assert torch.equal(torch.isneginf(mask[:, 0]), hidden)
    assert mask.shape == (rows, 1, queries, keys)
    assert all(stride % ALIGNMENT == 0 for stride in mask.stride()[:-1])
    assert mask.stride(-1) == 1


@pytest.mark.slow
def test_a_device_without_float64(monkeypatch):
    # What is in 16 bits plays the tensors on the device.
    lm = make(PrefixHFLM, tiny(dtype=torch.bfloat16))
    move = torch.Tensor.to

    def without_float64(tensor, *args, **kwargs):
        wanted = torch.float64 in (*args, *kwargs.values())
        if tensor.dtype == torch.bfloat16 and wanted:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return move(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", without_float64)
    monkeypatch.setattr(torch.Tensor, "double", lambda t: t.to(torch.float64))
    generate(lm, prompts())
    assert lm.answer_paths.of("generate_until").requests == {"slots": len(prompts())}
