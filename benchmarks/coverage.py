"""How far the statistics can be trusted: ``python benchmarks/coverage.py [--times 1500]``.

Simulates comparisons whose true difference is known, and prints the share of 95 %
intervals that hold it and, where there is no difference, the share of p below 0.05.
All data are synthetic. The table stands in ``docs/statistics.md``.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from lm_eval_pruned.statistics import paired_difference


if TYPE_CHECKING:
    from collections.abc import Callable

    Draw = Callable[[np.random.Generator, int], tuple[Any, Any, dict[str, Any]]]


def normal(rng: np.random.Generator, units: int):
    """Differences of a normal distribution around 0."""
    return np.zeros(units), rng.normal(size=units), {}


def exponential(rng: np.random.Generator, units: int):
    """Differences of an exponential distribution, shifted to mean 0."""
    return np.zeros(units), rng.exponential(size=units) - 1, {}


def clusters(rng: np.random.Generator, units: int, size: int = 20):
    """Right-or-wrong documents in clusters that each gain or lose together."""
    base = np.repeat(rng.uniform(0.3, 0.7, units), size)
    run = np.repeat(rng.uniform(0.3, 0.7, units), size)
    names = [str(i // size) for i in range(units * size)]
    draws = rng.random((2, units * size))
    return draws[0] < base, draws[1] < run, {"clusters": names}


def unchanged(rng: np.random.Generator, units: int):
    """Right-or-wrong documents of which 15 % change each way."""
    u = rng.random(units)
    return u < 0.15, u >= 0.85, {}


def worse(rng: np.random.Generator, units: int):
    """Right-or-wrong documents: 0.45 of them before, 0.10 after."""
    u = rng.random(units)
    return u < 0.45, u > 0.9, {}


#: Name, generator, true difference, numbers of units.
CASES: list[tuple[str, Draw, float, tuple[int, ...]]] = [
    ("bootstrap, normal differences", normal, 0, (10, 20, 40, 80)),
    ("bootstrap, exponential differences", exponential, 0, (10, 20, 40, 80)),
    ("clusters of 20 right-or-wrong documents", clusters, 0, (12, 25, 57)),
    ("right or wrong, 15 % change each way", unchanged, 0, (20, 60, 150, 800)),
    ("right or wrong, from 0.45 to 0.10", worse, -0.35, (20, 60, 150, 800)),
]


def simulate(draw: Draw, truth: float, units: int, times: int) -> tuple[float, float]:
    """Return the shares of intervals that hold the truth, and of p below 0.05."""
    covered = rejected = 0
    for seed in range(times):
        base, run, options = draw(np.random.default_rng(seed), units)
        result = paired_difference(base, run, resamples=999, **options)
        assert result.low is not None
        assert result.high is not None
        assert result.p is not None
        covered += result.low <= truth <= result.high
        rejected += result.p < 0.05
    return covered / times, rejected / times


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1500, help="comparisons per line")
    times = parser.parse_args().times
    lines = []
    cells = [(*case[:3], units) for case in CASES for units in case[3]]
    for name, draw, truth, units in tqdm(cells):
        coverage, rejected = simulate(draw, truth, units, times)
        error = f"{rejected:.3f}" if truth == 0 else ""
        lines.append(f"| {name} | {units} | {coverage:.3f} | {error} |")
    print("| scores | units | coverage of the 95 % interval | share of p < 0.05 |")
    print("| --- | ---: | ---: | ---: |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
