"""Tests, intervals and corrections against published values and independent formulas."""

from __future__ import annotations

import functools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from lm_eval_pruned.compare import statistics, trends
from lm_eval_pruned.compare.statistics import paired_difference
from lm_eval_pruned.results.documents import TRANSFORMS
from tests.helpers import checkpoints


STUDY = checkpoints.ROOT / "lm_eval_pruned" / "study" / "study_benchmarks.csv"
RATIOS = [4, 3.6, 3.2, 2.8, 2.4, 2, 1.6]

bits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
real = st.floats(-50, 50, allow_subnormal=False).map(lambda value: round(value, 3))
reals = st.lists(st.tuples(real, real), min_size=1, max_size=40)
counts = st.tuples(*[st.integers(0, 40)] * 3).filter(any)
levels = st.sampled_from([0.3, 0.1, 0.05, 0.01, 0.001])


@functools.cache
def paired(up: int, down: int, same: int = 0, alpha: float = 0.05):
    """Test right-or-wrong documents, of which so many became right and wrong."""
    base, run = [0] * up + [1] * (down + same), [1] * up + [0] * down + [1] * same
    return paired_difference(base, run, alpha=alpha)


def every_outcome(n: int, up: float, down: float):
    """Yield (test, chance) of all that can happen to n documents."""
    for ups in range(n + 1):
        for downs in range(n + 1 - ups):
            left = n - ups - downs
            seen = [ups, downs, left]
            chance = stats.multinomial.pmf(seen, n, [up, down, 1 - up - down])
            if chance > 1e-6:
                yield paired(*seen), chance


@given(st.one_of(bits, reals))
def test_swapping_the_runs_flips_the_sign(pairs):
    base, run = zip(*pairs, strict=True)
    there, back = paired_difference(base, run), paired_difference(run, base)
    assert back.difference == -there.difference
    assert back.p == pytest.approx(there.p)
    assert back.smallest_detectable() == there.smallest_detectable()
    if there.low is not None:
        ends = -there.high, -there.low
        assert (back.low, back.high) == pytest.approx(ends, abs=1e-12)
    same = paired_difference(base, base)
    assert (same.difference, same.p) == (0, 1)


@given(st.one_of(bits, reals), st.randoms(use_true_random=False))
def test_the_order_of_documents_does_not_matter(pairs, random):
    def test(rows):
        base, run, weights, names = zip(*rows, strict=True)
        about = {"clusters": names, "strata": [n[-1] for n in names]}
        return paired_difference(base, run, weights=weights, **about)

    rows = [(*pair, 1.0 + n % 3, f"cluster {n % 15}") for n, pair in enumerate(pairs)]
    before = test(rows)
    random.shuffle(rows)
    after = test(rows)
    assert after.method == before.method
    for name in ("difference", "low", "high", "p"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), abs=1e-9)


@given(counts, levels)
def test_mid_p_counts_half_of_what_was_seen_and_its_interval_agrees(seen, alpha):
    up, down, _ = seen
    result, coin = paired(*seen, alpha=alpha), stats.binom(up + down, 0.5)
    half = 2 * coin.cdf(min(up, down)) - coin.pmf(min(up, down))
    assert result.p == pytest.approx(1 if up == down else half)
    assert sum(result.sides) == pytest.approx(1)
    assert (result.sides[1] < 0.5) == (up > down)
    low, high = result.interval(alpha)
    assert low <= result.difference <= high
    assert (low > 0 or high < 0) == (result.p < alpha)


@pytest.mark.parametrize(
    ("up", "down", "n", "low", "high"),
    [
        # Two trials in Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33, 2850-2875.
        (1, 7, 21, -0.517, -0.026),
        (6, 16, 161, -0.124, -0.0054),
        # Newcombe's example of Tango's interval.
        (12, 2, 50, 0.0611, 0.3447),
        # Nothing changed: about the share that none of 60 would show in 2.5 % of cases.
        (0, 0, 60, -0.0602, 0.0602),
    ],
)
def test_interval_is_tango_s_as_published(up, down, n, low, high):
    digits = {"abs": 5e-4 if n == 21 else 5e-5}
    found = paired(up, down, n - up - down)
    assert (found.low, found.high) == pytest.approx((low, high), **digits)


