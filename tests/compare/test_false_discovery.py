"""The correction of p for many tests."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from lm_eval_pruned.compare.statistics import false_discovery


@given(st.lists(st.tuples(st.one_of(st.none(), st.floats(0, 1)), st.booleans())))
def test_the_correction_is_benjamini_and_hochberg_s_in_each_family(tests):
    found = false_discovery([p for p, _ in tests], [of for _, of in tests])
    for (p, family), (q, level) in zip(tests, found, strict=True):
        if p is None:
            assert (q, level) == (None, None)
            continue
        made = sorted(x for x, of in tests if x is not None and of == family)
        ends = [x * len(made) / k for k, x in enumerate(made, 1) if x >= p]
        assert q == pytest.approx(min(1, *ends, 1))
        assert abs(q - 0.05) < 1e-9 or (q < 0.05) == (p < level)
        made.remove(p)
        ranked = enumerate([0.0, *made], 1)
        kept = [k for k, x in ranked if x * ((len(made) + 1) / k) < 0.05]
        assert level == 0.05 * max(kept) / (len(made) + 1)
