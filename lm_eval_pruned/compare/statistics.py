"""The correction of p for many tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import stats


if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence


def false_discovery(
    p_values: Sequence[float | None],
    families: Sequence[Hashable] | None = None,
    alpha: float = 0.05,
) -> list[tuple[float | None, float | None]]:
    """Correct p values after Benjamini and Hochberg, each family by itself.

    Returns the adjusted p of each test, and the level that the correction leaves for it: with all
    other p as they are, it is significant exactly where its p is below ``alpha * k / n``, of n
    tests and k discoveries if this p was 0. None and None where there is no p.

    Source: Benjamini and Yekutieli 2005, Journal of the American Statistical Association 100, 71-81.

    Example:
        >>> false_discovery([0.01, 0.04, 0.04], ["boolq", "boolq", "arc_easy"])
        [(0.02, 0.05), (0.04, 0.05), (0.04, 0.05)]
    """
    corrected: list[tuple[float | None, float | None]] = [(None, None)] * len(p_values)
    members: dict[Hashable, list[int]] = {}
    for number, p in enumerate(p_values):
        if p is not None:
            members.setdefault(families[number] if families else None, []).append(
                number
            )
    for numbers in members.values():
        ps = np.array([p_values[number] for number in numbers], float)
        n, order = len(ps), np.argsort(ps)
        ranks = np.arange(1, n + 1)
        ordered, factors = ps[order], n / ranks
        # If a p was 0, those below it had the next rank, and those above it the same.
        same = ranks[ordered * factors < alpha].max(initial=0)
        shifted = np.append(0.0, ordered[:-1]) * factors < alpha
        below = np.maximum.accumulate(np.where(shifted, ranks, 1))
        discoveries = np.where(ranks < same, same, below)
        qs = stats.false_discovery_control(ps)[order]
        levels = alpha * discoveries / n
        for place, q, level in zip(order, qs, levels, strict=True):
            corrected[numbers[place]] = float(q), float(level)
    return corrected
