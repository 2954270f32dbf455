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
from tests.helpers.cases import stderr_of


STUDY = checkpoints.ROOT / "lm_eval_pruned" / "study" / "study_benchmarks.csv"
RATIOS = [4, 3.6, 3.2, 2.8, 2.4, 2, 1.6]

bits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
real = st.floats(-50, 50, allow_subnormal=False).map(lambda value: round(value, 3))
reals = st.lists(st.tuples(real, real), min_size=1, max_size=40)
counts = st.tuples(*[st.integers(0, 40)] * 3).filter(any)
levels = st.sampled_from([0.3, 0.1, 0.05, 0.01, 0.001])


@functools.cache
def paired(up: int, down: int, same: int = 0):
    """Test right-or-wrong documents, of which so many became right and wrong."""
    base, run = [0] * up + [1] * (down + same), [1] * up + [0] * down + [1] * same
    return paired_difference(base, run)


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
    low, high = there.interval()
    if low is not None:
        assert back.interval() == pytest.approx((-high, -low), abs=1e-12)
    same = paired_difference(base, base)
    assert (same.difference, same.p) == (0, 1)


@given(st.one_of(bits, reals), st.randoms(use_true_random=False))
def test_the_order_of_documents_does_not_matter(pairs, random):
    def test(rows):
        base, run, weights, names = zip(*rows, strict=True)
        about = {"clusters": names, "strata": [n[-1] for n in names]}
        return paired_difference(base, run, weights=weights, **about)

    def found(test):
        return test.difference, test.p, *test.interval()

    rows = [(*pair, 1.0 + n % 3, f"cluster {n % 15}") for n, pair in enumerate(pairs)]
    before = test(rows)
    random.shuffle(rows)
    after = test(rows)
    assert after.method == before.method
    for seen, then in zip(found(before), found(after), strict=True):
        assert then == pytest.approx(seen, abs=1e-9)


@given(counts, levels)
def test_mid_p_counts_half_of_what_was_seen_and_its_interval_agrees(seen, alpha):
    up, down, _ = seen
    result, coin = paired(*seen), stats.binom(up + down, 0.5)
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
    assert found.interval() == pytest.approx((low, high), **digits)


@pytest.mark.parametrize(
    ("up", "down"), [(0.03, 0.03), (0.15, 0.15), (0.4, 0.1), (0.05, 0), (0.45, 0)]
)
def test_coverage_and_level_counted_out(up, down):
    covered = rejected = 0.0
    for test, chance in every_outcome(30, up, down):
        low, high = test.interval()
        covered += chance * (low - 1e-9 <= up - down <= high + 1e-9)
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
    base, noise = rng.normal(size=(2, 80))
    about = {"weights": rng.integers(1, 40, size=80), "transform": transform}
    test = paired_difference(base - 3, base - 2.8 + noise / 2, **about)
    low, high = test.interval(alpha)
    assert (test.p < alpha) == (low > 0 or high < 0)
    assert low < test.difference < high
    assert (test.sides[0] < test.sides[1]) == (test.difference < 0)
    low, high = test.distribution.ends(alpha)
    assert test.p_outside(low, math.inf) == pytest.approx(alpha / 2, abs=1e-6)
    assert test.p_outside(-math.inf, high) == pytest.approx(alpha / 2, abs=1e-6)


def by_draws(terms, draws=100_000):
    """Return how often a sum with exponential weights is 0 or less, and its standard error."""
    weights = np.random.default_rng(0).exponential(size=(draws, len(terms)))
    p = float((weights @ terms <= 0).mean())
    return p, math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize("n", [10, 60])
@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_the_test_of_means_is_gaffke_s_as_drawn(n, scale):
    rng = np.random.default_rng(n)
    base, run = 0.5 + scale * rng.uniform(-1, 1, size=(2, n))
    test, gains = paired_difference(base, run), run - base
    for x in (-0.1, 0.0, 0.1):
        expected = [
            by_draws(np.append(-1, gains) - x),
            by_draws(x - np.append(1, gains)),
        ]
        for side, (p, error) in enumerate(expected):
            found = test.distribution.tail(x, side)
            # The saddlepoint is 3 % off at most with ten documents, in either direction.
            assert found == pytest.approx(p, abs=4 * error + 1e-4, rel=0.03)


@pytest.mark.parametrize(("n", "wrong"), [(60, 0), (60, 3), (200, 1)])
def test_for_scores_of_0_and_1_the_test_of_means_is_clopper_and_pearson_s(n, wrong):
    run = np.append(np.full(wrong, 0.0), np.full(n - wrong, 1.0))
    test = paired_difference(np.full(n, 0.5), run, limits=(-0.5, 0.5))
    expected = stats.binomtest(n - wrong, n).proportion_ci(method="exact")
    found = np.array(test.interval()) + 0.5
    # The ends differ as far as 1 % of p moves them.
    assert found == pytest.approx([*expected], abs=2e-3)


@pytest.mark.parametrize("transform", ["mean", "perplexity"])
def test_the_test_of_means_becomes_the_paired_t_test(transform):
    rng = np.random.default_rng(1)
    base, run = 0.5 + rng.uniform(-0.5, 0.5, size=(2, 20_000)) / 2
    test = paired_difference(base, run, transform=transform)
    expected = stats.ttest_rel(run, base)
    low, high = expected.confidence_interval()
    if transform == "perplexity":
        before = np.exp(-base.mean())
        low, high = before * np.expm1(-high), before * np.expm1(-low)
    assert test.interval() == pytest.approx((low, high), abs=0.04 * (high - low))


