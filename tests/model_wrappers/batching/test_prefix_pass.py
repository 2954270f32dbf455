"""What a pass of a prefix tree does beside the model: blocks of attention, scores, logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from lm_eval_pruned.model_wrappers.batching import prefix_pass
from lm_eval_pruned.model_wrappers.batching.forward import LogitsMemory
from lm_eval_pruned.model_wrappers.batching.prefix_pass import Work
from lm_eval_pruned.model_wrappers.batching.token_tree import Budget, next_pack


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3)), min_size=1),
)
def test_a_token_is_greedy_where_argmax_takes_it(rows, wanted):
    """Three values in four places: most rows have equals."""
    chunk = torch.tensor(rows, dtype=torch.float32)
    row = torch.tensor(sorted(r % len(rows) for r, _ in wanted))
    target = torch.tensor([t for _, t in wanted])
    expected = chunk.argmax(-1)[row] == target
    values = chunk[row, target]
    got = prefix_pass._is_greedy(chunk.clone(), row, target, values)
    assert got.tolist() == expected.tolist()


def row_of_questions(monkeypatch):
    """Return the mask of a pass of one row, five questions behind a cached stem."""
    monkeypatch.setattr(prefix_pass, "_BLOCK_QUERIES", 6)
    stem = [7] * 8
    requests = [(None, [*stem, q, q], [a, a]) for q in range(1, 6) for a in range(1, 4)]
    work = Work.of(requests, 64)
    tree, cached, budget = work.tree, 8, Budget(99, 99, 99)
    pack = next_pack(tree, work.scored_before, cached, budget)
    assert len(pack.rows) == 1
    nodes = pack.rows[0][None]
    mask = prefix_pass._mask(
        tree, pack, nodes, cached, torch.float32, torch.device("cpu")
    )
    return mask, nodes.shape[1], cached


def test_attention_in_blocks_is_that_of_the_whole_row(monkeypatch):
    mask, width, cached = row_of_questions(monkeypatch)
    assert len(mask.blocks) > 2
    torch.manual_seed(0)
    query = torch.randn(1, 6, width, 8)
    key, value = torch.randn(2, 1, 2, cached + width, 8)
    whole = mask.as_subclass(torch.Tensor)
    settings = {"scale": 0.3, "enable_gqa": True}
    got = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **settings)
    expected = F.scaled_dot_product_attention(query, key, value, whole, **settings)
    assert type(got) is torch.Tensor
    assert (got - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    "changed", [lambda mask: mask + 0, lambda mask: mask[..., 1:, :]]
)
def test_what_a_model_makes_of_the_mask_is_no_mask_in_blocks(changed, monkeypatch):
    mask, _, _ = row_of_questions(monkeypatch)
    assert type(changed(mask)) is torch.Tensor
    expected = changed(mask.as_subclass(torch.Tensor))
    assert torch.equal(changed(mask), expected)


def test_keys_of_another_length_are_read_whole(monkeypatch):
    mask, width, _ = row_of_questions(monkeypatch)
    query, (key, value) = torch.randn(1, 2, width, 8), torch.randn(2, 1, 2, 9, 8)
    with pytest.raises(RuntimeError, match="size"):
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def test_logits_are_written_to_memory_that_passes_share():
    torch.manual_seed(0)
    output, memory = torch.nn.Linear(4, 10, bias=False), LogitsMemory()
    with torch.no_grad():
        for rows in (3, 5, 2):
            hidden = torch.randn(1, rows, 4)
            with memory.taken_by(output):
                logits = output(hidden)
            assert torch.equal(logits, output(hidden))
            if rows == 5:
                place = logits.data_ptr()
        assert logits.data_ptr() == place
    assert "forward" not in vars(output)


def test_an_output_embedding_that_others_changed_is_left_alone():
    output = torch.nn.Linear(4, 10, bias=False)
    output.forward = changed = lambda hidden: hidden
    with LogitsMemory().taken_by(output):
        assert output.forward is changed
    biased = torch.nn.Linear(4, 10)
    with LogitsMemory().taken_by(biased):
        assert "forward" not in vars(biased)
