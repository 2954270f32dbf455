"""What a pass does beside the model: where tensors lie, masks, parts of attention, slots."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lm_eval_pruned.model_wrappers.batching import (
    prefix_pass,
    slot_table,
    slots as slots_module,
)
from lm_eval_pruned.model_wrappers.batching.attention_in_parts import AttentionInParts
from lm_eval_pruned.model_wrappers.batching.forward import (
    ALIGNMENT,
    Forward,
    additive_mask,
)
from lm_eval_pruned.model_wrappers.batching.prefix_pass import PathCache, Work, run_pack
from lm_eval_pruned.model_wrappers.batching.slot_table import SlotJob, SlotTable
from lm_eval_pruned.model_wrappers.batching.slots import SlotCache, run_rows
from lm_eval_pruned.model_wrappers.batching.token_tree import Budget, next_pack
from tests.helpers.answering import GENERATED, assert_close, greedy, hf, ours, tiny
from tests.helpers.checkpoints import tiny_config, tiny_model


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


SLOT_PASSES = {
    "prompts": [(0, tokens(9), 0), (1, tokens(3), 0)],
    "one prompt behind a prefix": [(2, tokens(4), 2)],
    "prompts behind prefixes": [(1, tokens(1), 3), (2, tokens(5), 1)],
    "step": [(0, tokens(1), 9), (1, tokens(1), 4), (2, tokens(1), 6)],
}
STEM = [7] * 8
#: Five questions with three answers each.
QUESTIONS = [(None, [*STEM, q, q], [a, a]) for q in range(1, 6) for a in range(1, 4)]


def run_slots(forward):
    """Run each kind of pass in slots; return what was moved in it."""
    cache, moved = SlotCache(3, 16), {}
    for name, work in SLOT_PASSES.items():
        with Devices() as devices:
            logits = run_rows(forward, cache, work)
        assert logits.shape == (len(work), 260)
        moved[name] = devices.moved
        with Devices():
            cache.copy(0, 2, 2)
    with Devices():
        cache.permute(np.array([2, 0, 1]), 9)
    return moved


def run_tree(forward, budget, monkeypatch):
    """Run passes of a prefix tree; return on which devices their logits are."""
    work, cache, start, devices = Work.of(QUESTIONS, 64), PathCache(), 0, []
    monkeypatch.setattr(
        prefix_pass, "_score", lambda _, __, logits, ___: devices.append(logits.device)
    )
    with Devices():
        while start < len(work.tree):
            pack = next_pack(work.tree, work.scored_before, start, budget)
            run_pack(forward, work, pack, cache)
            start = pack.stop
    return devices


def forward_of(model, device):
    return Forward(
        SimpleNamespace(model=model, device=device, mixed_precision_dtype=None)
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pass_stays_on_its_device(attention, monkeypatch):
    """On torch's device without data, where whatever else turns up is a stranger."""
    device = torch.device("meta")
    forward = forward_of(tiny(attention, num_hidden_layers=2).to(device), device)
    devices = run_tree(forward, Budget(9, 5, 9), monkeypatch)
    assert len(devices) > 2
    assert {each.type for each in devices} == {"meta"}
    for name, moved in run_slots(forward).items():
        # One copy takes all there that a pass needs.
        assert [tensor.device.type for tensor in moved] == ["cpu"], name


def test_layers_elsewhere_get_no_mask_for_prompts():
    # The CPU plays the first card, the device "meta" the second.
    model = tiny_model(tiny_config(num_hidden_layers=8))
    for module in (*model.model.layers[2:], model.model.norm, model.lm_head):
        module.to("meta")
        hook = AlignDevicesHook("meta", skip_keys=("past_key_values", "cache"))
        add_hook_to_module(module, hook)
    moved = run_slots(forward_of(model, torch.device("cpu")))
    assert any(t.ndim == 4 for t in moved["step"])
    assert not any(t.ndim == 4 for t in moved["prompts"])


def test_a_device_without_float64(fast, monkeypatch, share_however_little):
    """Apple's has none. What is in 16 bits plays the tensors on the device."""
    move = torch.Tensor.to

    def without_float64(tensor, *args, **kwargs):
        wanted = torch.float64 in (*args, *kwargs.values())
        if tensor.dtype == torch.bfloat16 and wanted:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return move(tensor, *args, **kwargs)

    lm = ours(tiny(dtype=torch.bfloat16))
    cpu = torch.Tensor.cpu
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


@pytest.fixture
def long_row(monkeypatch):
    """The mask of one row of five questions behind a cached stem, and its parts."""
    monkeypatch.setattr(prefix_pass, "_BLOCK_QUERIES", 6)
    work = Work.of(QUESTIONS, 64)
    pack = next_pack(work.tree, work.scored_before, len(STEM), Budget(99, 99, 99))
    (nodes,) = pack.rows
    mask = prefix_pass._mask(
        work.tree, pack, nodes[None], torch.float32, torch.device("cpu")
    )
    return mask, prefix_pass._parts(work.tree, pack, len(STEM))


