from __future__ import annotations

import csv
import functools
import importlib.util
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from lm_eval_pruned.compare import comparison, statistics, trends
from tests.helpers import checkpoints


STUDY = checkpoints.DATA / "study_benchmarks.csv"

bits = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
reals = st.lists(
    st.tuples(
        *[st.floats(-50, 50, allow_subnormal=False).map(lambda v: round(v, 3))] * 2
    ),
    min_size=1,
    max_size=40,
)


def study(model: str, task: str, metric: str) -> list[float]:
    with STUDY.open(encoding="utf-8") as file:
        return [
            float(row["value"])
            for row in csv.DictReader(file)
            if (row["base_model"], row["task"], row["metric"]) == (model, task, metric)
        ]


@pytest.mark.parametrize(
    ("model", "r", "shown"),
    [("Llama-3.2-3B", -0.864, True), ("Llama-3.2-1B", -0.676, False)],
)
def test_correlation_of_the_study(model, r, shown):
    result = trends.correlate(
        study(model, "mmlu", "acc,none"), study(model, "truthfulqa_mc2", "acc,none")
    )
    assert result.n == 7
    assert round(result.pearson, 3) == r
    assert result.pearson_low < r < result.pearson_high
    assert (result.pearson_high < 0) == shown


@pytest.mark.parametrize(
    ("model", "position", "change"),
    [("Llama-3.2-1B", 3, "+75.0%"), ("Llama-3.2-3B", 4, "+74.4%")],
)
def test_relative_changes_of_the_study(model, position, change):
    scores = study(model, "ifeval", "prompt_level_strict_acc,none")
    assert f"{comparison.relative_change(scores[0], scores[position]):+.1%}" == change


@given(bits, st.randoms(use_true_random=False))
def test_mcnemar_does_not_see_the_order_of_documents(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert statistics.paired_difference(*zip(*pairs, strict=True)) == (
        statistics.paired_difference(*zip(*shuffled, strict=True))
    )


@given(reals, st.randoms(use_true_random=False), st.booleans())
def test_means_do_not_see_the_order_of_documents(pairs, random, clustered):
    def test(rows):
        return statistics.paired_difference(
            [row[0] for row in rows],
            [row[1] for row in rows],
            weights=[row[2] for row in rows],
            clusters=[row[3] for row in rows] if clustered else None,
            strata=[row[3][-1] for row in rows],
        )

    rows = [(*pair, 1.0 + n % 3, f"cluster {n % 15}") for n, pair in enumerate(pairs)]
    before = test(rows)
    random.shuffle(rows)
    after = test(rows)
    assert after.method == before.method
    for name in ("difference", "low", "high", "p"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), abs=1e-9)


@given(st.one_of(bits, reals))
def test_swapping_the_runs_flips_the_sign(pairs):
    base, run = zip(*pairs, strict=True)
    there = statistics.paired_difference(base, run)
    back = statistics.paired_difference(run, base)
    assert back.difference == -there.difference
    assert (back.p, back.smallest_detectable()) == (
        there.p,
        there.smallest_detectable(),
    )
    if there.low is None:
        assert back.low is None
    else:
        assert back.low == pytest.approx(-there.high, abs=1e-12)
        assert back.high == pytest.approx(-there.low, abs=1e-12)


@given(st.one_of(bits, reals))
def test_identical_runs_have_p_1(pairs):
    values = [pair[0] for pair in pairs]
    result = statistics.paired_difference(values, values)
    assert (result.difference, result.p) == (0, 1)


def paired(up: int, down: int, same: int = 0, **options):
    base = [0] * up + [1] * down + [1] * same
    return statistics.paired_difference(
        base, [1] * up + [0] * down + [1] * same, **options
    )


changes = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40)).filter(
    lambda counts: sum(counts) > 0
)


@given(changes)
def test_mid_p_counts_half_of_what_was_seen(counts):
    up, down, same = counts
    result = paired(up, down, same)
    coin = stats.binom(up + down, 0.5)
    exact = min(1, 2 * coin.cdf(min(up, down)))
    half = min(1, 2 * coin.cdf(min(up, down)) - coin.pmf(min(up, down)))
    assert result.p == pytest.approx(1 if up == down else half)
    assert result.p <= exact + 1e-12
    assert result.low <= result.difference <= result.high


