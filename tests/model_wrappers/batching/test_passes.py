"""What a pass does beside the model: where tensors lie, masks, parts of attention, slots, bounds."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lm_eval_pruned.model_wrappers.batching import (
    forward as forward_module,
    prefix_pass,
)
from lm_eval_pruned.model_wrappers.batching.forward import (
    ALIGNMENT,
    Forward,
    additive_mask,
)
from lm_eval_pruned.model_wrappers.batching.prefix_pass import PathCache, Work, run_pack
from lm_eval_pruned.model_wrappers.batching.slots import (
    SlotCache,
    SlotJob,
    SlotTable,
    run_rows,
)
from lm_eval_pruned.model_wrappers.batching.token_tree import Budget, next_pack
from tests.helpers.answering import GENERATED, SCORED, assert_close, hf, ours, tiny
from tests.helpers.checkpoints import tiny_config


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


#: Slots, new tokens, and how many are held.
SLOT_PASSES = {
    "prompts": [(0, range(9), 0), (1, range(3), 0)],
    "one prompt behind a prefix": [(2, range(4), 2)],
    "prompts behind prefixes": [(1, range(1), 3), (2, range(5), 1)],
    "step": [(0, range(1), 9), (1, range(1), 4), (2, range(1), 6)],
}
STEM = [7] * 8
#: Five questions with three answers each.
QUESTIONS = [(None, [*STEM, q, q], [a, a]) for q in range(1, 6) for a in range(1, 4)]


def run_tree(forward, asked, budget):
    """Run the passes of a prefix tree without looking at logits; return how many copies each took."""
    work, cache, start = Work.from_requests(asked, 512), PathCache(), 0
    copies = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_pass, "_score", lambda *_: None)
        while start < len(work.tree):
            pack = next_pack(work.tree, work.scored_before, start, budget)
            with Devices() as devices:
                run_pack(forward, work, pack, cache)
            copies.append(len(devices.moved))
            start = pack.stop
    return copies


def forward_of(model, device):
    lm = SimpleNamespace(model=model, device=device, mixed_precision_dtype=None)
    return Forward(lm)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pass_stays_on_its_device(attention):
    """On torch's device without data, where whatever else turns up is a stranger."""
    device, copies = torch.device("meta"), []
    for layers in (1, 3):
        model = tiny(attention, num_hidden_layers=layers).to(device)
        forward = forward_of(model, device)
        copies.append(run_tree(forward, QUESTIONS, Budget(9, 5, 9)))
        cache = SlotCache(3, 16)
        for name, work in SLOT_PASSES.items():
            with Devices() as devices:
                logits = run_rows(forward, cache, work)
                cache.copy(0, 2, 2)
            assert logits.shape == (len(work), 260)
            # One copy takes all there that a pass needs.
            assert [tensor.device.type for tensor in devices.moved] == ["cpu"], name
        with Devices():
            cache.permute(np.array([2, 0, 1]), 9)
    assert copies[0] == copies[1]
    assert len(copies[0]) > 2


def test_a_device_without_float64(fast, monkeypatch, share_however_little):
    """Apple's has none. What is in 16 bits plays the tensors on the device."""
    move, cpu = torch.Tensor.to, torch.Tensor.cpu

    def without_float64(tensor, *args, **kwargs):
        wanted = torch.float64 in (*args, *kwargs.values())
        if tensor.dtype == torch.bfloat16 and wanted:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return move(tensor, *args, **kwargs)

    lm = ours(tiny(dtype=torch.bfloat16))
    monkeypatch.setattr(torch.Tensor, "to", without_float64)
    monkeypatch.setattr(torch.Tensor, "double", lambda t: t.to(torch.float64))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: cpu(t).float())
    fast.ask(lm)
    assert fast.record(lm)["requests"].keys() == {fast.fast}


# --- masks, and attention in parts


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 70))
def test_rows_of_a_mask_begin_where_kernels_want_them(rows, queries, keys):
    hidden = torch.rand(rows, queries, keys) < 0.5
    mask = additive_mask(hidden, torch.float16)
    assert torch.equal(mask, torch.where(hidden, -torch.inf, 0)[:, None].half())
    assert all(stride % ALIGNMENT == 0 for stride in mask.stride()[:-1])
    assert mask.stride(-1) == 1


@pytest.mark.parametrize(
    ("asked", "masked"),
    [
        ([(None, [a] * 40, [1]) for a in range(6)], False),
        ([(None, [a] * (40 - a), [1]) for a in range(6)], False),
        (QUESTIONS, True),
    ],
    ids=["equal chains", "unequal chains", "branches"],
)
def test_chains_run_through_the_causal_kernel_without_a_mask(
    asked, masked, monkeypatch, share_however_little
):
    lm, masks = ours(tiny()), []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return sdpa(module, query, key, value, attention_mask, **kwargs)

    expected = hf(lm.model)._loglikelihood_tokens(asked, disable_tqdm=True)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", watched)
    assert_close(lm._loglikelihood_tokens(asked, disable_tqdm=True), expected)
    assert {mask is not None for mask in masks} == {masked}


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3)), min_size=1),
)
def test_a_token_is_greedy_where_argmax_takes_it(rows, wanted):
    """Three values in four places: most rows have equals."""
    logits = torch.tensor(rows, dtype=torch.float32)
    requests = [(None, [9, r % len(rows)], [t]) for r, t in wanted]
    work = Work.from_requests(requests, 8)
    nodes = np.flatnonzero(np.diff(work.scored_before))
    prefix_pass._score(work, nodes, logits[work.tree.tokens[nodes]], None)
    expected = logits.log_softmax(-1).argmax(-1).tolist()
    for (_, (_, r), (t,)), pairs in zip(requests, work.pairs, strict=True):
        assert work.greedy[pairs].tolist() == [t == expected[r]]


