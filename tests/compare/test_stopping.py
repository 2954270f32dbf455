"""Stopping when decided: the level of each look, p values, and the record."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from lm_eval_pruned.compare.pairing import LEVEL, look, sequential
from lm_eval_pruned.compare.statistics import paired_difference
from lm_eval_pruned.compare.verdicts import Margin
from lm_eval_pruned.results.files import Stopping, read_results_file, spent
from lm_eval_pruned.results.runs import read_run
from tests.helpers.results_files import write_run


POINT = Margin("equivalent", "1pt")


def record(*looks, of=800, sizes=1, rule="decided", **more):
    return Stopping(rule, "boolq", of, LEVEL, sizes, "acc,none", looks=looks, **more)


def test_the_looks_share_the_level_and_spend_all_of_it_with_the_last_document():
    looks = (100, 200, 400, 800)
    shares = [record(*looks[: n + 1]).share for n in range(4)]
    assert shares == [1 / 16, 1 / 16, 1 / 8, 3 / 4]
    assert record(800).share == 1
    assert record(100, sizes=5).nominal_level == pytest.approx(LEVEL / 16 / 5)


def test_a_results_file_gives_the_record_back(tmp_path):
    made = record(25, 50, p=0.01, difference=-0.1, scores={"acc,none": (0.25, 0.5)})
    tasks = {"boolq": {"acc,none": [1.0]}}
    read = read_results_file(write_run(tmp_path, tasks, stopping=made.as_dict()))
    found = read.stopping["boolq"]
    assert json.dumps(found.as_dict()) == json.dumps(made.as_dict())
    assert (found.text, read.is_partial("boolq")) == ("partial: 50 of 800", True)


def test_four_looks_err_no_more_often_than_the_level():
    looks = np.array([409, 818, 1635, 3270])
    steps = np.sqrt(np.diff(looks, prepend=0))
    normal = np.random.default_rng(0).normal(size=(40_000, 4))
    p = 2 * stats.norm.sf(np.abs((normal * steps).cumsum(axis=1)) / np.sqrt(looks))
    shares = np.diff([spent(n, 3270) for n in looks.tolist()], prepend=0)
    crossed = (p < LEVEL * shares).any(axis=1).mean()
    # Bonferroni's inequality gives a little away, because looks share their documents.
    assert 0.04 < crossed < LEVEL + 3 * (0.05 * 0.95 / 40_000) ** 0.5


def test_a_record_holds_for_its_metric_and_difference_alone():
    """Without a difference, as where samples were missing at the look, it holds for none."""
    known = record(400, p=0.01, p_margin=0.02, difference=0.1, rule="decided:1pt")
    p, q, claim = sequential(known, "acc,none", 0.1, POINT, 0.01)
    assert (p, q, claim.p, claim.q) == (0.01, 0.01, 0.02, 0.02)
    for metric, difference in (("acc_norm,none", 0.1), ("acc,none", 0.11)):
        none = sequential(known, metric, difference, POINT, 0.01)
        assert none == (None, None, None)
    unknown = record(400, p=0.01, rule="decided:1pt")
    assert sequential(unknown, "acc,none", 0.1, POINT, 0.01) == (None, None, None)


def test_differences_and_a_margin_share_one_level():
    """Of six sizes three have no difference, and three one as large as the margin."""
    shared = {"of": 400, "sizes": 6, "rule": "decided:1pt", "difference": 0.0}

    def wrong(seed):
        ps = np.random.default_rng(seed).random(6).reshape(2, 3).tolist()
        none = [record(400, p=p, p_margin=1e-9, **shared) for p in ps[0]]
        large = [record(400, p=1e-9, p_margin=p, **shared) for p in ps[1]]
        told = [sequential(e, "acc,none", 0.0, POINT, 0.01) for e in none + large]
        q, of_claims = [q for _, q, _ in told[:3]], [claim.q for *_, claim in told[3:]]
        return min(q + of_claims) < LEVEL

    # Holm for each of both questions would be wrong in 9.7 % of sweeps.
    assert np.mean([wrong(seed) for seed in range(4000)]) < 0.055


def test_another_metric_difference_or_margin_has_no_p():
    stopping = record(100, rule="decided:1pt", p=1e-6, difference=-0.4)
    for metric, difference in (("acc_norm,none", -0.4), ("acc,none", -0.3)):
        told = sequential(stopping, metric, difference, POINT, 0.01)
        assert told == (None, None, None)
    other = Margin("equivalent", "2pt")
    p, _, claim = sequential(stopping, "acc,none", -0.4, other, 0.02)
    assert (p, claim) == (1e-6, None)


RIGHT = (np.arange(800) % 2).astype(float)
SOFT = np.linspace(0.2, 0.8, 800)


@pytest.mark.parametrize(
    ("base", "run", "documents", "reason"),
    [
        (RIGHT, 0 * RIGHT, 100, "difference"),
        (RIGHT, RIGHT, 100, ""),
        (RIGHT, RIGHT, 400, "equivalent"),
        (RIGHT, np.roll(RIGHT, 1), 100, ""),
        (RIGHT, np.roll(RIGHT, 1), 800, "all documents"),
        # Too few of scores between right and wrong to be tested at a look.
        (SOFT, SOFT / 2, 400, ""),
        (SOFT, SOFT / 2, 500, "difference"),
    ],
)
def test_a_look_tests_the_documents_so_far_at_its_share_of_the_level(
    base, run, documents, reason, tmp_path
):
    metric = "acc,none" if base is RIGHT else "mc2,none"
    runs = [
        read_run(write_run(tmp_path / name, {"boolq": {metric: values.tolist()}}))
        for name, values in (("base", base), ("run", run[:documents]))
    ]
    before = Stopping("decided:2pt", "boolq", 800, LEVEL, 2)
    found = look(before, documents, *runs)
    assert (found.metric, found.looks, found.reason) == (metric, (documents,), reason)
    test = paired_difference(base[:documents], run[:documents])
    assert found.difference == pytest.approx(test.difference)
    tested = base is RIGHT or documents >= 500
    ps = (test.p, test.p_outside(-0.02, 0.02)) if tested else (1, 1)
    ps = [min(1, p / found.share) for p in ps]
    assert (found.p, found.p_margin) == pytest.approx(ps)
    # What is noted is what the comparison of the stopped unit says.
    margin = Margin("equivalent", "2pt")
    p, q, claim = sequential(found, metric, test.difference, margin, 0.02)
    assert (p, q) == pytest.approx((ps[0], min(1, 2 * ps[0])))
    assert claim.q == pytest.approx(min(1, 2 * ps[1]))
    # An earlier look that showed more counts.
    surer = Stopping("decided:2pt", "boolq", 800, LEVEL, 2, p=1e-9, p_margin=1e-8)
    later = look(surer, documents, *runs)
    assert (later.p, later.p_margin) == (min(ps[0], 1e-9), min(ps[1], 1e-8))
