"""Claims on two models, by what holds for all data and against independent formulas."""

from __future__ import annotations

import functools
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st
from scipy import stats

from lm_eval_pruned.compare.cases import guarded, mean_of, p_of_claim
from lm_eval_pruned.compare.claims import Kept, p_of, paired
from tests.helpers.cases import case_of, stderr_of


SHARE = 0.0, 1.0
real = st.floats(-50, 50, allow_subnormal=False).map(lambda value: round(value, 3))
rows = lambda values: st.lists(st.tuples(values, values), min_size=1, max_size=60)
#: Documents that are right or wrong, or have a score between 0 and 1, or any number.
documents = st.one_of(
    st.tuples(rows(st.sampled_from([0.0, 1.0])), st.just(SHARE)),
    st.tuples(rows(st.floats(0, 1)), st.just(SHARE)),
    st.tuples(rows(real), st.none()),
)
levels = st.sampled_from([0.3, 0.1, 0.05, 0.01, 0.001])
counts = st.integers(0, 40)
seeds = st.integers(0, 999)


@functools.cache
def right_or_wrong(up: int, down: int, same: int):
    """Test documents of which so many became right and wrong."""
    base, run = [0] * up + [1] * (down + same), [1] * up + [0] * down + [1] * same
    return paired(base, run, limits=SHARE)


def lifts(seed, *, kept=0.8, mean=5.0, n=160, noise=2.0):
    """Return scores of a base and a candidate, of which none has limits."""
    rng = np.random.default_rng(seed)
    base = rng.normal(mean, 4, n)
    return base, kept * base + rng.normal(0, noise, n)


def found(test):
    """Return all that is said of a test, None as NaN."""
    kept = test.kept()
    said = test.difference, test.p, *test.interval(), *(astuple(kept) if kept else ())
    return [np.nan if each is None else each for each in said]


@given(documents, st.floats(-1, 1))
def test_swapping_the_runs_mirrors_differences_and_p(drawn, x):
    pairs, limits = drawn
    base, run = zip(*pairs, strict=True)
    there, back = (paired(*p, limits=limits) for p in ((base, run), (run, base)))
    assert back.difference == -there.difference
    for side in (-1, 1):
        here, mirrored = there.p_beyond(x, side), back.p_beyond(-x, -side)
        assert (here is mirrored is None) or mirrored == pytest.approx(here, rel=1e-9)
    low, high = there.interval()
    if low is not None:
        assert back.interval() == pytest.approx((-high, -low), abs=1e-12)


@given(documents, st.randoms(use_true_random=False))
def test_the_order_of_documents_does_not_matter(drawn, random):
    pairs, limits = drawn
    numbered = [(*p, 1.0 + n % 3, f"cluster {n % 15}") for n, p in enumerate(pairs)]

    def test(rows):
        base, run, weights, names = zip(*rows, strict=True)
        about = {"clusters": names, "strata": [name[-1] for name in names]}
        return paired(base, run, weights=weights, limits=limits, **about)

    before = test(numbered)
    random.shuffle(numbered)
    after = test(numbered)
    assert (after.method, after.units) == (before.method, before.units)
    assert found(after) == pytest.approx(found(before), abs=1e-8, nan_ok=True)


@given(documents, levels, st.floats(-1, 1))
def test_the_interval_holds_each_difference_that_is_not_rejected(drawn, level, x):
    pairs, limits = drawn
    test = paired(*zip(*pairs, strict=True), limits=limits)
    low, high = test.interval(level)
    assume(low is not None)
    assert low <= test.difference <= high
    for value in (0.0, x, low - 1e-3, high + 1e-3):
        for side, beyond in ((1, value < low), (-1, value > high)):
            p = test.p_beyond(value, side)
            # At an end, rounding decides.
            if abs(p - level / 2) > 1e-6:
                assert (p < level / 2) == beyond
    if abs(test.p - level) > 1e-6:
        assert (test.p < level) == (low > 0 or high < 0)


@given(counts, counts, counts, st.floats(0.005, 0.5))
def test_right_or_wrong_documents_are_tested_exactly(up, down, same, margin):
    """By McNemar's exact test and, where all changes go one way, as Clopper and Pearson do."""
    assume(up + down + same)
    test = right_or_wrong(up, down, same)
    coin = stats.binom(up + down, 0.5)
    assert test.p_beyond(0, -1) == pytest.approx(coin.cdf(up))
    assert test.p_beyond(0, 1) == pytest.approx(coin.cdf(down))
    share = stats.binom(down + same, margin)
    losses = right_or_wrong(0, down, same) if down + same else None
    if losses:
        assert losses.p_margin(margin, None, 1) == pytest.approx(share.cdf(down))