# --- slots


def test_steps_are_as_few_as_the_slots_allow():
    lm, passes = ours(tiny()), []
    lm.model.generation_config.eos_token_id = None
    lm.model.model.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: passes.append(inputs[0].shape)
    )
    lengths = [9, 3, 3, 3]
    asked = [(f"{i}" * 5, {"max_gen_toks": n}) for i, n in enumerate(lengths)]
    GENERATED.ask(lm, asked)
    steps = [rows for rows, width in passes if width == 1]
    # The first token of an answer comes with its prompt.
    assert sum(steps) == sum(lengths) - len(lengths)
    assert (len(steps), max(steps)) == (8, 2)


def jobs_of(drawn):
    return deque(SlotJob(i, [*prompt], n, [], 0) for i, (prompt, n) in enumerate(drawn))


def passes_of(table, waiting, budget):
    """Yield the rows of each pass of `table` until all is answered, always with the token 7."""
    while waiting or table.jobs:
        group = table.admit(waiting, budget) or table.step()
        yield group
        for slot, job, _ in group:
            job.tokens.append(7)
            if len(job.generated) == job.most:
                del table.jobs[slot]


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(1, 6)
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5),
    st.integers(1, 40),
)
def test_slots_hold_what_they_should(drawn, slots, budget):
    # This test plays the model: a slot's keys are the tokens written to it.
    table, seen = SlotTable(slots, 20), {}
    held = [[] for _ in range(slots)]

    def copy(source, target, length):
        held[target] = held[source][:length]

    def permute(order, length):
        assert max(len(tokens) for tokens in held) >= length - 1
        held[: len(order)] = [held[slot][:length] for slot in order]

    table.cache.copy, table.cache.permute = copy, permute
    table.cache.on_cpu = True
    for group in passes_of(table, jobs_of(drawn), budget):
        for slot, job, start in group:
            assert held[slot][:start] == job.tokens[:start]
            assert start < len(job.tokens)
            held[slot] = list(job.tokens)
            seen[job.index] = len(job.generated) + 1
    assert seen == {i: most for i, (_, most) in enumerate(drawn)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_begin_as_zeros(dtype):
    cache = SlotCache(3, 64)
    cache.row_slots, cache.row_places = torch.tensor([[0]]), torch.arange(5)[None]
    states = torch.ones(1, 2, 5, 8, dtype=dtype)
    cache.update(states, states, 0)
    keys, _ = cache.stored[0]
    assert (keys.dtype, keys.shape) == (dtype, (3, 2, 64, 8))
    assert keys.sum() == keys[0, :, :5].sum() == states.numel()


# --- bounds


def test_a_pass_on_a_cpu_holds_no_more_than_a_batch_and_a_floor():
    batch = [(None, [1] * 600, [2])]
    found = [ours(tiny(), batch_size=n, max_length=900)._budget(batch) for n in (1, 99)]
    assert [budget.tokens for budget in found] == [600, 1024]


# --- what is decided otherwise on a card


@pytest.mark.parametrize(
    ("choice", "device", "kernel"),
    [
        (SDPBackend.EFFICIENT_ATTENTION, "cuda", SDPBackend.EFFICIENT_ATTENTION),
        (SDPBackend.MATH, "cuda", SDPBackend.MATH),
        (SDPBackend.EFFICIENT_ATTENTION, "cpu", None),
        (None, "cuda", None),
    ],
    ids=str,
)
def test_torch_is_asked_which_kernel_takes_keys_that_heads_share(
    choice, device, kernel, monkeypatch
):
    """Asked of a device without data, with torch's answer replaced: no card is here."""
    calls, empty = [], torch.empty

    def choose(query, key, value, *, attn_mask, enable_gqa):
        shapes = [tuple(t.shape) for t in (query, key, value, attn_mask)]
        calls.append((*shapes, enable_gqa, torch.backends.cuda.cudnn_sdp_enabled()))
        return choice.value

    if choice is None:
        monkeypatch.delattr(torch, "_fused_sdp_choice")
    else:
        monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    on_meta = lambda *size, **more: empty(*size, **{**more, "device": "meta"})
    monkeypatch.setattr(torch, "empty", on_meta)
    config = tiny_config(num_attention_heads=4, num_key_value_heads=2)
    asked = config, torch.device(device), torch.float16
    assert forward_module.kernel_of_shared_keys(*asked) == kernel
    keys = (1, 2, 64, 8)
    expected = ((1, 4, 64, 8), keys, keys, (1, 1, 64, 64), True, False)
    assert calls == [expected] * (choice is not None and device == "cuda")


@pytest.mark.parametrize(
    ("batch_size", "bounds"),
    [("auto", Budget(8192, 256, 2048)), (1, Budget(512, 256, 512))],
)
def test_a_pass_on_a_card_is_larger(batch_size, bounds):
    lm = ours(tiny(), batch_size=batch_size)
    lm._device = torch.device("meta")
    assert lm._budget([(None, [1] * 20, [2])]) == bounds


def test_keys_are_not_copied_for_each_head_where_a_card_can_group_them(
    monkeypatch, share_however_little
):
    lm = ours(tiny(num_attention_heads=4, num_key_value_heads=2))
    expected = SCORED.ask(hf(lm.model))
    efficient = SDPBackend.EFFICIENT_ATTENTION
    monkeypatch.setattr(forward_module, "kernel_of_shared_keys", lambda *_: efficient)
    monkeypatch.delattr(sdpa_attention, "repeat_kv")
    assert_close(SCORED.ask(lm), expected)
    assert "TRANSFORMERS_SDPA_FORCE_GQA" not in forward_module.os.environ
