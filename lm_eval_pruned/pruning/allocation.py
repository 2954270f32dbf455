"""Allocation: how a budget of neurons is shared among the layers of a model.

Every layer has a `CostCurve`, which says what removing its first, second, ... neuron costs.
`allocate` finds the widths of least total cost that keep as many neurons as asked for. No
torch, and whole numbers throughout: the same curves give the same widths on every machine.

The problem is that of marginal allocation (Fox 1966, "Discrete Optimization via Marginal
Analysis", Management Science 13(3)) and of bit allocation in coding (Shoham & Gersho 1988,
IEEE Trans. ASSP 36(9)). Where every curve is convex, taking the cheapest next neuron is
optimal. Elsewhere a dynamic program over the layers is exact, as in SPDY (Frantar & Alistarh
2022, arXiv 2201.13096), which shares out sparsity in this way.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    Costs = NDArray[np.int64]

#: Costs are whole numbers of this, in nats or whatever a curve is measured in.
RESOLUTION = 1e-12
#: More than any total of costs, and small enough to be added to one.
_IMPOSSIBLE = np.int64(1) << np.int64(61)


@dataclass(frozen=True)
class CostCurve:
    """What it costs to cut one layer alone.

    Attributes:
        layer: Number of the layer.
        costs: ``costs[r]`` is the cost of removing r neurons, shape (I + 1,), int64, in
            units of `RESOLUTION`; ``costs[0]`` is 0.

    Example:
        >>> curve = CostCurve.of_points(3, 100, kept=[50, 75], rises=[0.4, 0.1])
        >>> curve.at(100), curve.at(75), round(curve.at(60), 9)
        (0.0, 0.1, 0.28)
    """

    layer: int
    costs: Costs

    @property
    def width(self) -> int:
        """The width of the layer before, in neurons."""
        return len(self.costs) - 1

    def at(self, width: int) -> float:
        """Return the cost of leaving `width` neurons."""
        return round(float(self.costs[self.width - width]) * RESOLUTION, 12)

    @classmethod
    def of_points(
        cls, layer: int, width: int, kept: Sequence[int], rises: Sequence[float]
    ) -> CostCurve:
        """Return the curve through measured points, made monotone.

        Measured points are noisy: a layer that is cut further may seem to do better. They are
        replaced by the closest ones, in the sense of least squares, that neither fall nor are
        below 0 (isotonic regression; Barlow et al. 1972), and joined by straight lines. Below
        the smallest measured width the curve goes on as steeply as it has been anywhere.

        Args:
            layer: Number of the layer.
            width: Its width before, in neurons.
            kept: Measured widths, in neurons, ascending, each below `width`.
            rises: By how much the loss rose at each of them.
        """
        from scipy.optimize import isotonic_regression

        removed = [0, *(width - each for each in reversed(kept))]
        # Fitting first and cutting off at 0 then is the closest of all that are 0 or more.
        fitted = np.maximum(isotonic_regression(list(reversed(rises))).x, 0.0)
        values = np.concatenate([[0.0], fitted]) / RESOLUTION
        slopes = np.rint(np.diff(values) / np.diff(removed)).astype(np.int64)
        lengths = [*np.diff(removed), width - removed[-1]]
        marginal = np.repeat([*slopes, max(slopes, default=0)], lengths)
        return cls(layer, _summed(marginal))

    @classmethod
    def of_scores(cls, layer: int, scores: ArrayLike) -> CostCurve:
        """Return the curve of a layer whose neurons cost their score; it is convex.

        Args:
            layer: Number of the layer.
            scores: One number per neuron, finite, in any order.
        """
        ascending = np.sort(np.asarray(scores, dtype=np.float64))
        return cls(layer, _summed(np.rint(ascending / RESOLUTION).astype(np.int64)))


def _summed(marginal: Costs) -> Costs:
    return np.concatenate([[np.int64(0)], np.cumsum(marginal, dtype=np.int64)])


def cheapest(curves: Mapping[str, CostCurve]) -> CostCurve:
    """Return the lower envelope of the curves of one layer, by criterion."""
    first = next(iter(curves.values()))
    costs = np.stack([curve.costs for curve in curves.values()]).min(axis=0)
    return CostCurve(first.layer, costs)


def criterion_at(curves: Mapping[str, CostCurve], width: int) -> str:
    """Return the criterion that leaves `width` neurons at the least cost; the first of several."""
    return min(curves, key=lambda name: curves[name].costs[curves[name].width - width])


def allocate(
    curves: Sequence[CostCurve],
    neurons: int,
    *,
    min_width: int = 1,
    multiple_of: int = 1,
) -> tuple[int, ...]:
    """Return the widths of least total cost that keep `neurons` neurons in all.

    Of equally good allocations, it is the one in which the last layer gives the least, then the
    last but one, and so on.

    Args:
        curves: One per layer.
        neurons: Neurons to keep, in all layers together. If no widths that are allowed keep
            exactly as many, the most below that are kept.
        min_width: Neurons to leave in each layer at least. A layer that has no more stays.
        multiple_of: Widths are multiples of this. A layer that has fewer neurons stays.

    Returns:
        The kept width of each layer, in the order of `curves`.

    Raises:
        ValueError: The bounds leave more than `neurons`.

    Example:
        >>> flat = CostCurve.of_points(0, 100, kept=[25], rises=[0.0])
        >>> steep = CostCurve.of_points(1, 100, kept=[25], rises=[1.5])
        >>> allocate([steep, flat], 150, min_width=20)
        (100, 50)
        >>> allocate([steep, flat], 150, min_width=60)
        (90, 60)
    """
    lowest, highest = [], []
    for curve in curves:
        low = -(-min_width // multiple_of)
        high = curve.width // multiple_of
        fixed = curve.width < min_width or high < low
        lowest.append(curve.width if fixed else low * multiple_of)
        highest.append(curve.width if fixed else high * multiple_of)
    if neurons < sum(lowest):
        raise ValueError(
            f"min_width={min_width} keeps {sum(lowest)} neurons in {len(curves)} layers, but the "
            f"size that was asked for keeps {neurons}: pass a min_width of at most "
            f"{neurons // max(len(curves), 1)}, or a larger size."
        )
    steps = max(0, -(-(sum(highest) - neurons) // multiple_of))
    costs = []
    for curve, low, high in zip(curves, lowest, highest, strict=True):
        part = curve.costs[curve.width - high : curve.width - low + 1 : multiple_of]
        costs.append(part - part[0])
    steps = min(steps, sum(len(part) - 1 for part in costs))
    convex = all(np.all(np.diff(part, 2) >= 0) for part in costs)
    taken = (_greedy if convex else _dynamic)(costs, steps)
    return tuple(
        high - multiple_of * each for high, each in zip(highest, taken, strict=True)
    )


def _greedy(costs: Sequence[Costs], steps: int) -> list[int]:
    """Take the cheapest next step of any layer, `steps` times; the costs are convex.

    Args:
        costs: ``costs[l][j]`` is the cost of j steps in layer l.
        steps: Steps to take in all.
    """
    marginal = np.concatenate([np.diff(each) for each in costs])
    owner = np.repeat(np.arange(len(costs)), [len(each) - 1 for each in costs])
    chosen = owner[np.argsort(marginal, kind="stable")[:steps]]
    return np.bincount(chosen, minlength=len(costs)).tolist()


def _dynamic(costs: Sequence[Costs], steps: int) -> list[int]:
    """Do the same for costs of any shape: one layer after the other, for every total.

    Takes and returns what `_greedy` does.
    """
    reached = np.full(steps + 1, _IMPOSSIBLE)
    reached[0] = 0
    before = []
    for each in costs:
        before.append(reached)
        reached = _added(reached, each)
    taken = []
    for each, earlier in zip(reversed(costs), reversed(before), strict=True):
        most = min(steps, len(each) - 1)
        # Of equal ones the first: the later layer gives as little as it can.
        totals = each[: most + 1] + earlier[steps - most : steps + 1][::-1]
        taken.append(int(np.argmin(totals)))
        steps -= taken[-1]
    return taken[::-1]


def _added(reached: Costs, costs: Costs) -> Costs:
    """Return the least cost of every total once one more layer may take steps.

    It is the minimum over j of ``reached[t - j] + costs[j]``. Over each straight piece of
    `costs` that is the minimum of a sliding window, so that the time grows with the number of
    pieces, not with that of neurons.
    """
    result = np.full_like(reached, _IMPOSSIBLE)
    totals = np.arange(len(reached), dtype=np.int64)
    slopes = np.diff(costs)
    corners = [0, *(np.flatnonzero(np.diff(slopes)) + 1), len(slopes)]
    if not len(slopes):
        return reached
    for first, last in pairwise(corners):
        if first >= len(reached):
            break
        slope = slopes[first]
        level = _window_minimum(reached - slope * totals, last - first + 1)
        here = totals[first:]
        line = costs[first] + slope * (here - first)
        np.minimum(result[first:], level[: len(here)] + line, out=result[first:])
    return np.where(result > _IMPOSSIBLE // 2, _IMPOSSIBLE, result)


def _window_minimum(values: Costs, length: int) -> Costs:
    """Return the minimum of each value and the ``length - 1`` before it.

    Source: van Herk 1992, Pattern Recognition Letters 13(7): running minima from both ends
    of blocks as long as the window.
    """
    size = len(values)
    blocks = -(-(size + length - 1) // length)
    padded = np.full(blocks * length, _IMPOSSIBLE)
    padded[length - 1 : length - 1 + size] = values
    grid = padded.reshape(blocks, length)
    forward = np.minimum.accumulate(grid, axis=1).reshape(-1)
    backward = np.minimum.accumulate(grid[:, ::-1], axis=1)[:, ::-1].reshape(-1)
    return np.minimum(backward[:size], forward[length - 1 : length - 1 + size])