@pytest.mark.parametrize(
    ("n", "up", "down"),
    [
        *[(30, 0.03, 0.03), (30, 0.15, 0.15), (30, 0.4, 0.1), (30, 0, 0.03)],
        *[(40, 0.02, 0.12), (45, 0.01, 0.45), (60, 0.06, 0.01), (64, 0, 0.2)],
    ],
)
def test_no_claim_on_right_or_wrong_documents_is_wrong_more_often_than_its_level(
    n, up, down
):
    """Counted out over everything that can happen, where the margin is the difference that is true."""
    chances, true = np.zeros(4), up - down
    for ups in range(n + 1):
        for downs in range(n + 1 - ups):
            seen = [ups, downs, n - ups - downs]
            chance = stats.multinomial.pmf(seen, n, [up, down, 1 - up - down])
            if chance > 1e-8:
                test = right_or_wrong(*seen)
                more, less = (test.p_beyond(true, side) for side in (1, -1))
                claims = more < 0.05, less < 0.05, more < 0.025, less < 0.025
                chances += chance * np.array(claims)
    assert chances.max() <= 0.05
    # What the interval of 95 % leaves out.
    assert chances[2] + chances[3] <= 0.05


@given(seeds, st.floats(0.01, 0.5), st.sampled_from([-1, 1]))
def test_to_keep_a_share_of_a_base_that_does_not_vary_is_to_differ_by_less(
    seed, margin, side
):
    rng = np.random.default_rng(seed)
    right = paired(np.ones(80), rng.integers(0, 2, 80), limits=SHARE)
    expected = p_of(right.differs(-margin, 1))
    assert p_of(right.keeps(1 - margin, 1)) == pytest.approx(expected)
    assert right.p_margin(margin, margin, 1) == pytest.approx(expected)
    free = paired(np.full(80, 4.0), rng.normal(3.8, 1, 80))
    expected = free.p_beyond(-4 * margin, side)
    assert p_of(free.keeps(1 - margin, side)) == pytest.approx(expected)


@given(seeds, st.sampled_from([SHARE, None]))
def test_a_cluster_is_one_document_with_the_mean_and_the_weight_of_its_own(
    seed, limits
):
    rng = np.random.default_rng(seed)
    sizes, scores = rng.integers(1, 6, 40), rng.uniform(0, 1, (3, 200))
    names = np.repeat(np.arange(40), sizes)
    weights = rng.uniform(1, 2, len(names))
    sums = [np.bincount(names, weights * row[: len(names)]) for row in scores]
    total = np.bincount(names, weights)
    one = paired(*(row / total for row in sums), weights=total, limits=limits)
    rows = scores[:, : len(names)]
    about = {"clusters": names.astype(str), "limits": limits}
    clustered = paired(*rows, weights=weights, **about)
    assert (clustered.units, len(clustered.base)) == (40, 40)
    assert clustered.method == "Gaffke's test over clusters"
    assert found(clustered)[:4] == pytest.approx(found(one)[:4])
    fourfold = np.repeat(np.arange(40), 4).astype(str)
    alone = paired(*scores[:, :40], limits=limits)
    equal = paired(*scores[:, :40].repeat(4, 1), clusters=fourfold, limits=limits)
    assert found(equal) == pytest.approx(found(alone), nan_ok=True)


@given(seeds, st.sampled_from([SHARE, None]))
def test_what_strata_differ_by_is_no_part_of_the_spread(seed, limits):
    rng = np.random.default_rng(seed)
    names, gains = np.repeat([*"ab"], 40), rng.uniform(-0.1, 0.1, 80)
    shift = np.repeat([0.3, -0.3], 40)
    about = {"limits": limits, "strata": names}
    apart = paired(np.full(80, 0.5), 0.5 + gains + shift, **about)
    together = paired(np.full(80, 0.5), 0.5 + gains, **about)
    assert apart.p == pytest.approx(together.p)
    wide = paired(np.full(80, 0.5), 0.5 + gains + shift, limits=limits)
    assert np.ptp(wide.interval()) > 1.5 * np.ptp(apart.interval())
    # A stratum of one document has no spread: then there are none.
    alone = paired(np.zeros(80), gains, limits=limits, strata=[*names[:-1], "c"])
    assert alone.p == paired(np.zeros(80), gains, limits=limits).p


