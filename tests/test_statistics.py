from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from lm_eval_pruned import statistics


FAST = {"resamples": 199}
STUDY = Path(__file__).parent / "data" / "study_benchmarks.csv"

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
    ("model", "r", "p"),
    [("Llama-3.2-3B", -0.864, 0.012), ("Llama-3.2-1B", -0.676, 0.096)],
)
def test_correlation_of_the_study(model, r, p):
    result = statistics.correlate(
        study(model, "mmlu", "acc,none"), study(model, "truthfulqa_mc2", "acc,none")
    )
    assert result.n == 7
    assert round(result.pearson, 3) == r
    assert round(result.pearson_p, 3) == p
    assert result.pearson_low < r < result.pearson_high


@pytest.mark.parametrize(
    ("model", "position", "change"),
    [("Llama-3.2-1B", 3, "+75.0%"), ("Llama-3.2-3B", 4, "+74.4%")],
)
def test_relative_changes_of_the_study(model, position, change):
    scores = study(model, "ifeval", "prompt_level_strict_acc,none")
    assert f"{statistics.relative_change(scores[0], scores[position]):+.1%}" == change


@given(bits, st.randoms(use_true_random=False))
def test_mcnemar_does_not_see_the_order_of_documents(pairs, random):
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert statistics.paired_difference(*zip(*pairs, strict=True)) == (
        statistics.paired_difference(*zip(*shuffled, strict=True))
    )


@given(reals, st.randoms(use_true_random=False), st.booleans())
def test_bootstrap_does_not_see_the_order_of_documents(pairs, random, clustered):
    def test(rows):
        return statistics.paired_difference(
            [row[0] for row in rows],
            [row[1] for row in rows],
            weights=[row[2] for row in rows],
            clusters=[row[3] for row in rows] if clustered else None,
            **FAST,
        )

    rows = [(*pair, 1.0 + n % 3, f"cluster {n % 15}") for n, pair in enumerate(pairs)]
    before = test(rows)
    random.shuffle(rows)
    assert test(rows) == before


@given(st.one_of(bits, reals))
def test_swapping_the_runs_flips_the_sign(pairs):
    base, run = zip(*pairs, strict=True)
    there = statistics.paired_difference(base, run, **FAST)
    back = statistics.paired_difference(run, base, **FAST)
    assert back.difference == -there.difference
    assert (back.p, back.smallest_detectable) == (there.p, there.smallest_detectable)
    if there.low is None:
        assert back.low is None
    else:
        assert back.low == pytest.approx(-there.high, abs=1e-12)
        assert back.high == pytest.approx(-there.low, abs=1e-12)


@given(st.one_of(bits, reals))
def test_identical_runs_have_p_1(pairs):
    values = [pair[0] for pair in pairs]
    result = statistics.paired_difference(values, values, **FAST)
    assert (result.difference, result.p) == (0, 1)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 20))
def test_mcnemar_is_the_binomial_test_on_changed_documents(up, down, same):
    if up + down + same == 0:
        return
    result = statistics.paired_difference(
        [0] * up + [1] * down + [1] * same, [1] * up + [0] * down + [1] * same
    )
    expected = stats.binomtest(up, up + down).pvalue if up + down else 1.0
    assert result.p == pytest.approx(expected)
    assert result.low <= result.difference <= result.high


def test_interval_and_p_of_the_bootstrap_agree():
    rng = np.random.default_rng(5)
    for shift in np.linspace(0, 0.6, 25):
        base = rng.normal(size=40)
        run = base + rng.normal(shift, 1, size=40)
        result = statistics.paired_difference(base, run, resamples=999)
        if abs(result.p - 0.05) > 0.005:
            assert (result.p < 0.05) == (result.low > 0 or result.high < 0)


def simulate(draw, truth: float, times: int) -> tuple[float, float]:
    """Return the shares of intervals that hold the truth, and of p < 0.05."""
    covered = rejected = 0
    for seed in range(times):
        base, run, options = draw(np.random.default_rng(seed))
        result = statistics.paired_difference(base, run, resamples=499, **options)
        covered += result.low <= truth <= result.high
        rejected += result.p < 0.05
    return covered / times, rejected / times


def test_binary_coverage_and_false_positive_rate():
    def draw(rng, up=0.15, down=0.15):
        u = rng.random(150)
        return u < down, (u >= 1 - up), {}

    coverage, rejected = simulate(draw, 0, 1000)
    assert 0.94 <= coverage <= 0.975
    # The exact test is conservative: never above its level.
    assert 0.01 <= rejected <= 0.055


def test_binary_coverage_of_a_large_difference():
    def draw(rng):
        u = rng.random(100)
        return u < 0.45, u > 0.9, {}

    coverage, _ = simulate(draw, -0.35, 1000)
    assert 0.93 <= coverage <= 0.97


def test_bootstrap_coverage_and_false_positive_rate():
    def draw(rng):
        base = rng.gamma(2, size=80)
        return base, base + rng.normal(0, 0.7, size=80), {}

    coverage, rejected = simulate(draw, 0, 400)
    assert 0.925 <= coverage <= 0.97
    assert 0.025 <= rejected <= 0.075


@pytest.mark.parametrize("n", [10])
def test_the_bootstrap_keeps_its_level_with_few_documents(n):
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

    coverage, rejected = simulate(by_cluster, 0, 300)
    assert 0.91 <= coverage <= 0.975
    assert 0.02 <= rejected <= 0.09
    _, naive = simulate(by_document, 0, 50)
    assert naive > 0.3


