"""A run against several control runs that differ by chance: intervals over seeds and documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lm_eval_pruned.analysis.samples import TRANSFORMS


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.analysis.samples import Documents


#: What is smaller is no spread, but the rounding of a mean.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class CrossedTest:
    """How far a run is from what chance gives.

    Attributes:
        difference: Score of the run minus the mean score of the controls.
        control: Mean score of the controls.
        low: Lower end of the 95 % interval; None where there is one control only, or too few
            documents.
        high: Upper end.
        p: Two-sided p of "there is no difference".
        seeds: Number of controls.
    """

    difference: float
    control: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int


def against_chance(
    run: Documents, controls: Sequence[Documents], alpha: float = 0.05
) -> CrossedTest:
    """Compare a run with the mean of control runs on the same documents.

    Another experiment would draw other documents and other seeds. The variance of the
    difference is taken as the sum of the two: that of the mean over documents (or clusters of
    them), the controls averaged for each, and that of the mean over controls. What the two share,
    the interaction of documents with seeds, counts twice, so the interval is rather too wide.
    Degrees of freedom are Satterthwaite's.

    Args:
        run: Its documents.
        controls: Documents of each control, in any order; at least one.
        alpha: 1 - confidence.

    Raises:
        ValueError: A control has other documents, or the score is no linear function of a mean.

    Source:
        Searle, Casella and McCulloch 1992, Variance Components, chapter 4 (two crossed factors);
        Satterthwaite 1946, Biometrics Bulletin 2, 110-114.
    """
    ordered = [control.in_the_order_of(run) for control in controls]
    same = [each for each in ordered if each is not None and each.is_scored_like(run)]
    if len(same) < len(controls) or not same:
        raise ValueError(
            f"{len(controls) - len(same)} of {len(controls)} controls were scored on other documents: "
            "evaluate them with the same tasks and samples."
        )
    score = TRANSFORMS[run.transform]
    slope = float(score(1.0) - score(0.0))
    if not math.isclose(float(score(2.0)), float(score(0.0)) + 2 * slope):
        raise ValueError(
            f"{run.transform} is no linear function of a mean over documents: use bits per byte."
        )
    weights = run.weights / run.weights.sum()
    by_control = np.array([each.values for each in same])
    means = by_control @ weights
    control = float(means.mean())
    difference = float(run.values @ weights) - control
    shares = weights * (run.values - by_control.mean(axis=0) - difference)
    if run.clusters is not None:
        _, which = np.unique(run.clusters, return_inverse=True)
        shares = np.bincount(which, weights=shares)
    units, seeds = len(shares), len(same)
    result = slope * difference, float(score(control))
    if units < 10 or seeds < 2:
        return CrossedTest(*result, None, None, None, seeds)
    of_documents = units / (units - 1) * float((shares**2).sum())
    of_seeds = float(means.var(ddof=1)) / seeds
    variance = of_documents + of_seeds
    if variance < _ROUNDING**2:
        # Nothing varies, so nothing says how far another draw may lie.
        return CrossedTest(
            *result, None, None, 1.0 if abs(difference) < _ROUNDING else None, seeds
        )
    freedom = variance**2 / (of_documents**2 / (units - 1) + of_seeds**2 / (seeds - 1))
    error = abs(slope) * math.sqrt(variance)
    width = float(stats.t.ppf(1 - alpha / 2, freedom)) * error
    p = 2 * float(stats.t.sf(abs(result[0]) / error, freedom))
    return CrossedTest(*result, result[0] - width, result[0] + width, p, seeds)
