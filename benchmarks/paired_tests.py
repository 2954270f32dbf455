"""What pairing is worth: ``python benchmarks/paired_tests.py [--times 4000]``.

Simulates two runs on the same documents, and prints how often each test calls them different
(p < 0.05): the unpaired z test on standard errors, McNemar's exact test, and what
``lm-eval-pruned compare`` does. The table stands in ``docs/upstream/paired-comparison.md``. All data
are synthetic; nothing is drawn twice: the same ``--times`` prints the same.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter

import numpy as np
from scipy import stats

from lm_eval_pruned.compare.statistics import paired_difference
from lm_eval_pruned.util.tables import markdown_table


ALPHA = 0.05
#: Half of the documents are hard, half easy, for both runs.
HARD, EASY = 0.45, 0.85
#: Questions about one passage, and by how much the two runs differ on it, up or down.
PASSAGE, SHARED = 5, 0.15
#: Documents, true difference, and whether they come in passages.
CASES = (
    (200, 0.0, False),
    (200, 0.05, False),
    (500, 0.03, False),
    (2000, 0.02, False),
    (500, 0.0, True),
)
TESTS = ("unpaired z test", "exact McNemar", "this script, documents", "this script")


def draw(
    rng: np.random.Generator, n: int, difference: float, passages: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return which documents two runs get right, shape (n,) each."""
    right = np.where(np.arange(n) % 2, EASY, HARD)
    shift = np.full(n, difference)
    if passages:
        shift += np.repeat(rng.choice([-SHARED, SHARED], n // PASSAGE), PASSAGE)
    return rng.random(n) < right, rng.random(n) < right + shift


def found(base: np.ndarray, run: np.ndarray, passages: bool) -> dict[str, bool]:
    """Return which of `TESTS` call two runs different."""
    n = len(base)
    shares = base.mean(), run.mean()
    # As scripts/model_comparator.py of the harness, from the standard errors that it reports.
    variances = (share * (1 - share) / (n - 1) for share in shares)
    z = (shares[1] - shares[0]) / np.sqrt(sum(variances))
    up, down = int((run & ~base).sum()), int((base & ~run).sum())
    clusters = [str(i // PASSAGE) for i in range(n)]
    ours = _mid_p(up, down, n)
    if passages:
        test = paired_difference(base, run, clusters=clusters)
        assert test.p is not None
    p_values = (
        2 * stats.norm.sf(abs(z)),
        stats.binomtest(up, up + down).pvalue,
        ours,
        test.p if passages else ours,
    )
    return {name: bool(p < ALPHA) for name, p in zip(TESTS, p_values, strict=True)}


@functools.cache
def _mid_p(up: int, down: int, n: int) -> float:
    run = np.r_[np.ones(up), np.zeros(n - up)]
    base = np.r_[np.zeros(up), np.ones(down), np.zeros(n - up - down)]
    p = paired_difference(base, run).p
    assert p is not None
    return p


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=4000, metavar="N")
    times = parser.parse_args().times
    rows = []
    for number, (n, difference, passages) in enumerate(CASES):
        rng = np.random.default_rng(number)
        counts: Counter[str] = Counter()
        for _ in range(times):
            counts.update(found(*draw(rng, n, difference, passages), passages))
        documents = f"{n} in passages of {PASSAGE}" if passages else n
        shares = (f"{counts[name] / times:.3f}" for name in TESTS)
        rows.append(
            [documents, f"{difference:+.0%}" if difference else "none", *shares]
        )
    header = ["documents", "true difference", *TESTS]
    print(markdown_table(header, rows, "lrrrrr"))


if __name__ == "__main__":
    main()
