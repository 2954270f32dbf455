"""The share of what a model scores above its floor that another model keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import optimize

from lm_eval_pruned.compare.statistics import paired_mean


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

#: What is said instead of a share where the base is not shown to be above its floor.
NO_LOSS = "cannot show a loss"
#: Ends of an interval are looked for no farther than this from the share.
_FARTHEST = 1e3


@dataclass(frozen=True)
class Kept:
    """What a candidate keeps: 1 is all that the base scores above the floor, 0 is the floor.

    From `low` to `high` is the interval; an end is None where the documents give none, because they
    are too few, or because the base could be at its floor.
    """

    share: float
    low: float | None
    high: float | None

    @property
    def text(self) -> str:
        """Percent with interval, such as ``61 % [52, 70]``."""
        ends = [
            "?" if end is None else f"{end:.0%}"[:-1] for end in (self.low, self.high)
        ]
        return f"{self.share:.0%} [{', '.join(ends)}]".replace("%", " %")


def kept_sides(
    base: ArrayLike,
    candidate: ArrayLike,
    floor: ArrayLike,
    share: float,
    *,
    weights: ArrayLike | None = None,
    clusters: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
) -> tuple[float, float]:
    """Return the one-sided p of a candidate that keeps less than `share`, and of one that keeps more.

    It is that of ``candidate - floor`` against that share of ``base - floor``, so that the spread of the
    base counts. Arguments as for `share_kept`; 1 and 1 where the documents allow no test.
    """
    above, left = (
        np.asarray(v, float) - np.asarray(floor, float) for v in (base, candidate)
    )
    weights = np.ones(len(above)) if weights is None else np.asarray(weights, float)
    gains = weights * (left - share * above)
    # Rounding must not make equal values differ.
    gains[np.abs(gains) <= 1e-12 * np.abs(weights * above).max()] = 0.0
    sides = paired_mean(gains, weights, clusters, strata).sides or (1.0, 1.0)
    # Where a lower score is better, the base is below its floor.
    return sides if (weights * above).sum() > 0 else sides[::-1]


def share_kept(
    base: ArrayLike,
    candidate: ArrayLike,
    floor: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    clusters: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    alpha: float = 0.05,
) -> Kept | None:
    """Return (candidate - floor) / (base - floor) of two means over the same documents.

    The interval holds each share at which a paired test does not tell ``candidate - floor`` from
    that share of ``base - floor``, as Fieller's does. The test is that of `statistics.paired_mean`, for
    scores without bounds, over clusters.

    Args:
        base: Values of the base, shape (n,).
        candidate: Values of the candidate, shape (n,).
        floor: Values without knowledge, shape (n,), or one for all documents.
        weights: Positive weights, shape (n,); default: ones.
        clusters: Cluster of each document; default: each its own.
        strata: Stratum of each document; see `statistics.paired_difference`.
        alpha: 1 - confidence of the interval.

    Returns:
        None where the mean of the base is exactly at the floor.

    Source: Fieller 1954, Journal of the Royal Statistical Society B 16, 175-185.

    Example:
        >>> share_kept([0.9, 0.7] * 10, [0.7, 0.5] * 10, 0.2).text
        '67 % [63, 69]'
    """
    weighted = (
        np.ones(np.shape(base)) if weights is None else np.asarray(weights, float)
    )
    above, left = (
        float((weighted * (np.asarray(v, float) - np.asarray(floor, float))).sum())
        for v in (base, candidate)
    )
    if above == 0:
        return None
    share = left / above
    about: dict[str, Any] = {
        "weights": weighted,
        "clusters": clusters,
        "strata": strata,
    }

    def excess(supposed: float, side: int) -> float:
        found = kept_sides(base, candidate, floor, supposed, **about)
        return found[side] - alpha / 2

    def end(side: int) -> float | None:
        # At a larger share than the true one, the candidate keeps less.
        direction, step = (1, -1)[side], 1e-3
        while excess(share + direction * step, side) > 0:
            step *= 2
            if step > _FARTHEST:
                return None
        nearest = share + direction * step / 2 if step > 1e-3 else share
        return optimize.brentq(excess, nearest, share + direction * step, args=(side,))

    return Kept(share, end(1), end(0))
