"""Where the tensors of a pass in slots lie, how often they move, and how large they get."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given, strategies as st
from lm_eval.models.huggingface import HFLM
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lm_eval_pruned.model_wrappers.batching import fast_path, slot_pass, slot_refilling
from lm_eval_pruned.model_wrappers.batching.forward import (
    ALIGNMENT,
    Forward,
    additive_mask,
)
from lm_eval_pruned.model_wrappers.batching.memory import _free_memory, rows_in_memory
from lm_eval_pruned.model_wrappers.batching.slot_cache import SlotCache
from lm_eval_pruned.model_wrappers.batching.slot_pass import _pass, in_pieces
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


def run_passes(forward, in_groups):
    """Run each kind of pass; return what was moved in it."""
    cache = SlotCache(3, in_groups)
    moved = {}
    for name, work in PASSES.items():
        with Devices() as devices:
            logits = _pass(forward, cache, work)
        assert logits.shape == (len(work), 260)
        moved[name] = devices.moved
        with Devices():
            cache.copy(0, 2, 2)
    with Devices():
        cache.permute(np.array([2, 0, 1]), 9)
    return moved


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("in_groups", [False, True])
def test_a_pass_stays_on_its_device_and_takes_one_copy_there(attention, in_groups):
    config = tiny_config(num_hidden_layers=8)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = auto_class(config).from_config(config).eval()
    device = torch.device("meta")
    for name, moved in run_passes(Forward(model, device), in_groups).items():
        assert len(moved) == 1, name
        assert moved[0].device.type == "cpu"


def test_layers_elsewhere_get_the_places_once():
    # The CPU plays the first card, the device "meta" the second.
    model = tiny_model(tiny_config(num_hidden_layers=8))
    for module in (*model.model.layers[2:], model.model.norm, model.lm_head):
        module.to("meta")
        add_hook_to_module(
            module,
            AlignDevicesHook("meta", skip_keys=("past_key_values", "cache")),
        )
    moved = run_passes(Forward(model, torch.device("cpu")), in_groups=False)
    places = [t for t in moved["step"] if t.dtype == torch.int64 and len(t) == 2]
    assert len(places) == 1
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


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), min_size=1, max_size=5),
    st.integers(30, 600),
)
def test_pieces_are_the_whole_with_masks_that_are_not_too_large(drawn, most):
    work = [(slot, tokens(new), start) for slot, (new, start) in enumerate(drawn)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_pass, "_MOST_IN_MASK", most)
        pieces = list(in_pieces(work))
    written = {slot: [] for slot, _, _ in work}
    ended = []
    for rows, is_last in pieces:
        if any(start for _, _, start in rows) and len(rows) * len(rows[0][1]) > 1:
            longest = max(len(new) for _, new, _ in rows)
            width = max(start + len(new) for _, new, start in rows)
            is_step = max(len(new) for _, new, _ in work) == 1
            assert is_step or len(rows) * longest * width <= most
        for slot, new, start in rows:
            assert start == work[slot][2] + len(written[slot])
            written[slot].extend(new)
        if is_last:
            ended += [slot for slot, _, _ in rows]
    assert ended == [slot for slot, _, _ in work]
    assert all(written[slot] == list(new) for slot, new, _ in work)


def test_a_long_prompt_behind_a_prefix_makes_no_square_mask():
    work = [(0, np.zeros(8000, np.int64), 192)]
    areas = [
        len(rows[0][1]) * (rows[0][2] + len(rows[0][1])) for rows, _ in in_pieces(work)
    ]
    assert max(areas) <= 2**23
    assert len(areas) <= 9


def card(monkeypatch, free, reserved, allocated):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (free[d.index], 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: allocated)


def test_what_the_allocator_keeps_is_free(monkeypatch):
    card(monkeypatch, [1000], 500, 200)
    assert _free_memory(torch.device("cuda:0")) == 1300


def test_slots_are_as_many_as_the_fullest_card_has_room_for(monkeypatch):
    class Layer(torch.nn.Module):
        def __init__(self, index, device):
            super().__init__()
            self.layer_idx = index
            self.parameters = lambda: iter([SimpleNamespace(device=device)])

    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    config = tiny_config(num_hidden_layers=4)
    model = torch.nn.ModuleList(
        [Layer(0, first), *(Layer(i, second) for i in range(1, 4))]
    )
    model.config, model.dtype = config, torch.float16
    lm = SimpleNamespace(model=model, device=first, config=config)
    # Keys and values of 10 tokens in one layer: two heads of 8 numbers of two bytes.
    layer = 2 * 2 * 8 * 2 * 10
    card(monkeypatch, [7 * 3 * layer, 100 * 3 * layer], 0, 0)
    assert rows_in_memory(lm, 10) == 7
    card(monkeypatch, [100 * 3 * layer, 15 * 3 * layer], 0, 0)
    assert rows_in_memory(lm, 10) == 5


@pytest.fixture
def split():
    """A model that says that it is split over two processes."""
    model = tiny()
    model._tp_size = 2
    return model


def test_processes_that_share_a_model_agree_on_the_slots(split, monkeypatch):
    asked = []

    def other_has_less(tensor, op):
        asked.append((int(tensor), op))
        tensor.fill_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", other_has_less)
    lm = make(PrefixHFLM, split, "auto")
    rows = []
    run = slot_refilling.likeliest

    def watched(forward, cache, work):
        rows.append(len(work))
        return run(forward, cache, work)

    monkeypatch.setattr(slot_refilling, "likeliest", watched)
    assert generate(lm, prompts()) == generate(make(HFLM, tiny(), 1), prompts())
    assert max(rows) == 2
    [(own, op)] = asked
    assert own > 2
    assert op == torch.distributed.ReduceOp.MIN
    assert lm.answer_paths.of("generate_until").slots == 2


def test_processes_that_share_a_model_do_not_back_off_one_by_one(split, monkeypatch):
    lm = make(PrefixHFLM, split, 6)

    def short_of_memory(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 PiB.")

    monkeypatch.setattr(slot_refilling, "likeliest", short_of_memory)
    with pytest.raises(RuntimeError, match=r"6 requests at once.*give slots=3"):
        generate(lm, prompts())


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


def test_nothing_of_a_failed_pass_is_left_when_the_memory_is_cleared(monkeypatch):
    lm = make(PrefixHFLM, tiny(), 4)
    assert lm._can_refill()
    run, clear = slot_refilling.likeliest, fast_path.clear_device_cache
    held, left = [], []

    def short_of_memory(forward, cache, work):
        if len(work) <= 2:
            return run(forward, cache, work)
        tensor = torch.zeros(1)
        held.extend([weakref.ref(cache), weakref.ref(tensor)])
        raise RuntimeError("CUDA out of memory. Tried to allocate 1 PiB.")

    def cleared(**arguments):
        clear(**arguments)
        left.extend(ref() for ref in held)

    monkeypatch.setattr(slot_refilling, "likeliest", short_of_memory)
    monkeypatch.setattr(fast_path, "clear_device_cache", cleared)
    assert generate(lm, prompts()) == generate(make(HFLM, tiny(), 1), prompts())
    assert left == [None, None]