@pytest.mark.parametrize(
    ("up", "down"), [(0.03, 0.03), (0.15, 0.15), (0.4, 0.1), (0.05, 0), (0.45, 0)]
)
def test_coverage_and_level_counted_out(up, down):
    covered = rejected = 0.0
    for test, chance in every_outcome(30, up, down):
        covered += chance * (test.low - 1e-9 <= up - down <= test.high + 1e-9)
        rejected += chance * (test.p < 0.05)
    assert covered > 0.925
    assert up != down or rejected < 0.055


@pytest.mark.parametrize(
    ("n", "up", "down", "low", "high"),
    [
        (60, 0.06, 0.01, -0.05, 0.05),
        (40, 0.12, 0.02, -0.1, 0.1),
        (30, 0, 0.03, -0.03, math.inf),
        (64, 0, 0.2, -0.2, math.inf),
    ],
)
def test_level_of_claims_counted_out(n, up, down, low, high):
    """At a true difference of the margin, a claim is made in about 5 % of cases at most."""
    outcomes = every_outcome(n, up, down)
    assert sum(c for test, c in outcomes if test.p_outside(low, high) < 0.05) < 0.054


@pytest.mark.parametrize(("changed", "level"), [(2, 0.05), (2, 0.05 / 18), (30, 0.05)])
def test_smallest_detectable_has_the_power_of_mid_p_counted_out(changed, level):
    n = 100
    smallest = paired(changed, 0, n - changed).smallest_detectable(level)
    share = max((changed + 0.5) / (n + 1), smallest)
    up, down = (share + smallest) / 2, max(0.0, (share - smallest) / 2)
    ups, downs = np.meshgrid(np.arange(n + 1), np.arange(n + 1))
    chance = stats.binom.pmf(ups + downs, n, share)
    chance = chance * stats.binom.pmf(ups, ups + downs, up / (up + down))
    few, coin = np.minimum(ups, downs), stats.binom(ups + downs, 0.5)
    p = 2 * coin.cdf(few) - coin.pmf(few)
    assert chance[p < level].sum() == pytest.approx(statistics.POWER, abs=0.005)


@given(counts, st.floats(0.005, 0.3), st.floats(0.01, 0.4))
def test_p_outside_is_where_the_interval_leaves_the_margin(seen, margin, alpha):
    test = paired(*seen)
    low, high = test.interval(2 * alpha)
    if min(abs(low + margin), abs(high - margin)) > 1e-6:
        inside = -margin < low and high < margin and abs(test.difference) < margin
        assert (test.p_outside(-margin, margin) < alpha) == inside


@given(st.integers(0, 400), st.sampled_from([*TRANSFORMS]), levels)
def test_p_intervals_and_claims_of_means_agree(seed, transform, alpha):
    rng = np.random.default_rng(seed)
    base, noise = rng.normal(size=(2, 30))
    about = {"weights": rng.integers(1, 40, size=30), "transform": transform}
    test = paired_difference(base - 3, base - 2.8 + noise / 2, **about, alpha=alpha)
    assert (test.p < alpha) == (test.low > 0 or test.high < 0)
    assert test.low < test.difference < test.high
    assert (test.sides[0] < 0.5) == (test.difference < 0)
    low, high = test.distribution.ends(alpha)
    assert test.p_outside(low, math.inf) == pytest.approx(alpha / 2, abs=1e-6)
    assert test.p_outside(-math.inf, high) == pytest.approx(alpha / 2, abs=1e-6)
    assert test.smallest_detectable(alpha) < test.smallest_detectable(alpha / 99)


