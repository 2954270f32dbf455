"""Many tests at once, after Benjamini and Hochberg."""

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

    Args:
        p_values: One per test; None for a test that was not made, which does not count.
        families: The family of each test; default: all are one. In a family with many true
            differences the method lets more wrong ones pass in number, so what differs for
            certain does not belong into the family of what is asked.
        alpha: Rate of false discoveries.

    Returns:
        The adjusted p of each test, and the level that the correction leaves for it, which is
        ``alpha * k / n`` with n tests that were made, and k the discoveries that there
        were if this p was 0: a test is significant exactly where its p is below its level, if
        all other p values stay as they are. None and None where there was no test.

    Example:
        >>> false_discovery([0.01, 0.04, 0.04], ["boolq", "boolq", "arc_easy"])
        [(0.02, 0.05), (0.04, 0.05), (0.04, 0.05)]
    """
    places: dict[Hashable, list[int]] = {}
    for place, p in enumerate(p_values):
        if p is not None:
            places.setdefault(families[place] if families else None, []).append(place)
    found: list[tuple[float | None, float | None]] = [(None, None)] * len(p_values)
    for members in places.values():
        made = np.array([p_values[place] for place in members], dtype=float)
        ranks = np.arange(1, len(made) + 1)
        adjusted = stats.false_discovery_control(made).tolist()
        for number, place in enumerate(members):
            ordered = np.sort(np.append(np.delete(made, number), -1.0))
            most = ranks[ordered < alpha * ranks / len(made)].max()
            found[place] = adjusted[number], float(alpha * most / len(made))
    return found
