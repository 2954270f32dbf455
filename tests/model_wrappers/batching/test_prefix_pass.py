"""What a pass of a prefix tree does beside the model: greedy tokens, attention in blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from lm_eval_pruned.model_wrappers.batching import prefix_pass
from lm_eval_pruned.model_wrappers.batching.attention_in_parts import AttentionInParts
from lm_eval_pruned.model_wrappers.batching.prefix_pass import Work
from lm_eval_pruned.model_wrappers.batching.token_tree import Budget, next_pack


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
    row = work.tree.tokens[nodes]
    prefix_pass._score(work, nodes, logits[row], None)
    expected = logits.log_softmax(-1).argmax(-1).tolist()
    for (_, (_, r), (t,)), pairs in zip(requests, work.pairs, strict=True):
        assert work.greedy[pairs].tolist() == [t == expected[r]]


@pytest.fixture
def long_row(monkeypatch):
    """The mask of one row of five questions behind a cached stem, and its parts."""
    monkeypatch.setattr(prefix_pass, "_BLOCK_QUERIES", 6)
    stem = [7] * 8
    requests = [(None, [*stem, q, q], [a, a]) for q in range(1, 6) for a in range(1, 4)]
    work = Work.of(requests, 64)
    pack = next_pack(work.tree, work.scored_before, len(stem), Budget(99, 99, 99))
    (nodes,) = pack.rows
    mask = prefix_pass._mask(
        work.tree, pack, nodes[None], torch.float32, torch.device("cpu")
    )
    return mask, prefix_pass._parts(work.tree, pack, len(stem))


def attend(query, key, value, mask):
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )


def test_attention_in_parts_equals_attention_to_the_whole_row(long_row):
    mask, parts = long_row
    in_parts = AttentionInParts(mask, parts)
    torch.manual_seed(0)
    query = torch.randn(1, 6, mask.shape[-2], 8)
    key, value = torch.randn(2, 1, 2, mask.shape[-1], 8)
    with in_parts:
        got = attend(query, key, value, mask)
        view = attend(query, key, value, mask[..., : mask.shape[-1]])
    expected = attend(query, key, value, mask)
    assert got.transpose(1, 2).is_contiguous()
    assert torch.equal(got, view)
    assert (got - expected).abs().max() < 1e-6
    # Attention to the whole row multiplies hidden values by 0, which NaN survives.
    value[..., -1, :] = float("nan")
    with in_parts:
        got = attend(query, key, value, mask)
    assert got[..., : parts[-1].queries.start, :].isfinite().all()


def test_attention_under_another_mask_is_left_alone(long_row):
    mask, parts = long_row
    query = torch.randn(1, 6, mask.shape[-2], 8)
    key, value = torch.randn(2, 1, 2, mask.shape[-1], 8)
    for asked in (torch.zeros_like(mask), None):
        with AttentionInParts(mask, parts):
            got = attend(query, key, value, asked)
        assert torch.equal(got, attend(query, key, value, asked))


def test_each_block_of_queries_reads_its_own_path_and_itself(long_row):
    _, parts = long_row
    assert len(parts) > 2
    for _, queries, keys in parts:
        # The stem, and the block's own nodes: no other question.
        assert keys.tolist() == [
            *range(8),
            *range(8 + queries.start, 8 + queries.stop),
        ]
