"""What a pass of a prefix tree does beside the model: which tokens are greedy."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, strategies as st

from lm_eval_pruned.model_wrappers.batching import prefix_pass
from lm_eval_pruned.model_wrappers.batching.prefix_pass import Work


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
