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


@given(SEQUENCES)
def test_a_tree_holds_each_distinct_prefix_once_in_depth_first_order(sequences):
    tree = build_tree(sequences)
    prefixes = {tuple(s[: i + 1]) for s in sequences for i in range(len(s))}
    assert len(tree) == len(prefixes)
    for sequence, last in zip(sequences, tree.last.tolist(), strict=True):
        path = tree.path(last)
        assert tree.tokens[path].tolist() == sequence
        assert tree.depth[path].tolist() == list(range(len(sequence)))
        for count in range(len(sequence) + 1):
            assert [*tree.path(last, count)] == [*path[len(path) - count :]]
    for node in range(len(tree)):
        below = {i for i in range(len(tree)) if node in tree.path(i)}
        assert below == set(range(node, tree.end[node]))


@pytest.mark.parametrize(
    ("sequences", "tokens"),
    [
        # Branching siblings first, then large ones.
        ([[1], [2, 2, 2], [3, 0], [3, 1], [4, 4]], [3, 0, 1, 2, 2, 2, 4, 4, 1]),
        # Ids of more than two bytes.
        ([[70000, 1], [300, 1], [2**32 - 1]], [300, 1, 70000, 1, 2**32 - 1]),
    ],
)
def test_siblings_have_an_order(sequences, tokens):
    assert build_tree(sequences).tokens.tolist() == tokens


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="empty member"):
        build_tree([[1], []])


def packs(tree, wanted, budget):
    """Return all passes, after a look at what each of them may hold."""
    found, start = [], 0
    before = np.concatenate([[0], np.cumsum(wanted)])
    while start < len(tree):
        pack = next_pack(tree, before, start, budget)
        assert pack.start == start < pack.stop
        width = max(map(len, pack.rows))
        assert len(pack.rows) * width <= budget.tokens
        assert before[pack.stop] - before[start] <= budget.scored
        entries = len(pack.rows) * width * (width + int(tree.depth[start]))
        alone = pack.stop - start == 1
        assert pack.chains or alone or entries <= budget.mask
        found.append(pack)
        start = pack.stop
    return found


@given(
    SEQUENCES,
    st.builds(Budget, *(st.integers(1, most) for most in (40, 10, 10, 300))),
    st.randoms(use_true_random=False),
)
def test_packs_visit_every_node_once_and_find_their_ancestors(
    sequences, budget, random
):
    tree = build_tree(sequences)
    wanted = [int(random.random() < 0.5) for _ in range(len(tree))]
    path: set[int] = set()
    for pack in packs(tree, wanted, budget):
        visited = np.concatenate(pack.rows)
        assert sorted(visited.tolist()) == list(range(pack.start, pack.stop))
        for row in pack.rows:
            assert row.tolist() == sorted(row.tolist())
            for node in row.tolist():
                assert set(tree.path(node).tolist()) <= path | set(row.tolist())
            if pack.chains:
                assert tree.depth[row].tolist() == list(range(len(row)))
        parent = int(tree.parent[pack.stop]) if pack.stop < len(tree) else -1
        after = set(tree.path(parent).tolist())
        own = set(pack.rows[0].tolist()) if len(pack.rows) == 1 else set()
        assert after <= path | own
        path = after


def test_a_cut_is_made_where_the_path_is_short():
    # Ten shared tokens, then four questions of five tokens.
    tree = build_tree([[0] * 10 + [q] * 5 for q in range(1, 5)])
    pack = packs(tree, [0] * len(tree), Budget(23, 23, 23))[0]
    assert (pack.stop, tree.depth[pack.stop]) == (20, 10)