@given(changes, st.sampled_from([0.2, 0.05, 0.01, 0.001]))
def test_interval_and_mid_p_agree(counts, alpha):
    result = paired(*counts, alpha=alpha)
    other = paired(*counts).interval(alpha)
    assert (result.low, result.high) == pytest.approx(other, abs=1e-11)
    for low, high in ((result.low, result.high), other):
        assert (low > 0 or high < 0) == (result.p < alpha)
        assert low <= result.difference <= high


@given(changes)
def test_one_sided_mid_p_are_the_two_halves(counts):
    less, greater = paired(*counts).sides
    assert less + greater == pytest.approx(1)
    assert paired(*counts).p == pytest.approx(min(1, 2 * min(less, greater)))
    if counts[0] > counts[1]:
        assert greater < less


def test_five_documents_lost_are_significant_to_a_one_sided_test_only():
    assert paired(0, 5).sides == pytest.approx((1 / 64, 63 / 64))
    assert paired(0, 4).p == pytest.approx(1 / 16)


def every_outcome(n: int, up: float, down: float):
    """Yield (ups, downs, chance) of n documents."""
    for ups in range(n + 1):
        downs = np.arange(n + 1 - ups)
        chance = stats.multinomial.pmf(
            np.stack([np.full_like(downs, ups), downs, n - ups - downs], axis=1),
            n,
            [up, down, 1 - up - down],
        )
        for number, each in zip(downs, chance, strict=True):
            if each > 1e-7:
                yield ups, int(number), each


@pytest.mark.parametrize(
    ("up", "down"), [(0.03, 0.03), (0.15, 0.15), (0.05, 0.01), (0.4, 0.1), (0.45, 0)]
)
def test_coverage_and_level_of_mid_p_counted_out(up, down):
    covered = rejected = 0.0
    for ups, downs, chance in every_outcome(30, up, down):
        result = paired(ups, downs, 30 - ups - downs)
        covered += chance * (result.low - 1e-9 <= up - down <= result.high + 1e-9)
        rejected += chance * (result.p < 0.05)
    assert covered > 0.935
    if up == down:
        assert rejected < 0.055
        assert covered == pytest.approx(1 - rejected, abs=1e-3)


@pytest.mark.parametrize(("n", "at_least"), [(30, 0.925), (64, 0.94)])
@pytest.mark.parametrize("share", [0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.45, 0.7, 0.95])
def test_coverage_where_all_changes_go_one_way_counted_out(n, at_least, share):
    covered = 0.0
    for ups, downs, chance in every_outcome(n, share, 0):
        result = paired(ups, downs, n - ups - downs)
        covered += chance * (result.low - 1e-9 <= share <= result.high + 1e-9)
    assert covered > at_least


def test_documents_of_which_none_changed_have_an_interval():
    result = paired(0, 0, 60)
    assert (result.low, result.high) == pytest.approx((-0.0602, 0.0602), abs=5e-5)
    # About the share that none of 60 documents would show in 2.5 % of cases.
    assert result.high == pytest.approx(1 - 0.025 ** (1 / 60), abs=1e-3)


@given(changes, st.sampled_from([0.3, 0.1, 0.05, 0.01, 0.001]))
def test_interval_solves_tango_s_equation_in_closed_form(counts, alpha):
    """Yang, Sun and Hardin 2013: the ends are roots of an equation of fourth degree."""
    up, down, _ = counts
    n, gain, lost = sum(counts), up - down, up + down
    g = stats.norm.isf(alpha / 2) ** 2
    roots = np.roots(
        [
            n**2 * (n / g + 1) ** 2,
            -n * gain * (n / g + 1) * (4 * n / g + 1),
            2 * n * gain**2 * (3 * n / g + 2) / g - n**2 * (lost / g + 1),
            n * gain * (2 * lost / g + 1) - gain**3 * (4 * n / g + 1) / g,
            gain**2 * (gain**2 / g - lost) / g,
        ]
    )
    for end in statistics.Shares(up, down, n).ends(alpha):
        if abs(end) < 1:
            assert abs(roots - end).min() < 1e-5


