"""How likely a comparison reaches a verdict, from how many answers changed in an earlier one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lm_eval_pruned.compare.statistics.mcnemar import rejects, tails
from lm_eval_pruned.compare.statistics.paired_test import POWER


if TYPE_CHECKING:
    from collections.abc import Callable

#: Beyond so many documents that change, the counts are taken for normal.
_MOST_COUNTED = 200
#: No benchmark has more documents.
_MOST_DOCUMENTS = 10_000_000


def claim_power_of_shares(
    changed: float, n: int, margin: float, alpha: float, *, both_sides: bool
) -> float:
    """Return the chance that right-or-wrong documents show a claim that is true.

    As many answers become right as wrong: there is no difference.

    Args:
        changed: Share of the documents whose answer changes.
        n: Documents.
        margin: See `lm_eval_pruned.compare.margins.Margin`, as a share of documents.
        alpha: Level of the one-sided tests.
        both_sides: Whether equivalence is claimed; else that the run is not worse.

    Returns:
        Counted out over all outcomes of the tests that are made; with many changes from
        the normal distribution.
    """
    if n * changed > _MOST_COUNTED:
        return claim_power_of_means(
            math.sqrt(changed / n), n - 1, margin, alpha, both_sides=both_sides
        )
    many = stats.binom(n, changed)
    counts = np.arange(max(0, many.ppf(1e-7)), many.isf(1e-7) + 1).astype(int)
    power, ups = 0.0, 0
    for count, chance in zip(counts.tolist(), many.pmf(counts), strict=True):
        # One change more asks for one more that becomes right, or none.
        ups = _fewest(count, n, margin, alpha, ups)
        coin = stats.binom(count, 0.5)
        last = count - ups if both_sides else count
        power += chance * max(0.0, coin.cdf(last) - coin.cdf(ups - 1))
    return float(power)


def _fewest(count: int, n: int, margin: float, alpha: float, at_least: int) -> int:
    """Return how many of `count` changes have to be for the better to show the claim."""
    for ups in range(at_least, count + 1):
        above = (2 * ups - count) / n > -margin
        if above and tails(ups, count - ups, n, -margin)[0] < alpha:
            return ups
    return count + 1


def claim_power_of_means(
    stderr: float, degrees: int, margin: float, alpha: float, *, both_sides: bool
) -> float:
    """Return the chance that a t test of means shows a claim that is true.

    Args:
        stderr: Standard error of the difference.
        degrees: Degrees of freedom.
        margin: In the unit of `stderr`.
        alpha: Level of the one-sided tests.
        both_sides: Whether equivalence is claimed; else that the run is not worse.

    Source: the noncentral t distribution (Phillips 1990, Journal of Pharmacokinetics and
        Biopharmaceutics 18, 137-144), whose two tails are taken for exclusive.
    """
    if stderr == 0:
        return 1.0
    student = stats.t(degrees)
    missed = float(
        stats.nct.cdf(student.isf(alpha), degrees, min(max(margin, 0.0) / stderr, 37.0))
    )
    return max(0.0, 1 - (2 if both_sides else 1) * missed)


def difference_power_of_shares(
    changed: float, n: int, difference: float, alpha: float
) -> float:
    """Return the chance that McNemar's test sees a difference of right-or-wrong documents."""
    return rejects(max(changed, difference), n, difference, alpha / 2)


def difference_power_of_means(
    stderr: float, degrees: int, difference: float, alpha: float
) -> float:
    """Return the chance that a two-sided t test of means sees a difference."""
    if stderr == 0:
        return 1.0
    critical = float(stats.t.isf(alpha / 2, degrees))
    return float(stats.nct.sf(critical, degrees, min(difference / stderr, 37.0)))


def documents_for(power: Callable[[int], float], n: int) -> int | None:
    """Return how many documents have a chance of `POWER`, to within 4 %, rounded up to two digits.

    Args:
        power: Chance by number of documents; about rising.
        n: Where to start.

    Returns:
        None where no number of documents has it.
    """
    low = high = max(n, 1)
    while power(high) < POWER:
        low, high = high, 2 * high
        if high > _MOST_DOCUMENTS:
            return None
    while low > 1 and power(low) >= POWER:
        low, high = low // 2, low
    while high - low > max(1, high // 25):
        middle = (low + high) // 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    unit = 10 ** max(0, len(str(high)) - 2)
    return -(-high // unit) * unit
