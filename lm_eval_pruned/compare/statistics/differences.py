"""One run against another: on the same documents, or from standard errors alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lm_eval_pruned.compare.statistics.mcnemar import mcnemar
from lm_eval_pruned.compare.statistics.moments import moments_of
from lm_eval_pruned.compare.statistics.paired_test import (
    ALTERNATIVES,
    POWER,
    Alternative,
    PairedTest,
    finite_row,
    p_of_tails,
)
from lm_eval_pruned.compare.statistics.student import paired_t


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike


#: Squares of larger numbers, added up, are no longer finite.
_LARGEST = 1e140


def paired_difference(
    base: ArrayLike,
    run: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    clusters: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    transform: str = "mean",
    alpha: float = 0.05,
    alternative: Alternative = "two-sided",
) -> PairedTest:
    """Compare two runs on the same documents.

    Independent documents that are right or wrong get McNemar's mid-p test; all else a
    paired t test on the means of the documents or, where they are given, of the
    clusters. p < alpha exactly where 0 is outside the interval.

    Args:
        base: Values of the base, shape (n,), n >= 1; row i of `base` and `run` belong
            to the same document.
        run: Values of the run, shape (n,).
        weights: Positive weights, shape (n,); default: ones.
        clusters: Cluster of each document, length n; default: each its own.
        strata: Stratum of each document, length n, for parts that another draw of
            documents would hold too, such as the subjects of MMLU; default: one.
            Clusters lie within strata.
        transform: From the weighted mean to the score, a name in `samples.TRANSFORMS`.
        alpha: 1 - confidence of the interval, and the level of the test.
        alternative: What p is a test against: ``less``, the run scores less than the
            base; ``greater``; or either. The interval is two-sided in any case: a
            one-sided p below alpha / 2 is where it leaves out 0.

    Raises:
        ValueError: The arrays are empty, of different lengths, or hold NaN or infinity;
            `alternative` is none of `ALTERNATIVES`; a cluster lies in two strata.

    Returns:
        Interval and p are None for fewer than `LEAST_UNITS` units, unless documents are
        independent and right or wrong.

    Source:
        Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology 13:91 (mid-p);
        Miller 2024, arXiv 2411.00640 (means of paired differences, clusters); Cochran
        1977, Sampling Techniques, chapters 5 and 6 (strata, ratios).

    Example:
        >>> test = paired_difference([1, 0, 1, 1], [1, 0, 1, 1])
        >>> test.difference, test.p
        (0.0, 1.0)
    """
    base, run = finite_row("base", base), finite_row("run", run)
    weights = np.ones(len(base)) if weights is None else finite_row("weights", weights)
    if not len(base) == len(run) == len(weights) > 0:
        raise ValueError(
            f"base, run and weights hold {len(base)}, {len(run)} and {len(weights)} documents: "
            "they must be as many, and at least one."
        )
    for name, labels in (("clusters", clusters), ("strata", strata)):
        if labels is not None and len(labels) != len(base):
            raise ValueError(
                f"{name} names {len(labels)} documents of {len(base)}: give one for each."
            )
    if alternative not in ALTERNATIVES:
        raise ValueError(
            f"alternative is {alternative!r}: give one of {', '.join(ALTERNATIVES)}."
        )
    if clusters is not None and len(set(clusters)) == len(base):
        clusters = None
    right_or_wrong = np.isin(base, (0, 1)).all() and np.isin(run, (0, 1)).all()
    if (
        right_or_wrong
        and clusters is None
        and transform == "mean"
        and (weights == 1).all()
    ):
        up, down = int((run > base).sum()), int((base > run).sum())
        return mcnemar(up, down, len(base), alpha, alternative)
    sums = np.stack([weights * base, weights * run, weights])
    if np.abs(sums).max() > _LARGEST:
        with np.errstate(over="ignore"):
            scores = [np.average(each, weights=weights) for each in (base, run)]
        difference = float(scores[1] - scores[0])
        why = "none: values too large to be squared"
        return PairedTest(difference, None, None, None, why, len(base), alpha)
    moments = moments_of(sums, clusters, strata)
    test = paired_t(moments, transform, alpha, alternative)
    shares = [((each >= 0) & (each <= 1)).all() for each in (base, run)]
    if moments.alike and test.difference == 0 and transform == "mean" and all(shares):
        # Scores between 0 and 1 change by 1 at most: so many documents without any change
        # bound the share of those that do.
        bound = mcnemar(0, 0, moments.units, alpha, alternative)
        return replace(test, _tails=bound._tails)
    return test


def unpaired_difference(
    base: float,
    base_stderr: float,
    run: float,
    run_stderr: float,
    *,
    alpha: float = 0.05,
    alternative: Alternative = "two-sided",
) -> PairedTest:
    """Compare two scores from their standard errors alone.

    Weaker than `paired_difference`: it takes the two runs for independent, as if
    they had seen different documents, and misses differences a paired test shows.

    Args:
        base: Score of the base.
        base_stderr: Its standard error.
        run: Score of the run.
        run_stderr: Its standard error.
        alpha: 1 - confidence of the interval.
        alternative: See `paired_difference`.
    """
    difference = run - base
    stderr = math.hypot(base_stderr, run_stderr)
    if stderr == 0:
        return PairedTest(difference, None, None, None, "none: stderr is 0", 0, alpha)
    half = float(stats.norm.isf(alpha / 2)) * stderr
    lower = float(stats.norm.cdf(difference / stderr))
    upper = float(stats.norm.sf(difference / stderr))
    sides = 2 if alternative == "two-sided" else 1

    def detectable(level: float) -> float:
        return float(stats.norm.isf(level / sides) + stats.norm.ppf(POWER)) * stderr

    return PairedTest(
        difference,
        difference - half,
        difference + half,
        p_of_tails(lower, upper, alternative),
        "unpaired z test on stderrs (weaker)",
        0,
        alpha,
        detectable,
        lambda x: (
            float(stats.norm.cdf((x - difference) / stderr)),
            float(stats.norm.sf((x - difference) / stderr)),
        ),
    )


def relative_change(base: float, run: float) -> float | None:
    """Return (run - base) / base, or None where the base is 0 or either is no number.

    Example:
        >>> round(relative_change(0.1035, 0.1811), 3)
        0.75
    """
    if base == 0 or not (math.isfinite(base) and math.isfinite(run)):
        return None
    return (run - base) / abs(base)