@pytest.mark.parametrize(
    ("up", "down", "n", "low", "high"),
    [
        # Two trials in Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33, 2850-2875.
        (1, 7, 21, -0.517, -0.026),
        (6, 16, 161, -0.124, -0.0054),
        # Newcombe's example of Tango's interval.
        (12, 2, 50, 0.0611, 0.3447),
    ],
)
def test_interval_is_tango_s_as_published(up, down, n, low, high):
    digits = {"abs": 5e-4 if n == 21 else 5e-5}
    found = paired(up, down, n - up - down)
    assert (found.low, found.high) == pytest.approx((low, high), **digits)


@pytest.mark.parametrize("n", [30, 64])
@pytest.mark.parametrize("margin", [0.03, 0.1, 0.2])
def test_level_of_not_worse_where_all_changes_go_one_way_counted_out(n, margin):
    wrongly = sum(
        chance
        for ups, downs, chance in every_outcome(n, 0, margin)
        if paired(ups, downs, n - ups - downs).p_outside(-margin, math.inf) < 0.05
    )
    assert wrongly < 0.05


@pytest.mark.parametrize(("changed", "level"), [(2, 0.05), (2, 0.05 / 18), (30, 0.05)])
def test_smallest_detectable_has_the_power_of_mid_p_counted_out(changed, level):
    # A normal approximation promises 80 % here where there are 56 %.
    n = 100
    smallest = paired(changed, 0, n - changed).smallest_detectable(level)
    share = max((changed + 0.5) / (n + 1), smallest)
    up, down = (share + smallest) / 2, (share - smallest) / 2
    power = sum(
        chance
        for ups, downs, chance in every_outcome(n, up, max(0.0, down))
        if paired_p(ups, downs) < level
    )
    assert power == pytest.approx(statistics.POWER, abs=0.005)


def paired_p(up: int, down: int) -> float:
    coin = stats.binom(up + down, 0.5)
    return 2 * coin.cdf(min(up, down)) - coin.pmf(min(up, down))


def test_means_of_documents_are_the_paired_t_test():
    rng = np.random.default_rng(1)
    base, run = rng.normal(size=(2, 50))
    result = statistics.paired_difference(base, run)
    assert (result.p, *result.sides) == pytest.approx(
        [
            stats.ttest_rel(run, base, alternative=side).pvalue
            for side in ("two-sided", "less", "greater")
        ]
    )
    interval = stats.ttest_rel(run, base).confidence_interval()
    assert (result.low, result.high) == pytest.approx(interval)


def test_clusters_are_the_regression_with_clustered_errors():
    import statsmodels.api as sm

    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 12, size=30)
    names = np.repeat(np.arange(30), sizes)
    base = rng.normal(size=len(names))
    run = base + rng.normal(size=30)[names] + rng.normal(size=len(names))
    result = statistics.paired_difference(base, run, clusters=names.astype(str))
    fit = sm.OLS(run - base, np.ones(len(base))).fit(
        cov_type="cluster",
        cov_kwds={"groups": names, "use_correction": False},
    )
    stderr = fit.bse[0] * np.sqrt(30 / 29)
    assert result.difference == pytest.approx(fit.params[0])
    half = stats.t.isf(0.025, 29) * stderr
    assert result.high - result.difference == pytest.approx(half)


def test_strata_are_the_textbook_s():
    rng = np.random.default_rng(3)
    sizes = [5, 20, 40]
    names = np.repeat(["a", "b", "c"], sizes)
    shift = np.repeat([-2.0, 0.0, 2.0], sizes)
    weights = np.repeat([1 / size for size in sizes], sizes)
    gains = shift + rng.normal(size=65)
    options = {"weights": weights, "strata": names}
    result = statistics.paired_difference(np.zeros(65), gains, **options)
    parts = [gains[names == name] for name in "abc"]
    assert result.difference == pytest.approx(np.mean([part.mean() for part in parts]))
    stderr = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / 3
    half = stats.t.isf(0.025, 62) * stderr
    assert result.high - result.difference == pytest.approx(half)
    loose = statistics.paired_difference(np.zeros(65), gains, weights=weights)
    assert loose.high > result.high


