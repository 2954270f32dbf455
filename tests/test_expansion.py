"""From what the user asked for to a kept width: exact, and refused with one sentence."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, example, given, strategies as st

from lm_eval_pruned import PrunePlan


hidden_sizes = st.integers(1, 20_000)
widths = st.integers(1, 100_000)
decimals = st.decimals(
    min_value="0",
    max_value="99.999999",
    allow_nan=False,
    allow_infinity=False,
    places=6,
)


def as_written(value: Fraction) -> str:
    """Return `value` in the rational notation that the arguments accept."""
    return f"{value.numerator}/{value.denominator}"


@given(hidden_sizes, widths, decimals)
@example(2048, 8192, "40")
def test_the_kept_width_of_a_percentage_is_exact(hidden_size, width, percent):
    plan = PrunePlan.from_arguments(hidden_size, width, prune_percent=str(percent))
    removed = width - plan.width
    # floor(x) is the largest whole number that is not above x.
    assert removed * 100 <= Fraction(str(percent)) * width < (removed + 1) * 100
    assert 1 <= plan.width <= width


@given(hidden_sizes, widths, st.fractions(min_value="1/100000", max_value=100))
def test_the_kept_width_of_a_ratio_is_exact(hidden_size, width, ratio):
    assume(ratio <= Fraction(width, hidden_size))
    plan = PrunePlan.from_arguments(hidden_size, width, ratio=as_written(ratio))
    assert plan.width - 1 < ratio * hidden_size <= plan.width
    assert plan.asked == {"ratio": as_written(ratio)}


@pytest.mark.parametrize(("ratio", "hidden_size"), [(2.2, 200), (1.1, 200)])
def test_ratios_are_exact_where_binary_floating_point_is_not(ratio, hidden_size):
    assert math.ceil(ratio * hidden_size) == round(ratio * hidden_size) + 1
    for written in (ratio, str(ratio)):
        plan = PrunePlan.from_arguments(hidden_size, 10_000, ratio=written)
        assert plan.width == round(ratio * hidden_size)


def test_percentages_are_exact_where_binary_floating_point_is_not():
    assert math.floor(17.5 / 100 * 2880) == 503
    assert PrunePlan.from_arguments(720, 2880, prune_percent=17.5).width == 2880 - 504


def test_the_study_s_ratio_of_a_model_of_width_2560():
    assert PrunePlan.from_arguments(2560, 10240, ratio=3.6).width == 9216


@given(hidden_sizes, widths)
def test_the_own_ratio_is_the_identity(hidden_size, width):
    own = as_written(Fraction(width, hidden_size))
    plan = PrunePlan.from_arguments(hidden_size, width, ratio=own)
    assert plan.width == width
    assert not plan.prunes
    assert plan.ratio == plan.ratio_before == width / hidden_size


@given(hidden_sizes, widths, st.data())
def test_widths_shrink_with_the_ratio(hidden_size, width, data):
    own = Fraction(width, hidden_size)
    ratios = st.fractions(min_value=own / 1000, max_value=own)
    low, high = sorted((data.draw(ratios), data.draw(ratios)))
    kept = [
        PrunePlan.from_arguments(hidden_size, width, ratio=as_written(ratio)).width
        for ratio in (low, high)
    ]
    assert kept[0] <= kept[1]


@given(widths, st.data())
def test_multiple_of_rounds_down(width, data):
    asked = data.draw(st.integers(1, width))
    multiple = data.draw(st.integers(1, asked))
    plan = PrunePlan.from_arguments(
        64, width, intermediate_size=asked, multiple_of=multiple
    )
    assert plan.width % multiple == 0
    assert asked - multiple < plan.width <= asked
    assert plan.multiple_of == multiple


def test_nothing_asked_is_the_baseline():
    plan = PrunePlan.from_arguments(2048, 8192)
    assert plan.width == 8192
    assert not plan.prunes
    assert plan.asked == {}
    assert plan.criterion == "maw"


def test_the_alias_of_a_criterion_is_resolved():
    plan = PrunePlan.from_arguments(8, 16, prune_percent=50, criterion="ppm")
    assert plan.criterion == "maw"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            {"ratio": 2, "prune_percent": 40},
            ["ratio=2", "prune_percent=40", "pass one"],
        ),
        ({"ratio": 2, "intermediate_size": 4}, ["ratio=2", "intermediate_size=4"]),
        ({"ratio": "wide"}, ["ratio=wide", "not a finite number", "ratio=2.0"]),
        ({"ratio": float("nan")}, ["ratio=nan", "not a finite number"]),
        ({"ratio": float("inf")}, ["ratio=inf", "not a finite number"]),
        ({"ratio": True}, ["ratio=True", "not a finite number"]),
        ({"ratio": "1e99999999"}, ["ratio=1e99999999", "not a finite number"]),
        ({"ratio": "1/0"}, ["ratio=1/0", "not a finite number"]),
        ({"ratio": ""}, ["ratio=", "not a finite number"]),
        ({"ratio": 0}, ["ratio=0", "keeps no neuron", "at most 4"]),
        ({"ratio": -1.5}, ["ratio=-1.5", "keeps no neuron"]),
        ({"ratio": 4.0001}, ["ratio=4.0001", "8192/2048", "at most 4,"]),
        ({"prune_percent": 100}, ["prune_percent=100", "[0, 100)"]),
        ({"prune_percent": -1}, ["prune_percent=-1", "[0, 100)"]),
        ({"prune_percent": "nan"}, ["prune_percent=nan", "not a finite number"]),
        ({"intermediate_size": 0}, ["intermediate_size=0", "from 1 to 8192"]),
        ({"intermediate_size": 8193}, ["intermediate_size=8193", "from 1 to 8192"]),
        ({"intermediate_size": 12.5}, ["intermediate_size=12.5", "whole number"]),
        ({"ratio": 2, "multiple_of": 0}, ["multiple_of=0", "1 or more"]),
        ({"ratio": 2, "multiple_of": 1.5}, ["multiple_of=1.5", "whole number"]),
        (
            {"intermediate_size": 100, "multiple_of": 128},
            ["multiple_of=128", "kept width 100", "at most 100"],
        ),
        ({"multiple_of": 64}, ["multiple_of=64", "none was asked for", "ratio"]),
        (
            {"ratio": 2, "criterion": "magic"},
            ["criterion=magic", "maw", "random", "ppm"],
        ),
        ({"ratio": 2, "seed": -1}, ["seed=-1", "0 or more"]),
    ],
)
def test_bad_input_gets_one_sentence(arguments, parts):
    with pytest.raises(ValueError) as error:
        PrunePlan.from_arguments(2048, 8192, **arguments)
    message = str(error.value)
    for part in parts:
        assert part in message
    assert "\n" not in message


def test_the_largest_ratio_that_a_message_offers_is_accepted():
    with pytest.raises(ValueError, match=r"at most 2\.6666"):
        PrunePlan.from_arguments(576, 1536, ratio=2.67)
    assert PrunePlan.from_arguments(576, 1536, ratio="2.6666").width == 1536
