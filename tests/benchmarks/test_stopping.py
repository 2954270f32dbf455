"""What `benchmarks/stopping.py` prints, and that stopping errs no more often than it says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lm_eval_pruned.compare.statistics import paired_difference
from tests.helpers import checkpoints


STUDY = checkpoints.ROOT / "tests" / "data" / "study_benchmarks.csv"


@pytest.fixture(scope="module")
def stopping(script):
    return script("stopping")


def test_wrong_decisions_are_within_the_family_wise_level(stopping):
    """Of seven sizes, in 95 % of sweeps none; bounded as 400 sweeps allow."""
    lines = stopping.errors(400).splitlines()[2:]
    assert len(lines) == 8
    most = stats.binom.isf(0.001, 400, 0.05)
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert float(cells[3].rstrip("%")) / 100 * 400 <= most, line


def test_the_study_is_replayed_with_the_verdicts_of_all_documents(stopping):
    cases = stopping.read_study(STUDY)
    assert len(cases) == 28
    found = stopping.study(cases, 20, 0.45)
    same = np.concatenate([each.same for each in found])
    saving = np.concatenate([each.saving for each in found])
    shown = np.concatenate([each.shown for each in found]) > 0.5
    assert same.mean() >= 0.95
    assert np.median(saving[shown]) >= 4
    rows = stopping.as_table(found).splitlines()
    assert rows[-1].startswith("|all|-|150|")


def test_the_benchmark_makes_the_p_values_of_compare(stopping):
    rng = np.random.default_rng(0)
    base, run = rng.random(520), rng.random(520) ** 1.2
    p = stopping.mean_p((run - base)[None], np.array([400, 520]))[0]
    assert p[0] == 1
    assert p[1] == pytest.approx(paired_difference(base, run).p, rel=1e-6)
    right = paired_difference([1, 0, 0, 0, 1], [0, 1, 1, 1, 1])
    found = stopping.mid_p(np.array([3]), np.array([1]))
    assert found[0] == pytest.approx(right.p)


def test_all_documents_are_tested_after_holm(stopping):
    p = np.array([[0.01, 0.04, 0.03], [0.001, 0.02, 0.2]])
    assert stopping.holm(p).tolist() == [[True, False, False], [True, True, False]]