def test_strata_of_one_document_keep_a_spread():
    gains = np.random.default_rng(4).normal(size=30)
    names = [str(number) for number in range(30)]
    alone = statistics.paired_difference(np.zeros(30), gains, strata=names)
    loose = statistics.paired_difference(np.zeros(30), gains)
    assert (alone.low, alone.high) == pytest.approx((loose.low, loose.high))
    names[:29] = ["many"] * 29
    assert statistics.paired_difference(np.zeros(30), gains, strata=names).p is not None
    # Two strata that each move as one say nothing about how documents vary.
    opposite = statistics.paired_difference(
        [0.0] * 30, [0.5] * 20 + [-0.5] * 10, strata=["a"] * 20 + ["b"] * 10
    )
    assert 0.01 < opposite.p < 1


@given(st.integers(0, 400), st.sampled_from(["mean", "perplexity", "bits_per_byte"]))
def test_interval_and_p_of_means_agree(seed, transform):
    rng = np.random.default_rng(seed)
    base = rng.normal(-3, 1, size=30)
    run = base + rng.normal(0.2, 0.5, size=30)
    weights = rng.integers(1, 40, size=30).astype(float)
    options = {"weights": weights, "transform": transform}
    result = statistics.paired_difference(base, run, **options)
    assert (result.p < 0.05) == (result.low > 0 or result.high < 0)
    assert result.low < result.difference < result.high
    assert (result.sides[0] < 0.5) == (result.difference < 0)


def test_a_perplexity_is_tested_as_its_logarithm():
    rng = np.random.default_rng(0)
    base = rng.normal(-3, 0.3, size=40)
    run = base + rng.normal(-0.1, 0.3, size=40)
    result = statistics.paired_difference(base, run, transform="perplexity")
    before = np.exp(-base.mean())
    ratios = np.array([result.low, result.high]) / before + 1
    interval = stats.ttest_rel(base, run).confidence_interval()
    assert np.log(ratios) == pytest.approx(list(interval))
    assert result.p_outside(-np.inf, 0.05 * before) == pytest.approx(
        stats.ttest_1samp(base - run, np.log(1.05), alternative="less").pvalue
    )
    # Nothing lies below a perplexity of 0.
    assert result.p_outside(-2 * before, np.inf) == 0


def test_a_perplexity_that_explodes_is_still_worse():
    rng = np.random.default_rng(0)
    base = rng.normal(-3, 0.3, size=20)
    run = base - rng.uniform(5, 12, size=20)
    result = statistics.paired_difference(base, run, transform="perplexity")
    assert result.p < 1e-6
    assert 0 < result.low < result.difference < result.high


def test_documents_that_all_change_alike():
    result = statistics.paired_difference([0.9] * 12, [0.4] * 12)
    assert result.p == pytest.approx(2**-12)
    assert (result.low, result.high) == (None, None)
    assert "sign test" in result.method
    assert result.sides[0] == pytest.approx(2**-13)


def test_numbers_too_large_for_a_variance():
    values = [1e300] * 12 + [0.0]
    result = statistics.paired_difference(values, values[::-1])
    assert (result.low, result.p) == (None, None)
    assert "too large" in result.method


def simulate(draw, truth: float, times: int) -> tuple[float, float]:
    """Return the shares of intervals that hold the truth, and of p < 0.05."""
    covered = rejected = 0
    for seed in range(times):
        base, run, options = draw(np.random.default_rng(seed))
        result = statistics.paired_difference(base, run, **options)
        covered += result.low <= truth <= result.high
        rejected += result.p < 0.05
    return covered / times, rejected / times


@pytest.mark.parametrize("n", [10, 40])
def test_the_t_test_keeps_its_level_with_few_documents(n):
    def draw(rng):
        return np.zeros(n) + 0.1, 0.1 + rng.normal(size=n), {}

    coverage, rejected = simulate(draw, 0, 1000)
    assert 0.93 <= coverage <= 0.97
    assert 0.03 <= rejected <= 0.07