def test_clusters_are_tested_by_their_sums_and_strata_by_their_spread_within():
    rng = np.random.default_rng(2)
    names = np.repeat(np.arange(400), rng.integers(1, 6, size=400))
    gains = 0.1 * (rng.normal(size=400)[names] + rng.normal(size=len(names)))
    test = paired_difference(np.zeros(len(names)), gains, clusters=names.astype(str))
    sums, sizes = np.bincount(names, gains), np.bincount(names)
    mean = sums.sum() / sizes.sum()
    stderr = np.sqrt(((sums - mean * sizes) ** 2).sum() * 400 / 399) / sizes.sum()
    assert (test.units, stderr_of(test)) == (400, pytest.approx(stderr, rel=0.002))
    assert test.difference == pytest.approx(mean)
    assert test.interval()[1] - mean > 1.96 * stderr
    sizes = [5, 20, 40]
    names, shift = np.repeat([*"abc"], sizes), np.repeat([-2.0, 0.0, 2.0], sizes)
    weights = 1 / np.repeat(sizes, sizes)
    gains = shift + rng.normal(size=65)
    test = paired_difference(np.zeros(65), gains, weights=weights, strata=names)
    parts = [gains[names == name] for name in "abc"]
    assert test.difference == pytest.approx(np.mean([part.mean() for part in parts]))
    stderr = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / 3
    assert stderr_of(test) == pytest.approx(stderr)
    assert np.ptp(test.interval()) < 8 * stderr
    # A stratum of one document has no spread: then there are none.
    alone = paired_difference(np.zeros(65), gains, strata=[*names[:-1], "d"])
    assert alone == paired_difference(np.zeros(65), gains)


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_rare_large_loss_of_the_size_of_the_margin_is_not_called_equal(bounded, side):
    """Where 4 % of documents differ by 0.5, a claim of less than 2 points is wrong."""
    about = {} if bounded else {"transform": "bits_per_byte"}
    for n in (20, 40, 100, 400):
        wrong = 0
        for seed in range(100):
            rng = np.random.default_rng([seed, n])
            gains = side * np.where(rng.random(n) < 0.04, 0.5, 0) + rng.normal(
                0, 1e-3, n
            )
            # Bits per byte fall where log-likelihoods rise.
            factor = 1 if bounded else -math.log(2)
            test = paired_difference(np.full(n, 0.5), 0.5 + factor * gains, **about)
            p = test.p_outside(-0.02, 0.02)
            wrong += p is not None and p < 0.05
        # More than 11 of 100 would be seen in 0.4 % of cases at a true 5 %.
        assert wrong <= 11, (n, wrong)


def test_a_margin_of_scores_without_bounds_takes_60_documents_that_changed():
    base, noise = np.random.default_rng(0).normal(size=(2, 60))
    for n, shown in ((59, False), (60, True)):
        about = {"transform": "perplexity"}
        test = paired_difference(base[:n], base[:n] + 1e-3 * noise[:n], **about)
        p = test.p_outside(-0.1, math.inf)
        assert (p is not None and p < 0.05) == shown
        assert test.p is not None


def test_a_perplexity_is_tested_as_its_logarithm():
    rng = np.random.default_rng(0)
    words, base = rng.integers(5, 500, size=80), rng.normal(-3, 0.3, size=80)
    run = base + rng.normal(-0.1, 0.3, size=80)
    result = paired_difference(base, run, transform="perplexity")
    logs = paired_difference(base, run, transform="bits_per_byte")
    before = np.exp(-base.mean())
    ratios = np.array(result.interval()) / before + 1
    assert np.log2(ratios) == pytest.approx([*logs.interval()])
    more = logs.p_outside(-math.inf, np.log2(1.05))
    assert result.p_outside(-np.inf, 0.05 * before) == pytest.approx(more)
    # Nothing lies below a perplexity of 0.
    assert result.p_outside(-2 * before, np.inf) == 0
    result = paired_difference(base, run, weights=words, transform="perplexity")
    one, other = (np.exp(-np.average(rows, weights=words)) for rows in (base, run))
    assert result.difference == pytest.approx(other - one)


@pytest.mark.parametrize(
    ("base", "run", "p", "words"),
    [
        ([0.5], [0.7], None, "too few"),
        ([1e300] * 12 + [0.0], [0.0] + [1e300] * 12, None, "too large"),
        ([9.0] * 12, [4.0] * 12, None, "alike"),
        ([0], [1], 0.5, "McNemar"),
    ],
)
def test_what_cannot_be_tested_says_why(base, run, p, words):
    result = paired_difference(base, run)
    assert result.p == (p and pytest.approx(p))
    assert words in result.method
    assert p or (*result.interval(), result.p_outside(-1, 1)) == (None, None, None)


def test_equal_scores_are_equivalent_without_bounds_and_bounded_with_them():
    scores = np.linspace(0.1, 0.9, 60)
    same = paired_difference(scores, scores)
    # So many documents without a change bound the share of those that do, as with 1 % of p.
    end = 1 - 0.025 ** (1 / 60)
    assert same.interval() == pytest.approx((-end, end), rel=0.01)
    assert same.p_outside(-0.02, 0.02) > 0.05
    for transform in ("perplexity", "bits_per_byte"):
        same = paired_difference([-3.0] * 5, [-3.0] * 5, transform=transform)
        assert (same.p, same.p_outside(-0.02, 0.02)) == (1, 0)
        assert "equal" in same.method


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