def test_ratio_scores_are_resampled_whole():
    # A perplexity over words: long documents count more.
    rng = np.random.default_rng(0)
    words = rng.integers(5, 500, size=60).astype(float)
    base = rng.normal(-3, 0.2, size=60)
    run = base - 0.1
    result = statistics.paired_difference(
        base, run, weights=words, transform="perplexity"
    )
    expected = np.exp(-np.average(run, weights=words)) - np.exp(
        -np.average(base, weights=words)
    )
    assert result.difference == pytest.approx(expected)
    assert 0 < result.low < expected < result.high
    assert result.p < 0.001


def test_smallest_detectable_difference_is_found_with_the_stated_power():
    rng = np.random.default_rng(3)
    base = rng.normal(size=60)
    smallest = statistics.paired_difference(
        base, base + rng.normal(0, 1, size=60)
    ).smallest_detectable

    def draw(rng):
        base = rng.normal(size=60)
        return base, base + rng.normal(smallest, 1, size=60), {}

    _, power = simulate(draw, smallest, 300)
    assert 0.7 <= power <= 0.9


def test_few_changed_documents_cannot_be_significant():
    result = statistics.paired_difference([0] * 5 + [1] * 95, [1] * 100)
    assert result.p > 0.05
    assert result.smallest_detectable >= 0.06
    assert statistics.paired_difference([0] * 6 + [1] * 94, [1] * 100).p < 0.05


def test_one_document():
    result = statistics.paired_difference([0], [1])
    assert (result.difference, result.p, result.smallest_detectable) == (1, 1, None)
    result = statistics.paired_difference([0.5], [0.7])
    assert (result.low, result.p) == (None, None)
    assert "too few" in result.method


def test_all_ties():
    result = statistics.paired_difference([1, 0] * 30, [1, 0] * 30)
    assert result.p == 1
    # No change in 60 documents does not prove that there is none in the next ones.
    assert result.low < 0 < result.high
    result = statistics.paired_difference([0.25] * 60, [0.25] * 60)
    assert (result.difference, result.p) == (0, 1)


@pytest.mark.parametrize(
    ("base", "run", "words"),
    [
        ([0, float("nan")], [0, 1], "base has shape .* 1 values that are NaN"),
        ([0, 1], [0, float("inf")], "run has shape"),
        ([0, 1], [0], "2, 1 and 2 documents"),
        ([], [], "at least one"),
    ],
)
def test_unusable_arrays(base, run, words):
    with pytest.raises(ValueError, match=words):
        statistics.paired_difference(base, run)


def test_unpaired_test_says_that_it_is_weaker():
    result = statistics.unpaired_difference(0.5, 0.03, 0.6, 0.04)
    assert result.p == pytest.approx(2 * stats.norm.sf(2))
    assert "weaker" in result.method
    assert statistics.unpaired_difference(0.5, 0.0, 0.6, 0.0).p is None


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=30))
def test_false_discovery_rate_keeps_places(p_values):
    adjusted = statistics.false_discovery_rate(p_values)
    assert [q is None for q in adjusted] == [p is None for p in p_values]
    pairs = zip(p_values, adjusted, strict=True)
    assert all(q >= p or q == pytest.approx(p) for p, q in pairs if p is not None)


def test_false_discovery_rate_counts_only_tests_that_were_made():
    assert statistics.false_discovery_rate([0.01, None, 0.04]) == [0.02, None, 0.04]


@pytest.mark.parametrize("base", [0, float("nan")])
def test_relative_change_of_nothing(base):
    assert statistics.relative_change(base, 1.0) is None


def test_correlation_is_symmetric_and_blind_to_order():
    x, y = [1, 2, 3, 4, 5.5, 7, 6], [3, 1, 2, 5, 4, 6, 7]
    result = statistics.correlate(x, y, **FAST)
    reversed_ = statistics.correlate(x[::-1], y[::-1], **FAST)
    assert result == reversed_
    negative = statistics.correlate(x, [-v for v in y], **FAST)
    assert negative.pearson == pytest.approx(-result.pearson)
    assert negative.spearman_p == pytest.approx(result.spearman_p)


def test_spearman_p_is_exact_for_seven_configurations():
    result = statistics.correlate(range(7), range(7))
    assert result.spearman == pytest.approx(1)
    assert result.spearman_p == pytest.approx(2 / 5040)


def test_correlation_with_a_constant():
    result = statistics.correlate([1, 2, 3], [5, 5, 5])
    assert (result.n, result.pearson, result.pearson_p) == (3, None, None)


@pytest.mark.parametrize("function", [statistics.correlate, statistics.trend])
@pytest.mark.parametrize(
    ("x", "y"),
    [([1, 2], [1, 2]), ([1, 2, 3], [1, 2]), ([1, 2, float("nan")], [1, 2, 3])],
)
def test_too_little_for_a_correlation_or_trend(function, x, y):
    with pytest.raises(ValueError, match=r"at least 3|NaN"):
        function(x, y)


def test_trend():
    result = statistics.trend([4, 3.6, 3.2, 2.8, 2.4, 2, 1.6], [7, 6, 5, 4, 3, 2, 1])
    assert result.tau == pytest.approx(1)
    assert result.p == pytest.approx(2 / 5040)
    assert statistics.trend([4, 3, 2], [1, 1, 1]).tau is None