def clustered(rng):
    effect = np.repeat(rng.normal(0, 0.3, size=40), 10)
    base = rng.random(400)
    names = [str(number // 10) for number in range(400)]
    return base, base + effect + rng.normal(0, 0.2, size=400), names


def test_clusters_keep_the_level_that_documents_alone_would_miss():
    def by_cluster(rng):
        base, run, names = clustered(rng)
        return base, run, {"clusters": names}

    def by_document(rng):
        base, run, _ = clustered(rng)
        return base, run, {}

    coverage, rejected = simulate(by_cluster, 0, 1000)
    assert 0.93 <= coverage <= 0.97
    assert 0.03 <= rejected <= 0.07
    _, naive = simulate(by_document, 0, 50)
    assert naive > 0.3


def test_ratio_scores_weigh_their_documents():
    # A perplexity over words: long documents count more.
    rng = np.random.default_rng(0)
    words = rng.integers(5, 500, size=60).astype(float)
    base = rng.normal(-3, 0.2, size=60)
    run = base - rng.normal(0.1, 0.02, size=60)
    result = statistics.paired_difference(
        base, run, weights=words, transform="perplexity"
    )
    expected = np.exp(-np.average(run, weights=words)) - np.exp(
        -np.average(base, weights=words)
    )
    assert result.difference == pytest.approx(expected)
    assert 0 < result.low < expected < result.high
    assert result.p < 0.001


@pytest.mark.parametrize("n", [12, 60, 5000])
def test_a_stricter_level_needs_a_larger_difference(n):
    gains = np.random.default_rng(0).normal(size=n)
    test = statistics.paired_difference(np.zeros(n), gains)
    sizes = [test.smallest_detectable(level) for level in (0.05, 1e-4, 1e-8)]
    assert sizes == sorted(sizes)
    normal = stats.norm.isf([0.025, 0.5e-4, 0.5e-8]) + stats.norm.ppf(0.8)
    assert (np.array(sizes) >= normal * gains.std(ddof=1) / np.sqrt(n)).all()


def test_smallest_detectable_difference_is_found_with_the_stated_power():
    rng = np.random.default_rng(3)
    base = rng.normal(size=60)
    smallest = statistics.paired_difference(
        base, base + rng.normal(0, 1, size=60)
    ).smallest_detectable()

    def draw(rng):
        base = rng.normal(size=60)
        return base, base + rng.normal(smallest, 1, size=60), {}

    _, power = simulate(draw, smallest, 300)
    assert 0.7 <= power <= 0.9


def test_one_document():
    result = statistics.paired_difference([0], [1])
    assert (result.difference, result.p) == (1, pytest.approx(0.5))
    assert result.smallest_detectable() is None
    result = statistics.paired_difference([0.5], [0.7])
    assert (result.low, result.p, result.smallest_detectable()) == (None, None, None)
    assert "too few" in result.method


def test_four_documents_can_show_nothing_and_five_can():
    assert paired(0, 4).smallest_detectable() is None
    assert 0.9 < paired(0, 5).smallest_detectable() < 1


def test_all_ties():
    result = statistics.paired_difference([1, 0] * 30, [1, 0] * 30)
    assert result.p == 1
    # No change in 60 documents does not prove that there is none in the next ones.
    assert result.low < 0 < result.high
    result = statistics.paired_difference([0.25] * 60, [0.25] * 60)
    assert (result.difference, result.p) == (0, 1)
    assert (result.low, result.high) == pytest.approx((-0.0602, 0.0602), abs=5e-5)
    assert result.smallest_detectable() is None


def test_unpaired_test_says_that_it_is_weaker():
    result = statistics.unpaired_difference(0.1, 0.03, 0.04)
    assert result.p == pytest.approx(2 * stats.norm.sf(2))
    assert "weaker" in result.method
    assert statistics.unpaired_difference(0.1, 0.0, 0.0).p is None


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=30))
def test_levels_are_where_the_correction_decides(p_values):
    found = statistics.false_discovery(p_values)
    for p, (q, level) in zip(p_values, found, strict=True):
        assert (p is None) == (q is None) == (level is None)
        if p is not None:
            assert q >= p or q == pytest.approx(p)
        if p is not None and abs(q - 0.05) > 1e-9:
            assert (q < 0.05) == (p < level)