def test_attention_in_parts_equals_attention_to_the_whole_row(long_row):
    mask, parts = long_row
    torch.manual_seed(0)
    query = torch.randn(1, 6, mask.shape[-2], 8)
    key, value = torch.randn(2, 1, 2, mask.shape[-1], 8)

    def attend(mask, in_parts=False):
        with AttentionInParts(long_row[0], parts if in_parts else ()):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
            )

    # A copy of the mask is another mask.
    expected = attend(mask.clone())
    got = attend(mask, in_parts=True)
    assert got.transpose(1, 2).is_contiguous()
    assert torch.equal(got, attend(mask[..., :], in_parts=True))
    assert (got - expected).abs().max() < 1e-6
    for other in (torch.zeros_like(mask), None):
        assert torch.equal(attend(other, in_parts=True), attend(other))
    # Attention to the whole row multiplies hidden values by 0, which NaN survives.
    value[..., -1, :] = float("nan")
    got = attend(mask, in_parts=True)
    assert got[..., : parts[-1].queries.start, :].isfinite().all()


def test_each_block_of_queries_reads_its_own_path_and_itself(long_row):
    _, parts = long_row
    assert len(parts) > 2
    for _, queries, keys in parts:
        # The stem, and the block's own nodes: no other question.
        own = range(8 + queries.start, 8 + queries.stop)
        assert keys.tolist() == [*range(8), *own]


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3)), min_size=1),
)
def test_a_token_is_greedy_where_argmax_takes_it(rows, wanted):
    """Three values in four places: most rows have equals."""
    logits = torch.tensor(rows, dtype=torch.float32)
    requests = [(None, [9, r % len(rows)], [t]) for r, t in wanted]
    work = Work.of(requests, 8)
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


def test_attention_reads_each_group_to_its_end(monkeypatch):
    monkeypatch.setattr(slots_module, "_GROUPS", 2)
    grouped, groups = slots_module.groups_of, []

    def watched(lengths):
        groups.append([(r.stop - r.start, width) for r, width in grouped(lengths)])
        return grouped(lengths)

    monkeypatch.setattr(slots_module, "groups_of", watched)
    lm = ours(tiny(), slots=4)
    lm.model.generation_config.eos_token_id = None
    asked = greedy("a" * 30, "b" * 20, "c" * 9, "d" * 5, max_gen_toks=2)
    assert GENERATED.ask(lm, asked) == GENERATED.ask(hf(lm.model), asked)
    assert groups[-1] == [(2, 31), (2, 10)]


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
    jobs = [
        SlotJob(i, list(prompt), most, [], 0) for i, (prompt, most) in enumerate(drawn)
    ]
    waiting, done = deque(jobs), []
    table = SlotTable(slots, 20)
    held = [[] for _ in range(slots)]

    def copy(source, target, length):
        held[target] = held[source][:length]

    def permute(order, length):
        assert max(len(tokens) for tokens in held) >= length - 1
        held[: len(order)] = [held[slot][:length] for slot in order]

    table.cache.copy, table.cache.permute = copy, permute
    table.cache.on_cpu = True
    while waiting or table.jobs:
        group = table.admit(waiting, budget)
        if not group:
            group = table.step()
            assert [slot for slot, _, _ in group] == list(range(len(table.jobs)))
        for slot, job, start in group:
            assert held[slot][:start] == job.tokens[:start]
            assert start < len(job.tokens)
            held[slot] = list(job.tokens)
            job.tokens.append(7)
            if len(job.generated) == job.most:
                del table.jobs[slot]
                done.append(job)
    assert sorted(job.index for job in done) == list(range(len(jobs)))
    assert all(len(job.generated) == job.most for job in done)


@pytest.mark.parametrize(
    ("shared", "most_in_mask", "start"),
    [(2, 2**26, 0), (8, 2**26, 8), (40, 2**26, 40), (40, 24 * 64 - 1, 0)],
)
def test_a_few_shared_tokens_are_not_worth_a_mask_and_nothing_a_huge_one(
    shared, most_in_mask, start, monkeypatch
):
    monkeypatch.setattr(slot_table, "_MOST_IN_MASK", most_in_mask)
    first = list(range(64))
    second = first[:shared] + list(range(100, 164 - shared))
    table, copied = SlotTable(2, 65), []
    table.cache.copy = lambda *copy: copied.append(copy)
    starts = []
    for number, prompt in enumerate((first, second)):
        job = SlotJob(number, prompt, 1, [], 0)
        starts += [row[2] for row in table.admit(deque([job]), 64)]
    assert starts == [0, start]
    assert copied == ([(0, 1, start)] if start else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_begin_as_zeros(dtype):
    cache = SlotCache(3, 64)
    cache.row_slots, cache.row_places = torch.tensor([[0]]), torch.arange(5)[None]
    states = torch.ones(1, 2, 5, 8, dtype=dtype)
    cache.update(states, states, 0)
    keys = cache.layers[0].keys
    assert (keys.dtype, keys.shape) == (dtype, (3, 2, 64, 8))
    assert keys.sum() == keys[0, :, :5].sum() == states.numel()


@pytest.mark.slow
@pytest.mark.parametrize("failing", [1, 2, 4])
def test_no_request_is_lost_where_a_copy_runs_out_of_memory(monkeypatch, failing):
    """Prompts that begin alike are copied; so are answers that move up as others end."""
    lm = ours(tiny(), slots=4)
    copy_slot, copies = SlotCache.copy, []

    def short_of_memory(*arguments):
        copies.append(arguments)
        if len(copies) == failing:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 PiB.")
        copy_slot(*arguments)

    monkeypatch.setattr(SlotCache, "copy", short_of_memory)
    stem = "The same examples in front of each question. "
    asked = [(stem + c, {"max_gen_toks": n}) for n, c in enumerate("abcdefg", 1)]
    assert GENERATED.ask(lm, asked) == GENERATED.ask(hf(lm.model), asked)
    assert len(copies) > failing
    assert GENERATED.record(lm)["requests"] == {"slots": len(asked)}
