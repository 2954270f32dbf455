"""A small part of the grid of ``benchmarks/coverage_of_verdicts.py``: wrong claims are as rare as their level says."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest

from tests.helpers import checkpoints


pytestmark = pytest.mark.slow
TIMES = 1000
FLIPS, RARE = "right or wrong, losses only", "probability, rare losses"


@pytest.fixture(scope="module")
def grid():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(checkpoints.ROOT / "benchmarks"))
        yield importlib.import_module("coverage_of_verdicts")


def kept(grid, data, share, floor, base, units):
    claim = grid.Claim(grid.SHARES, ((floor, base),), share=share)
    cell = grid.Cell("kept", claim, data, floor, base, units, "alone")
    grid.check_truth(cell)
    return cell


def at_most(level, times=TIMES):
    return level + 3 * math.sqrt(level * (1 - level) / times)


@pytest.mark.parametrize(
    ("data", "share", "floor", "base", "units"),
    [
        *((FLIPS, 0.05, 0.25, 0.625, units) for units in (12, 20, 40, 60, 200)),
        *((RARE, 0.05, 0, 0.6, units) for units in (10, 20, 30, 60)),
        *((RARE, 0.1, 0, 0.6, units) for units in (10, 20, 30, 60)),
    ],
)
def test_a_loss_of_the_margin_is_rarely_shipped(grid, data, share, floor, base, units):
    cell = kept(grid, data, share, floor, base, units)
    [[ships, *_]] = grid.rates(cell, TIMES, seed=units, truths=(True,))
    assert ships <= at_most(0.05)


@pytest.mark.parametrize("units", [20, 50, 100])
def test_the_interval_of_what_is_kept_rarely_lies_above_the_truth(grid, units):
    cell, times = kept(grid, "right or wrong", 0.05, 0.25, 0.625, units), 400
    rng = np.random.default_rng(units)
    intervals = [cell.test(rng, True).kept(0.05) for _ in range(times)]
    lows = [kept.low for kept in intervals if kept and kept.low is not None]
    assert len(lows) > times / 2
    assert sum(low > 0.95 for low in lows) / times <= at_most(0.025, times)