def test_levels_of_a_table():
    found = statistics.false_discovery([1e-9, 1e-9, 0.3, None], alpha=0.06)
    levels = [level for _, level in found]
    assert levels == [pytest.approx(0.04), pytest.approx(0.04), 0.06, None]


def test_families_are_adjusted_by_themselves():
    p = [0.01, 1e-9, None, 0.04, 1e-9]
    families = ["one", "other", "one", "one", "other"]
    qs, levels = zip(*statistics.false_discovery(p, families), strict=True)
    assert list(qs) == pytest.approx([0.02, 1e-9, None, 0.04, 1e-9])
    assert list(levels) == pytest.approx([0.05, 0.05, None, 0.05, 0.05])


@pytest.mark.parametrize("base", [0, float("nan")])
def test_relative_change_of_nothing(base):
    assert comparison.relative_change(base, 1.0) is None


def test_correlation_with_a_constant():
    result = trends.correlate([1, 2, 3], [5, 5, 5])
    assert (result.n, result.pearson, result.pearson_low) == (3, None, None)


@given(st.integers(0, 10_000), st.integers(3, 12), st.floats(-1, 1))
def test_interval_and_p_of_a_correlation_agree(seed, n, slope):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    y = slope * x + rng.normal(size=n) / 2
    result = trends.correlate(x, y)
    outside = result.pearson_low > 0 or result.pearson_high < 0
    expected = stats.pearsonr(x, y)
    assert result.pearson == pytest.approx(expected.statistic)
    assert outside == (expected.pvalue < 0.05)
    assert result.pearson_low <= result.pearson <= result.pearson_high


@pytest.mark.parametrize("n", [4, 5, 7])
@pytest.mark.parametrize("truth", [0.0, 0.8])
def test_coverage_of_a_correlation(n, truth):
    rng = np.random.default_rng(n)
    covered = 0
    for _ in range(1000):
        x = rng.normal(size=n)
        y = truth * x + np.sqrt(1 - truth**2) * rng.normal(size=n)
        result = trends.correlate(x, y)
        covered += result.pearson_low <= truth <= result.pearson_high
    assert 0.93 <= covered / 1000 <= 0.97


RATIOS = [4, 3.6, 3.2, 2.8, 2.4, 2, 1.6]


def walk(rng, n, flips=0.03):
    """Return right-or-wrong documents, of which each size flips some of the last one's."""
    rows = [rng.random(n) < 0.5]
    while len(rows) < len(RATIOS):
        rows.append(rows[-1] ^ (rng.random(n) < flips))
    return np.array(rows, dtype=float)


def test_a_walk_of_nested_sizes_is_no_trend():
    found = kendall = 0
    for seed in range(400):
        rows = walk(np.random.default_rng(seed), 200)
        found += trends.trend(RATIOS, rows).p < 0.05
        kendall += stats.kendalltau(RATIOS, rows.mean(axis=1)).pvalue < 0.05
    assert found / 400 < 0.08
    assert kendall / 400 > 0.2


def test_trend():
    rng = np.random.default_rng(0)
    base = rng.normal(size=50)
    rows = [base + 0.1 * ratio + 0.01 * rng.normal(size=50) for ratio in RATIOS]
    result = trends.trend(RATIOS, rows)
    assert (result.n, result.units) == (7, 50)
    assert result.slope == pytest.approx(0.1, abs=0.005)
    assert result.low < result.slope < result.high
    assert result.p < 1e-9
    scores = np.mean(rows, axis=1)
    assert result.slope == pytest.approx(np.polyfit(RATIOS, scores, 1)[0])
    # Of perplexities the logarithm has a slope; it falls where log-likelihoods rise.
    upside_down = trends.trend(RATIOS, rows, transform="perplexity")
    assert upside_down.slope == pytest.approx(-result.slope)
    assert trends.trend(RATIOS, [base] * 7).p == 1