@pytest.mark.parametrize("transform", ["mean", "perplexity"])
def test_the_test_of_means_becomes_the_paired_t_test(transform):
    base, run = np.random.default_rng(1).uniform(0.25, 0.75, size=(2, 20_000))
    test, expected = paired(base, run, transform=transform), stats.ttest_rel(run, base)
    low, high = expected.confidence_interval()
    assert stderr_of(paired(base, run)) == pytest.approx((high - low) / 3.92, rel=1e-3)
    if transform == "perplexity":
        before = np.exp(-base.mean())
        low, high = before * np.expm1(-high), before * np.expm1(-low)
    assert test.interval() == pytest.approx((low, high), abs=0.04 * (high - low))


def test_a_perplexity_is_tested_as_its_logarithm():
    rng = np.random.default_rng(0)
    words, base = rng.integers(5, 500, size=80), rng.normal(-3, 0.3, size=80)
    run = base + rng.normal(-0.1, 0.3, size=80)
    test = paired(base, run, transform="perplexity")
    logs = paired(base, run, transform="bits_per_byte")
    before = np.exp(-base.mean())
    ratios = np.array(test.interval()) / before + 1
    assert np.log2(ratios) == pytest.approx([*logs.interval()])
    rise = logs.p_beyond(np.log2(1.05), -1)
    assert test.p_margin(0.05 * before, 0.05, -1) == pytest.approx(rise)
    # Nothing lies below a perplexity of 0.
    assert (test.p_beyond(-2 * before, 1), test.kept()) == (0, None)
    weighted = paired(base, run, weights=words, transform="perplexity")
    one, other = (np.exp(-np.average(rows, weights=words)) for rows in (base, run))
    assert weighted.difference == pytest.approx(other - one)


@pytest.mark.parametrize("limits", [SHARE, None])
def test_a_rare_large_loss_of_the_size_of_the_margin_is_not_called_equal(limits):
    """Where 4 % of documents lose 0.5, a claim of less than 2 points is wrong."""
    for n in (20, 40, 100, 400):
        wrong = 0
        for seed in range(100):
            rng = np.random.default_rng([seed, n])
            lost = np.where(rng.random(n) < 0.04, 0.5, 0) + rng.normal(0, 1e-3, n)
            p = paired(np.full(n, 0.6), 0.6 - lost, limits=limits).p_margin(
                0.02, None, 1
            )
            wrong += p is not None and p < 0.05
        # More than 11 of 100 would be seen in 0.4 % of cases at a true 5 %.
        assert wrong <= 11, (n, wrong)


def test_a_margin_of_scores_without_limits_takes_60_documents_that_changed():
    base, noise = np.random.default_rng(0).normal(size=(2, 60))
    few, many = (paired(base[:n], base[:n] + 1e-3 * noise[:n]) for n in (59, 60))
    assert (few.units_missing, few.p_margin(0.1, None, 1)) == (1, None)
    assert few.p is not None and many.p_margin(0.1, None, 1) < 0.05


@pytest.mark.parametrize(
    ("base", "run", "limits", "p", "words"),
    [
        ([0.5], [0.7], SHARE, None, "1 documents are too few"),
        ([1e300] * 12 + [0.0], [0.0] + [1e300] * 12, None, None, "too large"),
        ([9.0] * 12, [4.0] * 12, None, None, "alike"),
        ([9.0] * 5, [9.0] * 5, None, 1, "none: all documents equal"),
        ([0.5] * 60, [0.5] * 60, SHARE, 1, "none: all documents equal"),
        ([0], [1], SHARE, 1, "McNemar"),
    ],
)
def test_what_cannot_be_tested_says_why(base, run, limits, p, words):
    test = paired(base, run, limits=limits)
    assert (test.p, test.p_margin(1, None, 1) is None) == (p, p is None)
    assert words in test.method and (test.interval()[0] is None) == (p is None)
    if "equal" in words:
        # So many documents without a change bound the share of those that do, where there are limits.
        end = 1 - 0.025 ** (1 / 60) if limits else 0
        assert test.interval() == pytest.approx((-end, end))


def fieller(base, run, level=0.05):
    """Return the interval of a share by the closed form of the quadratic equation."""
    n, t = len(base), stats.t.isf(level / 2, len(base) - 1)
    (bb, bc), (_, cc) = np.cov(base, run) * t**2 / n
    a, b = base.mean() ** 2 - bb, base.mean() * run.mean() - bc
    root = np.sqrt(b**2 - a * (run.mean() ** 2 - cc))
    return (b - root) / a, (b + root) / a


