"""The correction of p for many tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    tests = list(zip(p_values, families or [None] * len(p_values), strict=True))
    corrected: list[tuple[float | None, float | None]] = []
    for p, family in tests:
        if p is None:
            corrected.append((None, None))
            continue
        others = [q for q, label in tests if q is not None and label == family]
        others.remove(p)
        q = stats.false_discovery_control([p, *others])[0]
        discoveries = (stats.false_discovery_control([0.0, *others]) < alpha).sum()
        corrected.append((float(q), float(alpha * discoveries / (len(others) + 1))))
    return corrected
