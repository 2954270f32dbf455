"""Many tests at once, after Benjamini and Hochberg."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import stats


if TYPE_CHECKING:
    from collections.abc import Sequence


def false_discovery_rate(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust a family of p values after Benjamini and Hochberg.

    Args:
        p_values: One per test; None for a test that was not made, which does not count.

    Returns:
        Adjusted p values, None where there was none.
    """
    made = [p for p in p_values if p is not None]
    adjusted = iter(stats.false_discovery_control(made)) if made else iter(())
    return [None if p is None else float(next(adjusted)) for p in p_values]


def false_discovery_levels(
    p_values: Sequence[float | None], alpha: float
) -> list[float | None]:
    """Return the level that Benjamini and Hochberg's correction leaves for each test.

    A test is significant after correction exactly where its p is below its level, if
    all other p values stay as they are.

    Args:
        p_values: One per test; None for a test that was not made.
        alpha: Rate of false discoveries.

    Returns:
        ``alpha * k / n`` with n tests that were made, and k the discoveries that there
        were if this p was 0; None where there was no test.
    """
    made = np.array([p for p in p_values if p is not None], dtype=float)
    n = len(made)
    levels: list[float | None] = []
    for p in p_values:
        if p is None:
            levels.append(None)
            continue
        others = np.sort(made)
        others = np.delete(others, np.searchsorted(others, p))
        ranks = np.arange(2, n + 1)
        found = np.flatnonzero(others < alpha * ranks / n)
        discoveries = int(ranks[found[-1]]) if len(found) else 1
        levels.append(alpha * discoveries / n)
    return levels