def test_means_of_documents_are_the_paired_t_test():
    base, run = np.random.default_rng(1).normal(size=(2, 50))
    result = paired_difference(base, run)
    sides = ("two-sided", "less", "greater")
    expected = [stats.ttest_rel(run, base, alternative=side).pvalue for side in sides]
    assert (result.p, *result.sides) == pytest.approx(expected)
    interval = stats.ttest_rel(run, base).confidence_interval()
    assert (result.low, result.high) == pytest.approx(interval)
    above = stats.ttest_1samp(run - base, -0.5, alternative="greater").pvalue
    below = stats.ttest_1samp(run - base, 0.5, alternative="less").pvalue
    assert result.p_outside(-0.5, 0.5) == pytest.approx(max(above, below))
    assert result.p_outside(-0.5, math.inf) == pytest.approx(above)
    size = result.smallest_detectable() / ((run - base).std(ddof=1) / np.sqrt(50))
    power = stats.nct.sf(stats.t.isf(0.025, 49), 49, size)
    assert power == pytest.approx(statistics.POWER, abs=1e-4)


def test_clusters_are_the_regression_with_clustered_errors():
    import statsmodels.api as sm

    rng = np.random.default_rng(2)
    names = np.repeat(np.arange(30), rng.integers(1, 12, size=30))
    gains = rng.normal(size=30)[names] + rng.normal(size=len(names))
    test = paired_difference(np.zeros(len(names)), gains, clusters=names.astype(str))
    groups = {"groups": names, "use_correction": False}
    ones = np.ones(len(names))
    fit = sm.OLS(gains, ones).fit(cov_type="cluster", cov_kwds=groups)
    assert test.difference == pytest.approx(fit.params[0])
    half = stats.t.isf(0.025, 29) * fit.bse[0] * np.sqrt(30 / 29)
    assert test.high - test.difference == pytest.approx(half)
    assert test.units == 30


def test_strata_are_the_textbook_s():
    rng, sizes = np.random.default_rng(3), [5, 20, 40]
    names, shift = np.repeat([*"abc"], sizes), np.repeat([-2.0, 0.0, 2.0], sizes)
    weights = 1 / np.repeat(sizes, sizes)
    gains = shift + rng.normal(size=65)
    result = paired_difference(np.zeros(65), gains, weights=weights, strata=names)
    parts = [gains[names == name] for name in "abc"]
    assert result.difference == pytest.approx(np.mean([part.mean() for part in parts]))
    stderr = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / 3
    half = stats.t.isf(0.025, 62) * stderr
    assert result.high - result.difference == pytest.approx(half)
    # A stratum of one document has no spread: then there are none.
    alone = paired_difference(np.zeros(65), gains, strata=[*names[:-1], "d"])
    assert alone == paired_difference(np.zeros(65), gains)


def test_a_perplexity_is_tested_as_its_logarithm():
    rng = np.random.default_rng(0)
    words, base = rng.integers(5, 500, size=40), rng.normal(-3, 0.3, size=40)
    run = base + rng.normal(-0.1, 0.3, size=40)
    result = paired_difference(base, run, transform="perplexity")
    before = np.exp(-base.mean())
    ratios = np.array([result.low, result.high]) / before + 1
    interval = stats.ttest_rel(base, run).confidence_interval()
    assert np.log(ratios) == pytest.approx(list(interval))
    less = stats.ttest_1samp(base - run, np.log(1.05), alternative="less").pvalue
    assert result.p_outside(-np.inf, 0.05 * before) == pytest.approx(less)
    # Nothing lies below a perplexity of 0.
    assert result.p_outside(-2 * before, np.inf) == 0
    result = paired_difference(base, run, weights=words, transform="perplexity")
    one, other = (np.exp(-np.average(each, weights=words)) for each in (base, run))
    assert result.difference == pytest.approx(other - one)


