"""Stopping when decided: the design, its error, its p values, and what compare makes of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from lm_eval_pruned.compare.stopping import LEVEL, sequential
from lm_eval_pruned.compare.verdicts import Margin
from lm_eval_pruned.results.stopping_record import Stopping
from lm_eval_pruned.sweeps.stopping import read_rule


def _stopping(*looks: int, of: int = 800, sizes: int = 1, **more) -> Stopping:
    return Stopping(
        "decided", "boolq", of, LEVEL, sizes, "acc,none", looks=looks, **more
    )


def test_the_looks_share_the_level_and_spend_all_of_it_with_the_last_document():
    assert _stopping(100, 200, 400, 800).shares == (1 / 16, 1 / 16, 1 / 8, 3 / 4)
    assert _stopping(800).shares == (1.0,)
    assert sum(_stopping(100, 200, 400).shares) == pytest.approx(1 / 4)
    assert _stopping(100, sizes=5).nominal_level == pytest.approx(LEVEL / 16 / 5)


def test_four_looks_err_no_more_often_than_the_level():
    looks = np.array([409, 818, 1635, 3270])
    rng = np.random.default_rng(0)
    steps = np.sqrt(np.diff(looks, prepend=0))
    sums = (rng.normal(size=(40_000, 4)) * steps).cumsum(axis=1)
    p = 2 * stats.norm.sf(np.abs(sums) / np.sqrt(looks))
    shares = np.array(_stopping(*looks.tolist(), of=3270).shares)
    crossed = (p < LEVEL * shares).any(axis=1).mean()
    # Bonferroni's inequality gives a little away, because looks share their documents.
    assert 0.04 < crossed < LEVEL + 3 * (0.05 * 0.95 / 40_000) ** 0.5


def test_repeated_p_is_the_level_at_which_a_unit_just_stops():
    for number in range(3):
        stopping = _stopping(*(100, 200, 800)[: number + 1], sizes=4)
        p = [1.0] * (number + 1)
        p[number] = stopping.nominal_level
        assert stopping.repeated(p) == pytest.approx(LEVEL / 4)
    assert _stopping(100, 800).repeated((None, 1.0)) == 1.0
    assert _stopping(100, 200).repeated((0.001, 0.9)) == _stopping(100).repeated(
        [0.001]
    )


def test_the_record_is_read_as_it_was_written():
    record = _stopping(
        *(100, 200),
        sizes=2,
        reason="difference",
        p=(None, 1e-6),
        p_margin=(None, None),
        difference=-0.4,
        low=-0.6,
        high=-0.2,
        scores={"acc,none": (0.1, 0.2)},
    )
    written = json.loads(json.dumps(record.as_dict()))
    assert Stopping.from_dict(written) == record


def test_differences_and_a_margin_share_one_level():
    """Of six sizes three have no difference, and three one as large as the margin."""
    margin, n, sizes = Margin("equivalent", "10pt"), 400, 6

    def wrong(seed: int, rule: str) -> bool:
        rng = np.random.default_rng(seed)
        p = np.where(np.arange(sizes) < 3, rng.random(sizes), 1e-9)
        p_margin = np.where(np.arange(sizes) < 3, 1e-9, rng.random(sizes))
        found = [
            sequential(
                Stopping(
                    rule, "boolq", n, LEVEL, sizes, "acc,none", "all documents", (n,),
                    (p[k],), (p_margin[k],), 0.0, 0.0, 0.0,
                ),
                "acc,none", 0.0, margin, 0.1,
            )
            for k in range(sizes)
        ]  # fmt: skip
        different = [q < 0.05 for _, q, _ in found[:3]]
        return any(different) or any(claim.q < 0.05 for _, _, claim in found[3:])

    # Holm for each of both questions would be wrong in 9.7 % of sweeps.
    assert np.mean([wrong(seed, "decided:10pt") for seed in range(4000)]) < 0.055


@pytest.mark.parametrize(
    "text", ["", "decide", "decided:", "decided:one", "decided:0pt"]
)
def test_other_rules_are_refused(text):
    with pytest.raises(ValueError, match=r"pass decided|give percentage points"):
        read_rule({"stop_when": text})
