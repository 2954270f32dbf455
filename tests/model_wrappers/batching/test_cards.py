"""What is decided otherwise on a card: shapes that repeat, bounds from free memory, grouped keys."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lm_eval_pruned.model_wrappers.batching import forward, prefix_pass, prefix_sharing
from lm_eval_pruned.model_wrappers.batching.forward import Forward
from lm_eval_pruned.model_wrappers.batching.prefix_pass import PathCache, Work, run_pack
from lm_eval_pruned.model_wrappers.batching.slot_table import SlotJob, SlotTable
from lm_eval_pruned.model_wrappers.batching.slots import run_rows
from lm_eval_pruned.model_wrappers.batching.token_tree import Budget, next_pack
from tests.helpers.answering import (
    GENERATED,
    SCORED,
    assert_close,
    greedy,
    hf,
    ours,
    tiny,
)
from tests.model_wrappers.batching.test_passes import Devices, forward_of


QUESTIONS = [f"{'The same examples. ' * 6}{'Question? ' * n}" for n in range(1, 5)]
ASKED = {
    "scored": [
        (q, f" {a}") for q in [*QUESTIONS, "x"] for a in ("yes", "no", "maybe so")
    ],
    "generated": greedy(
        *QUESTIONS, "x", "Something else", QUESTIONS[0], max_gen_toks=70
    ),
}


@pytest.fixture
def as_on_a_card(monkeypatch, share_however_little):
    for module in (forward, prefix_sharing):
        monkeypatch.setattr(module, "rounds_shapes", lambda device: True)


@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize(
    "bounds", [(9, 5, 9), (70, 40, 20), (600, 256, 600), (4096, 512, 999)]
)
def test_rounded_passes_of_a_tree_answer_as_hf(bounds, monkeypatch):
    budget = Budget(*bounds, rounds=True)
    monkeypatch.setattr(prefix_sharing.PrefixSharingMixin, "_budget", lambda *_: budget)
    lm = ours(tiny(), max_length=256)
    expected = SCORED.ask(hf(lm.model, max_length=256), ASKED["scored"])
    assert_close(SCORED.ask(lm, ASKED["scored"]), expected)


@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("slots", [1, 3, 4, 7])
def test_rounded_slots_answer_as_hf(slots):
    lm = ours(tiny(), max_length=256, slots=slots)
    expected = GENERATED.ask(hf(lm.model, max_length=256), ASKED["generated"])
    assert GENERATED.ask(lm, ASKED["generated"]) == expected


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of queries and keys that attention gets."""
    found = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module, query, key, *others, **kwargs):
        found.append((query.shape, key.shape))
        return sdpa(module, query, key, *others, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", watched)
    return found


def on_meta(**sizes):
    device = torch.device("meta")
    return forward_of(tiny(**sizes).to(device), device)


@pytest.mark.slow
def test_five_hundred_steps_have_twelve_shapes_at_most(shapes):
    ahead, draw, steps = on_meta(num_hidden_layers=1), np.random.default_rng(0), 0
    lengths = draw.integers([30, 20], [300, 260], (48, 2)).tolist()
    waiting = deque(
        SlotJob(n, [n, *range(prompt)], most, [], 0)
        for n, (prompt, most) in enumerate(sorted(lengths, reverse=True))
    )
    table = SlotTable(24, 600)
    while waiting or table.jobs:
        admitted = table.admit(waiting, 8192)
        group = admitted or table.step()
        steps += not admitted
        before = len(shapes)
        run_rows(
            ahead, table.cache, [(s, j.tokens[held:], held) for s, j, held in group]
        )
        if admitted:
            del shapes[before:]
        for slot, job, _ in group:
            job.tokens.append(7)
            if len(job.generated) == job.most:
                del table.jobs[slot]
    assert steps > 400, steps
    assert len(set(shapes)) <= 12, set(shapes)


def passes(ahead, work, budget):
    cache, start, copies = PathCache(rounds=budget.rounds), 0, []
    while start < len(work.tree):
        pack = next_pack(work.tree, work.scored_before, start, budget)
        with Devices() as devices:
            run_pack(ahead, work, pack, cache)
        copies.append(len(devices.moved))
        start = pack.stop
    return copies


def test_passes_of_a_tree_repeat_their_shapes_and_copy_once(shapes, monkeypatch):
    monkeypatch.setattr(prefix_pass, "_score", lambda *_: None)
    monkeypatch.setattr(prefix_pass, "_BLOCK_QUERIES", 9999)
    draw, found = np.random.default_rng(0), {}
    questions = [draw.integers(250, size=n) for n in draw.integers(20, 60, 99)]
    asked = [
        (None, [7] * 150 + [*q], [a, *q[:9], 5]) for q in questions for a in range(3)
    ]
    work = Work.of(asked, 512)
    for layers, rounds in ((1, True), (3, True), (1, False)):
        ahead = on_meta(num_hidden_layers=layers)
        ahead.rounds = rounds
        shapes.clear()
        copies = passes(ahead, work, Budget(400, 99, 400, rounds=rounds))
        found[layers, rounds] = copies, len(set(shapes))
    assert found[1, True][1] <= found[1, False][1] / 2, found
    # Kept tokens go to the device once, however many layers there are.
    assert found[1, True] == found[3, True]


class Card:
    def __init__(self, gibibytes):
        self.free = gibibytes * 2**30

    def mem_get_info(self, device):
        return self.free - 2**30, 2**37

    def memory_reserved(self, device):
        return 3 * 2**29

    def memory_allocated(self, device):
        return 2**29


@pytest.mark.parametrize(
    ("gibibytes", "tokens", "scored", "entries", "slots"),
    [
        # An H100, a small card, and one that does not say.
        (64, 8192, 5592, 2**29, 256),
        (6, 960, 524, 50331648, 64),
        (None, 512, 512, 2**24, 10),
    ],
)
def test_bounds_come_from_the_free_memory(
    gibibytes, tokens, scored, entries, slots, monkeypatch
):
    lm = ours(tiny(), batch_size=1, slots=None)
    text = lm.model.config
    monkeypatch.setattr(text, "vocab_size", 128000)
    monkeypatch.setattr(text, "hidden_size", 4096)
    lm._device = torch.device("meta")
    if gibibytes:
        monkeypatch.setattr(torch, "meta", Card(gibibytes), raising=False)
    budget = lm._budget([(None, [1] * 20, [2])])
    assert (budget.tokens, budget.row_tokens, budget.rounds) == (tokens, 256, True)
    assert (budget.scored, budget.mask) == (scored, entries)
    each = 2**31 // 10 if gibibytes is None else 2**25
    monkeypatch.setattr(
        "lm_eval_pruned.model_wrappers.batching.slot_refilling.slot_bytes",
        lambda *_: each,
    )
    jobs = [None] * 999
    assert lm._slots(jobs, 100) == slots
    lm.batch_size_per_gpu, lm.max_batch_size = "auto", 8
    assert lm._slots(jobs, 100) == 8


def test_keys_are_not_copied_for_each_head_where_a_card_can_group_them(
    monkeypatch, share_however_little
):
    lm = ours(tiny(num_attention_heads=4, num_key_value_heads=2))
    expected = SCORED.ask(hf(lm.model))
    monkeypatch.delenv("TRANSFORMERS_SDPA_FORCE_GQA", raising=False)
    assert not Forward(lm)._groups_keys
    monkeypatch.setattr(forward, "_groups_masked_keys", lambda *_: True)
    monkeypatch.delattr(sdpa_attention, "repeat_kv")
    assert_close(SCORED.ask(lm), expected)
    assert "TRANSFORMERS_SDPA_FORCE_GQA" not in forward.os.environ
