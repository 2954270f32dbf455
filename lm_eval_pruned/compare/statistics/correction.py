"""Many tests at once, after Benjamini and Hochberg."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import stats


if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence


def false_discovery_rate(
    p_values: Sequence[float | None], families: Sequence[Hashable] | None = None
) -> list[float | None]:
    """Adjust p values after Benjamini and Hochberg, each family by itself.

    Args:
        p_values: One per test; None for a test that was not made, which does not count.
        families: The family of each test; default: all are one. In a family with many true
            differences the method lets more wrong ones pass in number, so what differs for
            certain does not belong into the family of what is asked.

    Returns:
        Adjusted p values, None where there was none.

    Example:
        >>> false_discovery_rate([0.01, 0.04, 0.04], ["boolq", "boolq", "arc_easy"])
        [0.02, 0.04, 0.04]
    """
    return _by_family(p_values, families, stats.false_discovery_control)


def false_discovery_levels(
    p_values: Sequence[float | None],
    alpha: float,
    families: Sequence[Hashable] | None = None,
) -> list[float | None]:
    """Return the level that Benjamini and Hochberg's correction leaves for each test.

    A test is significant after correction exactly where its p is below its level, if
    all other p values stay as they are.

    Args:
        p_values: One per test; None for a test that was not made.
        alpha: Rate of false discoveries.
        families: As for `false_discovery_rate`.

    Returns:
        ``alpha * k / n`` with n tests that were made, and k the discoveries that there
        were if this p was 0; None where there was no test.
    """

    def levels(made: np.ndarray) -> list[float]:
        n = len(made)
        ranks = np.arange(1, n + 1)
        found = []
        for place in range(n):
            ordered = np.sort(np.append(np.delete(made, place), -1.0))
            found.append(alpha * ranks[ordered < alpha * ranks / n].max() / n)
        return found

    return _by_family(p_values, families, levels)


def _by_family(
    p_values: Sequence[float | None],
    families: Sequence[Hashable] | None,
    adjust: Callable[[np.ndarray], Sequence[float]],
) -> list[float | None]:
    places: dict[Hashable, list[int]] = {}
    for place, p in enumerate(p_values):
        if p is not None:
            places.setdefault(families[place] if families else None, []).append(place)
    adjusted: list[float | None] = [None] * len(p_values)
    for members in places.values():
        made = np.array([p_values[place] for place in members], dtype=float)
        for place, value in zip(members, adjust(made), strict=True):
            adjusted[place] = float(value)
    return adjusted
