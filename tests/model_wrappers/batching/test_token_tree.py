from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lm_eval_pruned.model_wrappers.batching.token_tree import (
    Budget,
    build_tree,
    next_pack,
)


SEQUENCES = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12
)


def scored_before(wanted):
    return np.concatenate([[0], np.cumsum(wanted)])


@given(SEQUENCES)
def test_every_sequence_is_the_path_to_its_last_node(sequences):
    tree = build_tree(sequences)
    for sequence, last in zip(sequences, tree.last, strict=True):
        path = tree.path(int(last))
        assert tree.tokens[path].tolist() == sequence
        assert tree.depth[path].tolist() == list(range(len(sequence)))
        for count in range(len(sequence) + 1):
            tail = tree.path(int(last), count)
            assert tail.tolist() == path[len(path) - count :].tolist()


@given(SEQUENCES)
def test_a_node_is_a_distinct_prefix(sequences):
    prefixes = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert len(build_tree(sequences)) == len(prefixes)


@given(SEQUENCES)
def test_the_subtree_of_a_node_is_a_range(sequences):
    tree = build_tree(sequences)
    for node in range(len(tree)):
        below = {i for i in range(len(tree)) if node in tree.path(i)}
        assert below == set(range(node, tree.end[node]))


def test_siblings_branching_first_then_large_first():
    tree = build_tree([[1], [2, 2, 2], [3, 0], [3, 1], [4, 4]])
    assert tree.tokens.tolist() == [3, 0, 1, 2, 2, 2, 4, 4, 1]


def test_large_token_ids_keep_their_order():
    tree = build_tree([[70000, 1], [300, 1], [2**32 - 1]])
    assert sorted(tree.tokens.tolist()) == [1, 1, 300, 70000, 2**32 - 1]


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="empty member"):
        build_tree([[1], []])


@given(
    SEQUENCES,
    st.integers(1, 40),
    st.integers(1, 10),
    st.integers(1, 10),
    st.integers(1, 300),
    st.randoms(use_true_random=False),
)
def test_packs_visit_every_node_once_and_find_their_ancestors(
    sequences, tokens, row_tokens, scored, mask, random
):
    tree = build_tree(sequences)
    wanted = np.array([random.random() < 0.5 for _ in range(len(tree))], dtype=int)
    before = scored_before(wanted)
    start = 0
    path: set[int] = set()
    while start < len(tree):
        budget = Budget(tokens, row_tokens, scored, mask)
        pack = next_pack(tree, before, start, budget)
        assert pack.start == start < pack.stop
        visited = np.concatenate(pack.rows)
        assert sorted(visited.tolist()) == list(range(pack.start, pack.stop))
        assert len(pack.rows) * max(map(len, pack.rows)) <= tokens
        assert before[pack.stop] - before[pack.start] <= scored
        width = max(map(len, pack.rows))
        entries = len(pack.rows) * width * (width + int(tree.depth[start]))
        assert pack.chains or entries <= mask or len(visited) == 1
        for row in pack.rows:
            assert row.tolist() == sorted(row.tolist())
            for node in row:
                ancestors = set(tree.path(int(node)).tolist())
                assert ancestors <= path | set(row.tolist())
        if pack.chains:
            assert tree.depth[start] == 0
            for row in pack.rows:
                assert tree.depth[row].tolist() == list(range(len(row)))
        parent = int(tree.parent[pack.stop]) if pack.stop < len(tree) else -1
        after = set(tree.path(parent).tolist())
        assert after <= path | (
            set(pack.rows[0].tolist()) if len(pack.rows) == 1 else set()
        )
        path = after
        start = pack.stop


def test_a_cut_is_made_where_the_path_is_short():
    # Ten shared tokens, then four questions of five tokens.
    sequences = [[0] * 10 + [q] * 5 for q in range(1, 5)]
    tree = build_tree(sequences)
    pack = next_pack(
        tree, scored_before(np.zeros(len(tree), int)), 0, Budget(23, 23, 23)
    )
    assert pack.stop == 20
    assert tree.depth[pack.stop] == 10


def test_a_halved_budget_ends_at_one_token():
    budget = Budget(5, 2, 3, 7)
    for _ in range(3):
        budget = budget.halved()
    assert budget == Budget(1, 1, 1, 1)


def test_no_mask_of_thousands_of_tokens_by_as_many():
    """What a GPU takes at once has masks of 2**24 entries at most, 32 MB in 16 bits."""
    stem = list(range(9000))
    tree = build_tree([stem[:n] + [1, 2] for n in range(100, 9000, 50)])
    start, budget = 0, Budget(8192, 1024, 2048)
    while start < len(tree):
        pack = next_pack(tree, scored_before(np.ones(len(tree), int)), start, budget)
        width = max(map(len, pack.rows))
        entries = len(pack.rows) * width * (width + int(tree.depth[start]))
        assert pack.chains or entries <= 2**24
        start = pack.stop
