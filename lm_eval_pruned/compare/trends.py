"""Over the expansion ratios of a sweep: the trend of each task, and any two tasks together."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from lm_eval_pruned.compare.claims import Test, paired
from lm_eval_pruned.compare.pairing import paired_documents
from lm_eval_pruned.compare.statistics import false_discovery
from lm_eval_pruned.results.documents import TRANSFORMS
from lm_eval_pruned.results.groups import primary_metrics, series_of
from lm_eval_pruned.results.metrics import is_perplexity


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from lm_eval_pruned.results.files import Run


_NO_SAMPLES = "none: needs logged samples of the same documents in all configurations"


@dataclass(frozen=True)
class Correlation:
    """Two tasks, each as (task, metric), over the `n` configurations of one series.

    Pearson's r with its interval; None where one of the tasks never changes.
    """

    series: str
    tasks: tuple[tuple[str, str], tuple[str, str]]
    n: int
    pearson: float | None
    pearson_low: float | None
    pearson_high: float | None


@dataclass(frozen=True)
class Trend:
    """Whether a score, or the logarithm of a perplexity, changes with the expansion ratio of one series.

    `slope` is the change per 1 of ratio over `n` configurations; q is adjusted over all tasks of the
    series, for the others see `claims.Test`.
    """

    series: str
    task: str
    metric: str
    n: int
    slope: float
    low: float | None
    high: float | None
    p: float | None
    method: str
    units: int
    q: float | None = None


def correlate(
    x: ArrayLike, y: ArrayLike, *, alpha: float = 0.05
) -> tuple[float | None, float | None, float | None]:
    """Return Pearson's r of two tasks, shape (n,) each, over n >= 3 sizes, and the ends of its interval.

    Fisher's interval, ``tanh(atanh(r) +- width)``, takes the configurations for independent draws; its
    width is such that 0 is outside exactly where Student's p of r is below `alpha`.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    n = len(x)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None, None, None
    r = float(np.corrcoef(x, y)[0, 1])
    width = np.arcsinh(stats.t.isf(alpha / 2, n - 2) / math.sqrt(n - 2))
    with np.errstate(divide="ignore"):
        ends = np.tanh(np.arctanh(r) + np.array([-width, width]))
    return r, float(ends[0]), float(ends[1])


def trend(
    ratios: ArrayLike,
    values: Sequence[ArrayLike],
    *,
    transform: str = "mean",
    weights: ArrayLike = 1.0,
    **groups: Any,
) -> Test:
    """Test whether a score has a trend over the expansion ratios of one model.

    What one size gets wrong by chance is likely wrong in the next, but documents are independent:
    each has a slope over the ratios (least squares), and these are tested like differences.

    `ratios` are of shape (k,), two of them different, the `values` of the documents of shape (k, n);
    for the others see `claims.paired`.
    """
    rows, centred = np.array(values, dtype=float), np.array(ratios, dtype=float)
    centred -= centred.mean()
    # Less the first row, documents that never change have a slope of exactly 0.
    factor = TRANSFORMS[transform].factor
    slopes = factor * (centred / (centred @ centred)) @ (rows - rows[0])
    weights = np.broadcast_to(np.asarray(weights, dtype=float), slopes.shape)
    test = paired(np.zeros_like(slopes), slopes, weights=weights, **groups)
    method = test.method.replace("test over", "test of slopes over")
    return replace(test, method=method)


def over_ratios(
    runs: Sequence[Run], alpha: float
) -> tuple[tuple[Correlation, ...], tuple[Trend, ...]]:
    """Correlate any two tasks of each series, and test each for a trend, over 3 or more ratios."""
    pairs: list[Correlation] = []
    trends: list[Trend] = []
    for name, members in series_of(runs).items():
        ratios, scores = [run.expansion_ratio or 0.0 for run in members], {}
        for key in primary_metrics(members) if len({*ratios}) > 2 else ():
            values = np.array([run.scores[key].value for run in members])
            logs = is_perplexity(key[1]) and values.min() > 0
            scores[key] = np.log(values) if logs else values
            same = [paired_documents(members[0], run, *key) for run in members]
            rows = [pair[1].values for pair in same if pair]
            test = Test(float(np.polyfit(ratios, scores[key], 1)[0]), _NO_SAMPLES)
            if same[0] and len(rows) == len(same):
                test = trend(
                    ratios,
                    rows,
                    transform=same[0][1].transform,
                    **same[0][1].groups,
                )
            tested: Any = *test.interval(alpha), test.p, test.method, test.units
            trends.append(Trend(name, *key, len(same), test.difference, *tested))
        for one, other in itertools.combinations(scores, 2):
            r = correlate(scores[one], scores[other], alpha=alpha)
            pairs.append(Correlation(name, (one, other), len(members), *r))
    qs = false_discovery([t.p for t in trends], [t.series for t in trends])
    corrected = [replace(t, q=q) for t, (q, _) in zip(trends, qs, strict=True)]
    return tuple(pairs), tuple(corrected)
