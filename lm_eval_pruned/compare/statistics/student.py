"""Student's t test of paired means, and its interval on the scale of the score."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import optimize, special, stats

from lm_eval_pruned.compare.statistics.paired_test import (
    LEAST_UNITS,
    POWER,
    Alternative,
    PairedTest,
    nothing,
    p_of_tails,
)
from lm_eval_pruned.results.documents import TRANSFORMS


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval_pruned.compare.statistics.moments import Moments


#: Where an ellipse is walked along.
_ANGLES = 4096


def paired_t(
    moments: Moments, transform: str, alpha: float, alternative: Alternative
) -> PairedTest:
    """Test the difference of two means over units, on the scale of `transform`.

    Without any spread between units the signs alone are counted.
    """
    function = TRANSFORMS[transform]
    with np.errstate(over="ignore", invalid="ignore"):
        difference = (
            moments.difference
            if transform == "mean"
            else float(function(moments.run) - function(moments.base))
        )
    unit, units = moments.unit, moments.units
    rising = function(1.0) > function(0.0)
    if moments.difference == 0 and moments.alike:
        p = p_of_tails(0.5, 0.5, alternative)
        return PairedTest(0.0, None, None, p, f"none: all {unit} equal", units, alpha)
    if units < LEAST_UNITS:
        why = f"none: {units} {unit} are too few for a test of their mean"
        return PairedTest(difference, None, None, None, why, units, alpha)
    gained = (moments.difference > 0) == rising
    if moments.alike:
        # No spread to compare with: the signs alone, as McNemar's mid-p counts them.
        unlikely = 0.5 ** (units + 1)
        both = (1 - unlikely, unlikely) if gained else (unlikely, 1 - unlikely)
        return PairedTest(
            difference,
            None,
            None,
            p_of_tails(*both, alternative),
            f"sign test: all {unit} changed alike",
            units,
            alpha,
        )
    stderr = math.sqrt(moments.variance)
    t = moments.difference / stderr * (1 if rising else -1)
    student = stats.t(moments.degrees)
    critical = float(student.isf(alpha / 2))
    low, high = _transformed_interval(moments, function, critical, transform)
    base = moments.base

    def detectable(level: float) -> float | None:
        needed = float(student.isf(level / (2 if alternative == "two-sided" else 1)))
        size = stderr * special.nctdtrinc(moments.degrees, 1 - POWER, needed)
        if transform == "mean":
            return size
        with np.errstate(over="ignore"):
            change = max(
                abs(float(function(base + sign * size) - function(base)))
                for sign in (-1, 1)
            )
        return change if math.isfinite(change) else None

    def tails(x: float) -> tuple[float, float]:
        below = (
            float(student.cdf((x - moments.difference) / stderr))
            if transform == "mean"
            else _below(moments, function, difference, transform, student, x)
        )
        return below, 1 - below

    return PairedTest(
        difference,
        low,
        high,
        p_of_tails(float(student.cdf(t)), float(student.sf(t)), alternative),
        f"paired t test over {unit}",
        units,
        alpha,
        detectable,
        tails if low is not None else nothing,
    )


def _below(
    moments: Moments,
    function: Callable,
    difference: float,
    transform: str,
    student: Any,
    x: float,
) -> float:
    """Return the confidence that the difference of transformed means is below `x`.

    One end of the interval of `_transformed_interval` lies at `x` for one critical value.
    """
    side = 0 if x < difference else 1

    def reached(critical: float) -> float:
        end = _transformed_interval(moments, function, critical, transform)[side]
        # Beyond all numbers is beyond x.
        return -1.0 if end is None else (end - x if side == 0 else x - end)

    if x == difference:
        return 0.5
    farthest = 1.0
    while reached(farthest) > 0 and farthest < _FARTHEST:
        farthest *= 2
    critical = (
        float(optimize.brentq(reached, 0.0, farthest))
        if farthest < _FARTHEST
        else math.inf
    )
    tail = float(student.sf(critical))
    return tail if side == 0 else 1 - tail


#: Critical values beyond this have no chance that a number could hold.
_FARTHEST = 1e6


def _transformed_interval(
    moments: Moments, function: Callable, critical: float, transform: str
) -> tuple[float | None, float | None]:
    """Return the interval of the difference of two transformed means.

    All pairs of means within `critical` standard errors lie in an ellipse; the interval
    holds the differences of its points. They are all of one sign exactly where the
    ellipse does not meet the line of equal means, which is what the t test asks.
    """
    stderr = math.sqrt(moments.variance)
    if transform == "mean":
        half = critical * stderr
        return moments.difference - half, moments.difference + half
    along = moments.covariance / stderr
    across = math.sqrt(max(0.0, moments.level_variance - along**2))
    angle = np.linspace(0, 2 * math.pi, _ANGLES, endpoint=False)
    difference = moments.difference + critical * stderr * np.cos(angle)
    middle = (moments.base + moments.run) / 2 + critical * (
        along * np.cos(angle) + across * np.sin(angle)
    )
    with np.errstate(over="ignore", invalid="ignore"):
        ends = function(middle + difference / 2) - function(middle - difference / 2)
    if not np.isfinite(ends).all():
        return None, None
    return float(ends.min()), float(ends.max())
