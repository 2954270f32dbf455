"""How far the statistics can be trusted: ``python benchmarks/coverage.py [--times 1500]``.

Simulates every test that is offered on data whose truth is known. Prints how often 95 % intervals
cover the truth; how often p is below 0.05 if there is no difference (one-sided: the worse of the
two sides); and how often a margin is claimed wrongly (at the worse of its ends) and rightly. ``docs/statistics.md`` has the tables.
All data are synthetic; nothing is drawn twice: the same ``--times`` prints the same.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from coverage_of_verdicts import COLUMNS, verdicts
from scipy import stats
from tqdm import tqdm

from lm_eval_pruned.compare import statistics, trends
from lm_eval_pruned.compare.claims import Test, paired, unpaired
from lm_eval_pruned.util.tables import csv_table, markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable

    #: Makes one test of `units` units whose true difference is `shift`.
    Draw = Callable[[np.random.Generator, int, float], Test]

ALPHA = 0.05
SIZES = (4.0, 3.6, 3.2, 2.8, 2.4, 2.0, 1.6)


def gains(noise: Callable[[np.random.Generator, int], np.ndarray]) -> Draw:
    """Differences of single documents, of scores without bounds, with a noise of mean 0."""

    def draw(rng: np.random.Generator, units: int, shift: float) -> Test:
        base = np.full(units, 2.0)
        return paired(base, base + shift + noise(rng, units))

    return draw


def changes(share: float) -> Draw:
    """Right-or-wrong documents of which a share changes, or more if `shift` needs it."""

    def draw(rng: np.random.Generator, units: int, shift: float) -> Test:
        changing = max(share, abs(shift))
        up = (changing + shift) / 2
        ups, downs, _ = rng.multinomial(units, [up, changing - up, 1 - changing])
        return _right_or_wrong(int(ups), int(downs), units)

    return draw


@functools.cache
def _right_or_wrong(ups: int, downs: int, units: int) -> Test:
    base, run = np.zeros(units), np.zeros(units)
    run[:ups] = base[ups : ups + downs] = 1
    return paired(base, run, limits=(0, 1))


def clusters(sizes: Callable[[np.random.Generator, int], np.ndarray]) -> Draw:
    """Documents that gain or lose with the others of their cluster."""

    def draw(rng: np.random.Generator, units: int, shift: float) -> Test:
        index = np.repeat(np.arange(units), sizes(rng, units))
        run = shift + rng.normal(size=units)[index] + rng.normal(size=len(index))
        return paired(np.zeros(len(index)), run, clusters=index.tolist())

    return draw


def strata(rng: np.random.Generator, units: int, shift: float) -> Test:
    """Subjects of 5 to 15 documents, a mean of their means; each has its own effect."""
    subjects = np.arange(units) % 10
    sizes = np.bincount(subjects)
    effects = np.linspace(-1, 1, 10)
    run = shift + effects[subjects] + rng.normal(size=units)
    return paired(
        np.zeros(units), run, weights=1 / sizes[subjects], strata=subjects.tolist()
    )


def perplexity(rng: np.random.Generator, units: int, shift: float) -> Test:
    """Perplexity over words of long and short documents; the shift is in perplexity."""
    words = rng.integers(5, 200, size=units).astype(float)
    base = rng.normal(-3, 0.5, size=units)
    run = base - np.log1p(shift * np.exp(-3)) + rng.normal(0, 0.2, size=units)
    return paired(base, run, weights=words, transform="perplexity")


def stderrs(rng: np.random.Generator, units: int, shift: float) -> Test:
    """Two runs on the same documents, of which only the standard errors are known."""
    base = rng.normal(size=units)
    run = base + shift + rng.normal(0, 0.5, size=units)
    errors = (each.std(ddof=1) / np.sqrt(units) for each in (base, run))
    return unpaired(run.mean() - base.mean(), *errors)


def walk(rng: np.random.Generator, units: int, shift: float) -> np.ndarray:
    """Right-or-wrong documents over nested sizes: what changed once stays or changes back.

    Returns:
        Shape (sizes, units).
    """
    steps = np.zeros((len(SIZES), units), dtype=bool)
    steps[0] = rng.random(units) < 0.5
    for number in range(1, len(SIZES)):
        lost = rng.random(units) < 0.03 + shift
        won = rng.random(units) < 0.03
        steps[number] = np.where(steps[number - 1], ~lost, won)
    return steps.astype(float)


def slopes(rng: np.random.Generator, units: int, shift: float) -> Test:
    """Slopes of the documents of `walk`, all of which the shift tilts."""
    documents = walk(rng, units, 0.0) + shift * np.array(SIZES)[:, None]
    return trends.trend(SIZES, documents)


#: Name of the test, data, generator, numbers of units.
CASES: list[tuple[str, str, Draw, tuple[int, ...]]] = [
    ("McNemar's exact test", "2 % of answers change", changes(0.02), (100, 800)),
    (
        "McNemar's exact test",
        "30 % of answers change",
        changes(0.3),
        (20, 60, 150, 800),
    ),
    (
        "Gaffke, documents",
        "normal",
        gains(lambda r, n: r.normal(size=n)),
        (10, 40, 200),
    ),
    (
        "Gaffke, documents",
        "heavy tails (Student's with 3 degrees)",
        gains(lambda r, n: r.standard_t(3, size=n)),
        (10, 40, 200),
    ),
    (
        "Gaffke, documents",
        "skewed (exponential)",
        gains(lambda r, n: r.exponential(size=n) - 1),
        (10, 20, 40, 80, 200),
    ),
    (
        "Gaffke, documents",
        "10 % of documents change by 1/2 or 1",
        gains(
            lambda r, n: r.choice(
                [-1, -0.5, 0, 0.5, 1], size=n, p=[0.02, 0.03, 0.9, 0.03, 0.02]
            )
        ),
        (40, 100, 500),
    ),
    ("Gaffke, documents", "perplexity over words", perplexity, (20, 60, 200)),
    ("Gaffke, strata", "10 subjects, mean of means", strata, (55, 200)),
    (
        "Gaffke, clusters",
        "of 20 documents",
        clusters(lambda r, n: np.full(n, 20)),
        (12, 25, 57),
    ),
    (
        "Gaffke, clusters",
        "of 1 to 40 documents",
        clusters(lambda r, n: r.integers(1, 41, size=n)),
        (12, 25, 57),
    ),
    ("z on stderrs", "correlated runs, samples lost", stderrs, (100,)),
    ("Gaffke, slopes", "7 nested sizes, 3 % change at each", slopes, (50, 200, 800)),
]


def simulate(draw: Draw, units: int, times: int, shift: float = 0.0):
    """Return p, difference, and the ends of the interval of `times` tests, each (times,)."""
    rows = []
    for seed in range(times):
        test = draw(np.random.default_rng([seed, units]), units, shift)
        rows.append([1.0 if test.p is None else test.p, test.difference])
        rows[-1] += [np.nan if end is None else end for end in test.interval()]
    return np.array(rows).T


def line(draw: Draw, units: int, times: int) -> list[str]:
    """Return coverage and both levels without a difference."""
    p, difference, low, high = simulate(draw, units, times)
    one_sided = max(
        ((p < 2 * ALPHA) & (sign * difference > 0)).mean() for sign in (-1, 1)
    )
    # No test, no interval: nothing was claimed that could be wrong.
    covered = ~((low > 1e-12) | (high < -1e-12))
    cells = [covered.mean(), (p < ALPHA).mean(), one_sided]
    return [f"{cell:.3f}" for cell in cells]


def one_way() -> list[list[Any]]:
    """Return rows on answers that change for the worse only, counted out over all outcomes."""
    rows: list[list[Any]] = []
    for units in (30, 64, 400):
        for share in (0.01, 0.03, 0.1, 0.3):
            covered = wrongly = 0.0
            for downs in range(units + 1):
                chance = float(stats.binom.pmf(downs, units, share))
                test = _right_or_wrong(0, downs, units)
                low, high = test.interval()
                assert low is not None
                assert high is not None
                covered += chance * (low <= -share <= high)
                p = test.p_margin(share, None, 1)
                wrongly += chance * (p is not None and p < ALPHA)
            rows.append([f"{share:.0%}", units, f"{covered:.3f}", f"{wrongly:.3f}"])
    return rows


def correlations(times: int) -> list[list[Any]]:
    """Return rows on correlations: independent points, and steps of pruning."""
    rows: list[list[Any]] = []
    for n in (4, 5, 7, 10):
        for truth in (0.0, 0.8):
            covered = rejected = 0
            for seed in range(times):
                rng = np.random.default_rng([seed, n])
                x, noise = rng.normal(size=(2, n))
                y = truth * x + np.sqrt(1 - truth**2) * noise
                _, low, high = trends.correlate(x, y)
                covered += low <= truth <= high
                rejected += not low <= 0 <= high
            shares = [f"{hits / times:.3f}" for hits in (covered, rejected)]
            rows.append([f"independent, true r = {truth}", n, *shares, ""])
    for name, shift in (("no trend", 0.0), ("one trend", 0.03)):
        rejected = both = 0
        for seed in range(times):
            rng = np.random.default_rng([seed, 200])
            one, other = walk(rng, 200, shift), walk(rng, 200, 0.0)
            _, low, high = trends.correlate(one.mean(axis=1), other.mean(axis=1))
            rejected += not low <= 0 <= high
            both += max(trends.trend(SIZES, each).p for each in (one, other)) < ALPHA
        shares = [f"{hits / times:.3f}" for hits in (rejected, both)]
        what = f"unrelated tasks over nested sizes, {name}"
        rows.append([what, len(SIZES), "", *shares])
    return rows


def restated(times: int) -> list[list[Any]]:
    """Return rows on tables: how often one null run is marked in any metric of a task."""
    rows: list[list[Any]] = []
    for certain in (0, 5, 18):
        marked = {1: 0, 4: 0}
        for seed in range(times):
            rng = np.random.default_rng([seed, certain])
            # Four metrics of the same answers, as IFEval's, correlated at 0.8.
            z = np.sqrt(0.8) * rng.normal() + np.sqrt(0.2) * rng.normal(size=4)
            p = 2 * stats.norm.sf(abs(z))
            for metrics in marked:
                family = [*p[:metrics], *[1e-9] * certain]
                adjusted = statistics.false_discovery(family)[:metrics]
                marked[metrics] += min(adjusted)[0] < ALPHA  # type: ignore[type-var,operator]
        rows.append([certain, *(f"{marked[n] / times:.3f}" for n in (4, 1))])
    return rows


def families(times: int) -> list[list[Any]]:
    """Return rows on how many of 162 true nulls are marked beside 54 certainties.

    Four tasks and 54 runs of each, of which 18 are random controls; one task is certain.
    """
    tasks = np.repeat(np.arange(4), 54)
    controls = np.tile(np.arange(54) < 18, 4)
    certain = tasks == 3
    apart = list(zip(tasks.tolist(), controls.tolist(), strict=True))
    rows: list[list[Any]] = []
    for name, labels, of in (
        ("one family of 216", None, ~certain),
        ("a family for each task, controls apart", apart, (tasks == 0) & ~controls),
    ):
        found = []
        for seed in range(times):
            p = np.random.default_rng(seed).random(216)
            p[certain] = 1e-9
            q = np.array(statistics.false_discovery(p.tolist(), labels))[:, 0]
            found.append((q[of] < ALPHA).sum())
        shares = (np.mean(found), np.mean(np.array(found) > 0))
        rows.append([name, int(of.sum()), *(f"{share:.3f}" for share in shares)])
    return rows


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1500, help="tests per line")
    parser.add_argument("--verdicts", help="simulate only verdicts, into this CSV file")
    arguments = parser.parse_args()
    times = arguments.times
    if arguments.verdicts:
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in verdicts(times)]
        Path(arguments.verdicts).write_text(csv_table(rows), encoding="utf-8")
        return
    cells = [(*case[:3], units) for case in CASES for units in case[3]]
    rows = [
        [name, data, units, *line(draw, units, times)]
        for name, data, draw, units in tqdm(cells)
    ]
    columns = ["test", "data", "units", "coverage", "p < 0.05", "one-sided p < 0.05"]
    print(markdown_table(columns, rows, "llrrrr"))
    print("\n" + markdown_table(COLUMNS, verdicts(times), "llrrrrr"))
    columns = ["become wrong, none right", "units", "coverage", "wrongly not worse"]
    print("\n" + markdown_table(columns, one_way(), "rrrr"))
    columns = ["points", "n", "coverage of r", "0 outside", "p both"]
    print("\n" + markdown_table(columns, correlations(times)))
    columns = ["runs that differ for certain", "four metrics in the correction", "one"]
    print("\n" + markdown_table(columns, restated(times), "rrr"))
    columns = ["correction", "true nulls in a family", "wrongly shown", "at least one"]
    print("\n" + markdown_table(columns, families(times), "lrrr"))


if __name__ == "__main__":
    main()