@pytest.mark.parametrize(
    ("base", "run", "p", "words"),
    [
        ([0.5], [0.7], None, "too few"),
        ([1e300] * 12 + [0.0], [0.0] + [1e300] * 12, None, "too large"),
        ([0.9] * 12, [0.4] * 12, None, "alike"),
        ([5.25] * 60, [5.25] * 60, 1, "equal"),
        ([0], [1], 0.5, "McNemar"),
    ],
)
def test_what_cannot_be_tested_says_why(base, run, p, words):
    result = paired_difference(base, run)
    assert result.p == (p and pytest.approx(p))
    assert words in result.method
    assert result.smallest_detectable() is None
    assert p or (result.low, result.p_outside(-1, 1)) == (None, None)
    # So many scores that do not change bound the share of those that do.
    scores = np.linspace(0.1, 0.9, 60)
    same = paired_difference(scores, scores)
    assert (same.low, same.high) == pytest.approx((-0.0602, 0.0602), abs=5e-5)
    assert paired(0, 4).smallest_detectable() is None
    assert 0.9 < paired(0, 5).smallest_detectable() < 1


@given(st.lists(st.tuples(st.one_of(st.none(), st.floats(0, 1)), st.booleans())))
def test_the_correction_is_benjamini_and_hochberg_s_in_each_family(tests):
    found = statistics.false_discovery([p for p, _ in tests], [of for _, of in tests])
    for (p, family), (q, level) in zip(tests, found, strict=True):
        if p is None:
            assert (q, level) == (None, None)
            continue
        made = sorted(x for x, of in tests if x is not None and of == family)
        ends = [x * len(made) / k for k, x in enumerate(made, 1) if x >= p]
        assert q == pytest.approx(min(1, *ends, 1))
        assert abs(q - 0.05) < 1e-9 or (q < 0.05) == (p < level)


def study(model: str, task: str) -> pd.Series:
    rows = pd.read_csv(STUDY).query("metric == 'acc,none'")
    return rows.query("base_model == @model and task == @task")["value"]


@pytest.mark.parametrize(
    ("model", "r", "shown"),
    [("Llama-3.2-3B", -0.864, True), ("Llama-3.2-1B", -0.676, False)],
)
def test_correlation_of_the_study(model, r, shown):
    result = trends.correlate(study(model, "mmlu"), study(model, "truthfulqa_mc2"))
    assert (result.n, round(result.pearson, 3)) == (7, r)
    assert (result.pearson_high < 0) == shown


@given(st.integers(0, 10_000), st.integers(3, 12), st.floats(-1, 1))
def test_the_interval_of_r_leaves_out_0_where_student_s_p_is_small(seed, n, slope):
    x, noise = np.random.default_rng(seed).normal(size=(2, n))
    y = slope * x + noise
    found, expected = trends.correlate(x, y), stats.pearsonr(x, y)
    assert found.pearson == pytest.approx(expected.statistic)
    assert found.pearson_low <= found.pearson <= found.pearson_high
    outside = found.pearson_low > 0 or found.pearson_high < 0
    assert outside == (expected.pvalue < 0.05)
    assert trends.correlate(x, np.ones(n)) == trends.Correlation(n)


def test_a_trend_is_the_mean_slope_of_documents():
    rng = np.random.default_rng(0)
    base = rng.normal(size=50)
    rows = [base + 0.1 * ratio + 0.01 * rng.normal(size=50) for ratio in RATIOS]
    result = trends.trend(RATIOS, rows)
    slopes = np.polyfit(RATIOS, rows, 1)[0]
    assert (result.n, result.units) == (7, 50)
    assert result.slope == pytest.approx(slopes.mean())
    expected = stats.ttest_1samp(slopes, 0)
    assert result.p == pytest.approx(expected.pvalue)
    ends = expected.confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((ends.low, ends.high))
    # Of perplexities the logarithm has a slope; it falls where log-likelihoods rise.
    upside_down = trends.trend(RATIOS, rows, transform="perplexity")
    assert upside_down.slope == pytest.approx(-result.slope)
    assert trends.trend(RATIOS, [base] * 7).p == 1