@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_kept_has_fiellers_interval_but_for_a_document_that_nobody_has_seen(
    sign,
):
    base, run = lifts(1, n=800)
    share, low, high = astuple(paired(sign * base, sign * run).kept())
    ends = fieller(base, run)
    assert low < ends[0] < ends[1] < high
    # One more document, among 800, that departs twice as far as the farthest.
    assert high - low < 1.15 * (ends[1] - ends[0])
    assert share == pytest.approx(run.sum() / base.sum())


@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_neither_unit_nor_origin_changes_what_is_kept(seed, unit, origin):
    base, run = lifts(seed)
    moved = paired(unit * base + origin, unit * run + origin, origin)
    expected = astuple(paired(base, run).kept())
    assert astuple(moved.kept()) == pytest.approx(expected, abs=1e-6)


def test_the_base_keeps_all_the_floor_nothing_and_a_base_at_its_floor_bounds_nothing():
    base, _ = lifts(3)
    floor = np.linspace(-1, 1, len(base))
    whole, nothing = paired(base, base, floor), paired(base, floor, floor)
    assert astuple(whole.kept()) == pytest.approx((1, 1, 1))
    assert astuple(nothing.kept()) == pytest.approx((0, 0, 0), abs=1e-9)
    assert paired([1.0, -1.0], [1.0, 0.0]).kept() is None
    assert paired(*lifts(4, mean=0.1)).kept().high is None
    assert paired([4.0, 6.0], [2.0, 3.0]).kept() == Kept(0.5, None, None)


def soft(seed, n, lost=0.0):
    """Return probabilities of two models on n documents."""
    rng = np.random.default_rng([seed, n])
    base = rng.uniform(0.3, 0.7, n)
    return base, base - lost + rng.uniform(-0.05, 0.05, n)


def tasks(*losses, n=200):
    return [
        case_of(*soft(seed, n, lost), task=f"t{seed}")
        for seed, lost in enumerate(losses)
    ]


def test_in_a_mean_tasks_weigh_alike_and_are_strata_and_a_document_counts_once():
    data = soft(0, 40, 0.06), soft(1, 400)
    cases = [case_of(*each, task=f"{n}") for n, each in enumerate(data)]
    mean, sizes = mean_of(cases).test, (40, 400)
    gains = [case.test.difference for case in cases]
    assert mean.difference == pytest.approx(np.mean(gains))
    about = {"weights": 1 / np.repeat(sizes, sizes)}
    about |= {"strata": np.repeat([*"ab"], sizes), "limits": SHARE}
    expected = paired(*np.concatenate(data, axis=1), **about)
    assert found(mean)[:4] == pytest.approx(found(expected)[:4])
    base, run = soft(0, 100)
    assert mean_of([case_of(base, run), case_of(base, run)]).test.units == 100
    blocks = [tuple(f"{t} {n // 4}" for n in range(100)) for t in range(2)]
    clustered = [case_of(base, run, task=b[0], clusters=b) for b in blocks]
    assert mean_of(clustered).test.units == 50


def test_a_claim_on_several_tasks_has_the_largest_p_of_its_mean_and_its_guards():
    case = tasks(0)[0]
    assert p_of_claim([case]) == case.test.p_margin(0.02, None, 1)
    assert guarded(case).p_outside() == case.test.p_margin(0.05, None, 1)
    assert p_of_claim(tasks(0, 0, 0)) < 0.05
    # Of the mean, 1 point is lost; of one task, 6.
    carried = tasks(0.06, 0, 0, 0, 0, 0)
    assert mean_of(carried).p_outside() < 0.05
    assert p_of_claim(carried) == guarded(carried[0]).p_outside() > 0.5
    # Of each task, 3 points are lost: the guards pass, and the mean does not.
    assert p_of_claim(tasks(0.03, 0.03, 0.03)) > 0.5


@pytest.mark.parametrize("losses", [(0.02,) * 3, (0.06, 0, 0)])
def test_at_the_margin_and_with_one_task_that_carries_all_the_claim_is_rarely_made(
    losses,
):
    """Losses of one document in ten, of which few are seen among 60."""
    wrong = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        cases = []
        for number, lost in enumerate(losses):
            base = rng.uniform(0.6, 1, 60)
            rare = np.where(rng.random(60) < 0.1, 10 * lost, 0)
            cases.append(case_of(base, base - rare, task=f"t{number}"))
        wrong += p_of_claim(cases) < 0.05
    # More than 11 of 100 would be seen in 0.4 % of cases at a true 5 %.
    assert wrong <= 11
