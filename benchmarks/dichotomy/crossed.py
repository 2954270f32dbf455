"""Runs that differ by chance beside others: intervals over seeds and documents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lm_eval_pruned.results.documents import TRANSFORMS


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.results.documents import Documents


#: What is smaller is no spread, but the rounding of a mean.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class CrossedTest:
    """How far two ways are apart, whatever the seed and the documents.

    Attributes:
        difference: Mean score of the ones minus that of the others.
        one: Mean score of the ones.
        other: Mean score of the others.
        low: Lower end of the 95 % interval; None where there is one seed only, or too few
            documents.
        high: Upper end.
        p: Two-sided p of "there is no difference".
        seeds: Number of seeds.
    """

    difference: float
    one: float
    other: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int


def over_seeds(
    ones: Sequence[Documents], others: Sequence[Documents], alpha: float = 0.05
) -> CrossedTest:
    """Compare runs with others on the same documents, over seeds and documents.

    Another experiment would draw other documents and other seeds. The variance of the
    difference is taken as the sum of the two: that of the mean over documents (or clusters of
    them), the seeds averaged for each, and that of the mean over seeds. What the two share,
    the interaction of documents with seeds, counts twice, so the interval is rather too wide.
    Degrees of freedom are Satterthwaite's.

    Args:
        ones: Documents of each run, in any order, one run for each seed; or a single run that
            no seed changes.
        others: The same of what they are compared with; where both have several, seed by seed.
        alpha: 1 - confidence.

    Raises:
        ValueError: The numbers of seeds differ, a run has other documents than the first, or
            the score is no linear function of a mean.

    Source:
        Searle, Casella and McCulloch 1992, Variance Components, chapter 4 (two crossed factors);
        Satterthwaite 1946, Biometrics Bulletin 2, 110-114.
    """
    seeds = max(len(ones), len(others))
    if {len(ones), len(others)} - {1, seeds}:
        raise ValueError(
            f"{len(ones)} runs stand beside {len(others)}: measure both with the same seeds."
        )
    first = ones[0]
    every = [run.in_the_order_of(first) for run in (*ones, *others)]
    same = [run for run in every if run is not None and run.is_scored_like(first)]
    if len(same) < len(every):
        raise ValueError(
            f"{len(every) - len(same)} of {len(every)} runs were scored on other documents: "
            "evaluate them with the same tasks and samples."
        )
    score = TRANSFORMS[first.transform]
    slope = float(score(1.0) - score(0.0))
    if not math.isclose(float(score(2.0)), float(score(0.0)) + 2 * slope):
        raise ValueError(
            f"{first.transform} is no linear function of a mean over documents: use bits per byte."
        )
    weights = first.weights / first.weights.sum()
    values = np.array([run.values for run in same])
    one, other = (part @ weights for part in np.split(values, [len(ones)]))
    by_seed = values[: len(ones)] - values[len(ones) :]
    means = by_seed @ weights
    difference = float(means.mean())
    shares = weights * (by_seed.mean(axis=0) - difference)
    if first.clusters is not None:
        _, which = np.unique(first.clusters, return_inverse=True)
        shares = np.bincount(which, weights=shares)
    units = len(shares)
    result = slope * difference, *(float(score(each.mean())) for each in (one, other))
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
