"""How often tests show a difference that does not exist: ``python benchmarks/coverage.py [--times 1500]``.

Writes ``docs/measurements/coverage.csv``: how often p is below 0.05, so that a 95 % interval leaves out the truth,
and how often that of one side is, the worse one. ``coverage_of_verdicts.py`` has margins.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from lm_eval_pruned.compare import trends
from lm_eval_pruned.compare.claims import Test, paired, unpaired
from lm_eval_pruned.util.tables import csv_table


if TYPE_CHECKING:
    from collections.abc import Callable

    #: Makes one test of so many units, of a difference that does not exist.
    Draw = Callable[[np.random.Generator, int], Test]

CSV = Path(__file__).parents[1] / "docs" / "measurements" / "coverage.csv"
ALPHA = 0.05
SIZES = (4.0, 3.6, 3.2, 2.8, 2.4, 2.0, 1.6)


def gains(noise: Callable[[np.random.Generator, int], np.ndarray]) -> Draw:
    """Differences of single documents, of scores without limits, with a noise of mean 0."""

    def draw(rng: np.random.Generator, units: int) -> Test:
        return paired(np.full(units, 2.0), 2.0 + noise(rng, units))

    return draw


def changes(share: float) -> Draw:
    """Right-or-wrong documents of which a share changes."""

    def draw(rng: np.random.Generator, units: int) -> Test:
        base = (rng.random(units) < 0.5).astype(float)
        run = np.where(rng.random(units) < share, 1 - base, base)
        return paired(base, run, limits=(0, 1))

    return draw


def clusters(sizes: Callable[[np.random.Generator, int], np.ndarray]) -> Draw:
    """Documents that gain or lose with the others of their cluster."""

    def draw(rng: np.random.Generator, units: int) -> Test:
        index = np.repeat(np.arange(units), sizes(rng, units))
        run = rng.normal(size=units)[index] + rng.normal(size=len(index))
        return paired(np.zeros(len(index)), run, clusters=index.tolist())

    return draw


def strata(rng: np.random.Generator, units: int) -> Test:
    """Subjects of 5 to 15 documents, a mean of their means; each has its own effect."""
    subjects = np.arange(units) % 10
    weights = 1 / np.bincount(subjects)[subjects]
    run = np.linspace(-1, 1, 10)[subjects] + rng.normal(size=units)
    return paired(np.zeros(units), run, weights=weights, strata=subjects.tolist())


def perplexity(rng: np.random.Generator, units: int) -> Test:
    """Perplexity over words of long and short documents."""
    words = rng.integers(5, 200, size=units).astype(float)
    base = rng.normal(-3, 0.5, size=units)
    run = base + rng.normal(0, 0.2, size=units)
    return paired(base, run, weights=words, transform="perplexity")


def stderrs(rng: np.random.Generator, units: int) -> Test:
    """Two runs on the same documents, of which only the standard errors are known."""
    base = rng.normal(size=units)
    run = base + rng.normal(0, 0.5, size=units)
    errors = (each.std(ddof=1) / math.sqrt(units) for each in (base, run))
    return unpaired(run.mean() - base.mean(), *errors)


def walk(rng: np.random.Generator, units: int) -> np.ndarray:
    """Right-or-wrong documents over nested sizes, shape (sizes, units): what changed stays or changes back."""
    steps = [rng.random(units) < 0.5]
    for _ in SIZES[1:]:
        steps.append(steps[-1] ^ (rng.random(units) < 0.03))
    return np.array(steps, float)


def slopes(rng: np.random.Generator, units: int) -> Test:
    """Slopes of the documents of `walk`."""
    return trends.trend(SIZES, walk(rng, units))


def skewed(rng: np.random.Generator, units: int) -> np.ndarray:
    """Gains of which few are large, around 0."""
    return rng.exponential(size=units) - 1


def few(share: float) -> Draw:
    """Gains and losses of a share of the documents."""
    sizes = [-1, -0.5, 0.5, 1]
    return gains(lambda r, n: r.choice(sizes, n) * (r.random(n) < share))


EXACT, DOCUMENTS, CLUSTERS = (
    "McNemar's exact test",
    "Gaffke, documents",
    "Gaffke, clusters",
)
#: Name of the test, data, what draws them, numbers of units.
CASES: list[tuple[str, str, Draw, tuple[int, ...]]] = [
    (EXACT, "2 % of answers change", changes(0.02), (20, 100, 150, 800)),
    (EXACT, "30 % of answers change", changes(0.3), (20, 60, 150, 800)),
    (DOCUMENTS, "normal", gains(lambda r, n: r.normal(size=n)), (10, 40, 200)),
    (
        DOCUMENTS,
        "heavy tails (Student's with 3 degrees)",
        gains(lambda r, n: r.standard_t(3, size=n)),
        (10, 40, 200),
    ),
    (DOCUMENTS, "skewed (exponential)", gains(skewed), (10, 20, 40, 80, 200)),
    (DOCUMENTS, "2 % change by 1/2 or 1", few(0.02), (40, 100, 500)),
    (DOCUMENTS, "10 % change by 1/2 or 1", few(0.1), (40, 100, 500)),
    (DOCUMENTS, "perplexity over words", perplexity, (20, 60, 200)),
    ("Gaffke, strata", "10 subjects, mean of means", strata, (55, 200)),
    (CLUSTERS, "of 20 documents", clusters(lambda r, n: np.full(n, 20)), (12, 25, 57)),
    (
        CLUSTERS,
        "of 1 to 40 documents",
        clusters(lambda r, n: r.integers(1, 41, size=n)),
        (12, 25, 57),
    ),
    ("z on stderrs", "correlated runs, samples lost", stderrs, (100,)),
    ("Gaffke, slopes", "7 nested sizes, 3 % change at each", slopes, (50, 200, 800)),
]


def line(draw: Draw, units: int, times: int) -> list[float]:
    """Return how often a test is below its level, of both sides and of the worse one."""
    shown = np.zeros((times, 3), bool)
    for seed in range(times):
        test = draw(np.random.default_rng([seed, units]), units)
        ps = test.p, test.p_beyond(0.0, 1), test.p_beyond(0.0, -1)
        shown[seed] = [p is not None and p < ALPHA for p in ps]
    both, *sides = shown.mean(0)
    return [both, max(sides)]


def correlated(draw: Callable[..., tuple[np.ndarray, ...]], n: int, times: int):
    """Return how often an interval of r leaves out 0."""
    ends = (
        trends.correlate(*draw(np.random.default_rng([s, n])))[1:] for s in range(times)
    )
    return [np.mean([not low <= 0 <= high for low, high in ends])]


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1500, help="tests per line")
    times = parser.parse_args().times
    cells = [(*case[:3], units) for case in CASES for units in case[3]]
    lines = [
        (name, data, units, *line(draw, units, times))
        for name, data, draw, units in tqdm(cells)
    ]
    for n in (4, 5, 7, 10):
        found = correlated(lambda rng, n=n: rng.normal(size=(2, n)), n, times)
        lines.append(("interval of r", "independent points", n, *found))
    found = correlated(
        lambda rng: [walk(rng, 200).mean(axis=1) for _ in range(2)], len(SIZES), times
    )
    lines.append(("interval of r", "unrelated tasks, nested sizes", len(SIZES), *found))
    columns = ("test", "data", "units", "p < 0.05", "one-sided p < 0.05")
    rows = [
        dict(zip(columns, (*row[:3], *(f"{x:.3f}" for x in row[3:])), strict=False))
        for row in lines
    ]
    CSV.write_text(csv_table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