@pytest.mark.slow
def test_the_benchmark_of_coverage_runs():
    file = checkpoints.ROOT / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_benchmark", file)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for name, data, draw, units in benchmark.CASES:
        cells = benchmark.line(draw, units[0], 2)
        assert len(cells) == 5, (name, data)
    assert len(benchmark.correlations(2)) == 10
    assert all(float(row[2]) > 0.925 for row in benchmark.one_way())
    assert len(benchmark.restated(2)) == 3
    (_, nulls, wrong, any_wrong), (_, few, *alone) = benchmark.families(400)
    # 54 certainties leave room for two wrong discoveries; a family of one question does not.
    assert (nulls, few) == (162, 36)
    assert float(wrong) > 1.8
    assert float(any_wrong) > 0.8
    assert max(map(float, alone)) < 0.08


@given(
    st.integers(0, 30),
    st.integers(0, 30),
    st.integers(0, 60),
    st.floats(0.005, 0.3),
    st.floats(0.01, 0.4),
)
def test_p_outside_is_where_the_interval_leaves_the_margin(up, down, same, margin, a):
    if up + down + same == 0:
        return
    test = paired(up, down, same)
    p = test.p_outside(-margin, margin)
    low, high = test.interval(2 * a)
    if min(abs(low + margin), abs(high - margin)) < 1e-6:
        return
    inside = -margin < low and high < margin and abs(test.difference) < margin
    assert (p < a) == inside


@pytest.mark.parametrize("transform", ["mean", "perplexity", "bits_per_byte"])
@pytest.mark.parametrize("seed", range(4))
def test_p_outside_and_intervals_of_means_agree(seed, transform):
    rng = np.random.default_rng(seed)
    base = rng.normal(-3, 0.4, size=50)
    run = base + rng.normal(0.01, 0.1, size=50)
    test = statistics.paired_difference(base, run, transform=transform, alpha=0.1)
    low, high = test.interval(0.1)
    assert (low, high) == pytest.approx((test.low, test.high), rel=1e-6)
    # At its own ends the interval is just inside.
    assert test.p_outside(low, math.inf) == pytest.approx(0.05, abs=1e-6)
    assert test.p_outside(-math.inf, high) == pytest.approx(0.05, abs=1e-6)
    wide = test.p_outside(low - 0.1, high + 0.1)
    assert wide < test.p_outside(low - 0.01, high + 0.01) < 0.05


def test_two_one_sided_tests_are_those_of_the_textbook():
    rng = np.random.default_rng(3)
    gains = rng.normal(0.02, 0.2, size=40)
    test = statistics.paired_difference(np.zeros(40), gains)
    lower = stats.ttest_1samp(gains, -0.1, alternative="greater").pvalue
    upper = stats.ttest_1samp(gains, 0.1, alternative="less").pvalue
    assert test.p_outside(-0.1, 0.1) == pytest.approx(max(lower, upper))
    assert test.p_outside(-0.1, math.inf) == pytest.approx(lower)


def test_documents_without_any_change_bound_the_share_of_those_that_do():
    scores = np.linspace(0.1, 0.9, 200)
    same = statistics.paired_difference(scores, scores)
    assert same.p_outside(-0.02, 0.02) < 0.05 < same.p_outside(-0.005, 0.005)
    # Without bounds on a score nothing follows from that.
    assert statistics.paired_difference(scores + 5, scores + 5).p_outside(-1, 1) is None


def test_a_difference_outside_of_the_margin_is_never_within_it():
    test = paired(40, 0, 60)
    assert test.p_outside(-0.1, 0.1) >= 0.5


@pytest.mark.parametrize(
    ("n", "margin", "up", "down"),
    [(60, 0.05, 0.06, 0.01), (40, 0.1, 0.12, 0.02), (60, 0.1, 0.1, 0)],
)
def test_level_of_equivalence_counted_out(n, margin, up, down):
    """At a true difference of the margin, equivalence is claimed in about 5 % of cases at most."""
    wrongly = sum(
        chance
        for ups, downs, chance in every_outcome(n, up, down)
        if paired_p_outside(ups, downs, n - ups - downs, margin) < 0.05
    )
    assert 0.01 < wrongly < 0.054


@functools.cache
def paired_p_outside(up: int, down: int, same: int, margin: float) -> float:
    return paired(up, down, same).p_outside(-margin, margin)
