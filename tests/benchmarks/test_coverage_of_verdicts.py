"""A fixed part of the grid of claims: how often each is wrong where the truth is known."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest

from lm_eval_pruned.compare.claims import paired
from tests.helpers import checkpoints


@pytest.fixture(scope="module")
def coverage():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(checkpoints.ROOT / "benchmarks"))
        yield importlib.import_module("coverage_of_verdicts")


TIMES = 200
#: 5 %, and three standard errors of so many comparisons.
MOST = 0.05 + 3 * math.sqrt(0.05 * 0.95 / TIMES)


def test_a_base_and_a_run_have_the_means_that_a_cell_says(coverage):
    for cell in [*coverage.grid()][::24]:
        rng = np.random.default_rng(0)
        base, run = cell.data.values(rng, 200_000, cell.mean, cell.loss)
        lost, spread = (base - run).mean(), (base - run).std() / math.sqrt(len(base))
        assert lost == pytest.approx(cell.loss, abs=5 * spread + 1e-9), cell


@pytest.mark.slow
@pytest.mark.parametrize("units", [10, 20, 40, 60, 300])
@pytest.mark.parametrize(
    ("claim", "data"),
    [
        ("kept", "right or wrong"),
        ("kept", "right or wrong, losses only"),
        ("kept", "probability, rare losses of 0.4"),
        ("difference", "right or wrong"),
        ("bias", "right or wrong"),
        ("pooled", "probability, rare losses of 0.4"),
    ],
)
def test_a_loss_of_the_margin_ships_and_none_is_refused_in_5_percent_at_most(
    coverage, claim, data, units
):
    for number, cell in enumerate(coverage.grid()):
        if (cell.claim, cell.data.name, cell.units) != (claim, data, units):
            continue
        if cell.grouping != "alone" or (claim == "kept" and cell.base == "near"):
            continue
        ships, refused, *_ = map(float, coverage.rates(cell, number, TIMES)[7:])
        assert max(ships, refused) <= MOST, cell


@pytest.mark.slow
@pytest.mark.parametrize("units", [20, 50, 100])
def test_the_interval_of_what_is_kept_covers_right_or_wrong_scores(units):
    """A base that has half of them right, floor 0.25, and a run that keeps 90 %; nominal 2.5 %."""
    missed = 0
    for seed in range(TIMES):
        rng = np.random.default_rng([units, seed])
        base = (rng.random(units) < 0.5).astype(float)
        run = np.where(rng.random(units) < 0.05, 0.0, base)
        found = paired(base, run, 0.25, limits=(0, 1)).kept(0.05)
        missed += found is not None and found[1] is not None and found[1] > 0.9
    assert missed / TIMES <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / TIMES)
