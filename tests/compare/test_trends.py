"""Trends and correlations over the sizes of a sweep."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from lm_eval_pruned.compare import trends
from tests.helpers import checkpoints


STUDY = checkpoints.ROOT / "lm_eval_pruned" / "study" / "study_benchmarks.csv"
RATIOS = [4, 3.6, 3.2, 2.8, 2.4, 2, 1.6]


def study(model: str, task: str) -> pd.Series:
    rows = pd.read_csv(STUDY).query("metric == 'acc,none'")
    return rows.query("base_model == @model and task == @task")["value"]


@pytest.mark.parametrize(
    ("model", "r", "shown"),
    [("Llama-3.2-3B", -0.864, True), ("Llama-3.2-1B", -0.676, False)],
)
def test_correlation_of_the_study(model, r, shown):
    scores = study(model, "mmlu"), study(model, "truthfulqa_mc2")
    pearson, _, high = trends.correlate(*scores)
    assert ([*map(len, scores)], round(pearson, 3)) == ([7, 7], r)
    assert (high < 0) == shown


@given(st.integers(0, 10_000), st.integers(3, 12), st.floats(-1, 1))
def test_the_interval_of_r_leaves_out_0_where_student_s_p_is_small(seed, n, slope):
    x, noise = np.random.default_rng(seed).normal(size=(2, n))
    y = slope * x + noise
    found, expected = trends.correlate(x, y), stats.pearsonr(x, y)
    r, low, high = found
    assert r == pytest.approx(expected.statistic)
    assert low <= r <= high
    outside = low > 0 or high < 0
    assert outside == (expected.pvalue < 0.05)
    assert trends.correlate(x, np.ones(n)) == (None, None, None)


def test_a_trend_is_the_mean_slope_of_documents():
    rng = np.random.default_rng(0)
    base = rng.normal(size=50)
    rows = [base + 0.1 * ratio + 0.01 * rng.normal(size=50) for ratio in RATIOS]
    result = trends.trend(RATIOS, rows)
    slopes = np.polyfit(RATIOS, rows, 1)[0]
    assert result.units == 50
    assert result.difference == pytest.approx(slopes.mean())
    expected = stats.ttest_1samp(slopes, 0)
    assert result.p == pytest.approx(expected.pvalue)
    ends = expected.confidence_interval(0.95)
    # Student's t lacks the document that nobody has seen.
    low, high = result.interval()
    assert ends.low - 0.001 < low < ends.low < ends.high < high
    assert high < ends.high + 0.001
    # Of perplexities the logarithm has a slope; it falls where log-likelihoods rise.
    upside_down = trends.trend(RATIOS, rows, transform="perplexity")
    assert upside_down.difference == pytest.approx(-result.difference)
    assert trends.trend(RATIOS, [base] * 7).p == 1
