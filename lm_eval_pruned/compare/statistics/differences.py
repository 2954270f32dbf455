"""One run against another: on the same documents, or from standard errors alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_pruned.compare.statistics.means import Means, paired_t
from lm_eval_pruned.compare.statistics.paired_test import PairedTest, finite_row
from lm_eval_pruned.compare.statistics.shares import Shares, mcnemar
from lm_eval_pruned.results.documents import TRANSFORMS


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike


def paired_difference(
    base: ArrayLike,
    run: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    clusters: Sequence[str] | None = None,
    strata: Sequence[str] | None = None,
    transform: str = "mean",
    alpha: float = 0.05,
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
        transform: From the weighted mean to the score, a name in `documents.TRANSFORMS`.
        alpha: 1 - confidence of the interval, and the level of the test.

    Raises:
        ValueError: The arrays are empty, of different lengths, or hold NaN or infinity;
            a cluster lies in two strata.

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
    if clusters is not None and len(set(clusters)) == len(base):
        clusters = None
    plain = transform == "mean" and clusters is None and (weights == 1).all()
    if plain and np.isin((base, run), (0, 1)).all():
        up, down = int((run > base).sum()), int((base > run).sum())
        return mcnemar(up, down, len(base), alpha)
    with np.errstate(over="ignore"):
        score = float(TRANSFORMS[transform](np.average(base, weights=weights)))
    gains = weights * (run - base)
    test = paired_t(gains, weights, clusters, strata, transform, score, alpha)
    between = np.min((base, run)) >= 0 and np.max((base, run)) <= 1
    if test.distribution is None and test.p == 1 and transform == "mean" and between:
        # Scores between 0 and 1 change by 1 at most: so many documents without any change
        # bound the share of those that do.
        bound = _Bound(0, 0, test.units)
        low, high = bound.ends(alpha)
        return replace(test, low=low, high=high, distribution=bound)
    return test


class _Bound(Shares):
    """How far documents that did not change may differ: nothing is known of their spread."""

    def detectable(self, level: float) -> float | None:
        return None


def unpaired_difference(
    base: float,
    base_stderr: float,
    run: float,
    run_stderr: float,
    *,
    alpha: float = 0.05,
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
    """
    difference, stderr = run - base, math.hypot(base_stderr, run_stderr)
    if stderr == 0:
        return PairedTest.none(difference, "stderr is 0", level=alpha)
    normal = Means(difference, stderr, math.inf)
    less, greater = reversed(normal.tails(0.0))
    method = "unpaired z test on stderrs (weaker)"
    return PairedTest.of(difference, (less, greater), method, 0, alpha, normal)


def relative_change(base: float, run: float) -> float | None:
    """Return (run - base) / base, or None where the base is 0 or either is no number.

    Example:
        >>> round(relative_change(0.1035, 0.1811), 3)
        0.75
    """
    if base == 0 or not (math.isfinite(base) and math.isfinite(run)):
        return None
    return (run - base) / abs(base)
