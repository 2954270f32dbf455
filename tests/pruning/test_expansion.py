"""From what the user asked for to a kept width: exact, and refused with one sentence."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import assume, example, given, strategies as st

from lm_eval_pruned import PrunePlan
from lm_eval_pruned.pruning.argument_values import written_layers


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


def test_the_study_s_ratio_of_a_model_of_width_2560():
    assert PrunePlan.from_arguments(2560, 10240, ratio=3.6).width == 9216


@given(hidden_sizes, widths)
def test_the_own_ratio_is_the_identity(hidden_size, width):
    own = as_written(Fraction(width, hidden_size))
    plan = PrunePlan.from_arguments(hidden_size, width, ratio=own)
    assert plan.width == width
    assert not plan.prunes
    assert plan.ratio == width / hidden_size


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
        ({"prune_percent": 100.5}, ["prune_percent=100.5", "[0, 100)"]),
        ({"prune_percent": 250}, ["prune_percent=250", "[0, 100)"]),
        ({"prune_percent": -1}, ["prune_percent=-1", "[0, 100)"]),
        ({"prune_percent": "nan"}, ["prune_percent=nan", "not a finite number"]),
        ({"intermediate_size": 0}, ["intermediate_size=0", "from 1 to 8192"]),
        ({"intermediate_size": 8193}, ["intermediate_size=8193", "from 1 to 8192"]),
        ({"intermediate_size": 12.5}, ["intermediate_size=12.5", "whole number"]),
        ({"ratio": 2, "multiple_of": 0}, ["multiple_of=0", "1 or more"]),
        (
            {"ratio": 2, "multiple_of": "x"},
            ["multiple_of=x is not a finite number: pass one such as multiple_of=1."],
        ),
        (
            {"ratio": 2, "seed": "x"},
            ["seed=x is not a finite number: pass one such as seed=1."],
        ),
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


@pytest.mark.parametrize(
    ("exponent", "message"),
    [("e999", "above the model's own"), ("e9999", "not a finite")],
)
def test_exponents_that_would_take_for_ever_are_not_computed(exponent, message):
    with pytest.raises(ValueError, match=message):
        PrunePlan.from_arguments(2048, 8192, ratio=f"1{exponent}")


def test_the_smallest_ratio_keeps_one_neuron():
    assert PrunePlan.from_arguments(2048, 8192, ratio="1e-999").width == 1
    with pytest.raises(ValueError, match="not a finite number"):
        PrunePlan.from_arguments(2048, 8192, ratio="1e-9999")


def test_every_size_up_to_the_own_one_is_accepted():
    for arguments, width in (
        ({"intermediate_size": 1}, 1),
        ({"intermediate_size": 88}, 88),
        ({"intermediate_size": "44.0"}, 44),
        ({"prune_percent": 0}, 88),
        ({"prune_percent": "99.999"}, 1),
        ({"ratio": "2.75"}, 88),
        ({"intermediate_size": 88, "multiple_of": 88}, 88),
    ):
        plan = PrunePlan.from_arguments(32, 88, **arguments)
        assert plan.width == width
        assert plan.prunes is (width < 88)


@given(widths, widths, st.data())
def test_other_mlps_are_narrowed_in_the_same_proportion(width, other, data):
    kept = data.draw(st.integers(1, width))
    plan = PrunePlan.from_arguments(64, width, intermediate_size=kept)
    share = plan.kept_of(other, other)
    # ceil(x) is the smallest whole number that is not below x.
    assert (share - 1) * width < other * kept <= share * width
    assert plan.kept_of(width, width) == kept


def test_other_mlps_are_rounded_down_where_that_leaves_something():
    plan = PrunePlan.from_arguments(64, 100, intermediate_size=50, multiple_of=16)
    assert plan.width == 48
    assert plan.kept_of(200, 200) == 96
    assert plan.kept_of(110, 110) == 48, "52.8 is 53, and then a multiple of 16"
    assert plan.kept_of(20, 20) == 10, "9.6 is 10, which is less than 16"


def test_a_share_is_a_share_of_every_layer_s_own_width():
    plan = PrunePlan.from_arguments(32, 88, prune_percent=50, multiple_of=4)
    assert [plan.kept_of(own, 88) for own in (88, 60, 9, 5)] == [44, 28, 4, 3]


@pytest.mark.parametrize("arguments", [{"ratio": 1}, {"intermediate_size": 32}])
def test_any_other_size_is_a_target(arguments):
    plan = PrunePlan.from_arguments(32, 88, **arguments)
    assert [plan.kept_of(own, 88) for own in (88, 33, 32, 20)] == [32, 32, 32, 20]


def layers_of(available=range(6), **arguments):
    return PrunePlan.from_arguments(
        32, 88, ratio=1, available_layers=list(available), **arguments
    ).layers


@pytest.mark.parametrize(
    ("written", "layers"),
    [
        ("2", (2,)),
        (3, (3,)),
        ("0-2", (0, 1, 2)),
        ("4-4", (4,)),
        ("5,0", (0, 5)),
        ("0+3-4", (0, 3, 4)),
        ("0;3  5", (0, 3, 5)),
        ("[0, 2-3]", (0, 2, 3)),
        ("(1)", (1,)),
        ([4, "0-1"], (0, 1, 4)),
        ("1,1-2,2", (1, 2)),
    ],
)
def test_layers_are_written_as_numbers_and_ranges(written, layers):
    assert layers_of(layers=written) == layers
    rest = tuple(sorted(set(range(6)) - set(layers)))
    assert layers_of(skip_layers=written) == rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "2-1"}, "layers=2-1 is no list of layers"),
        ({"layers": "0-100000"}, "layers=0-100000 is no list of layers"),
        ({"layers": "0-100001"}, "layers=0-100001 is no list of layers"),
        ({"layers": "0-999999"}, "layers=0-999999 is no list of layers"),
        ({"layers": "0-99999"}, "layers=0-99999 names layer 6.*in the layers 0-5"),
        ({"layers": "0000001"}, "is no list of layers"),
        ({"skip_layers": "x"}, "skip_layers=x is no list of layers"),
        ({"skip_layers": ""}, "skip_layers= is no list of layers"),
        ({"layers": -1}, "layers=-1 is no list of layers"),
        ({"layers": "0,7,6"}, "names layer 6"),
        ({"skip_layers": "0-5"}, "skip_layers=0-5 leaves no layer to prune.*of 0-5"),
        ({"layers": 0, "skip_layers": 1}, "layers=0 and skip_layers=1.*pass one"),
    ],
)
def test_layers_that_cannot_be_pruned_get_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        layers_of(**arguments)


def test_layers_need_a_model_and_a_size():
    with pytest.raises(ValueError, match="layers=0 needs a model"):
        PrunePlan.from_arguments(32, 88, ratio=1, layers=0)
    for name in ("layers", "skip_layers"):
        with pytest.raises(ValueError, match=f"^{name} says .* no size was asked for"):
            PrunePlan.from_arguments(32, 88, available_layers=[0, 1], **{name: 0})


def test_a_plan_knows_its_layers():
    plan = PrunePlan.from_arguments(32, 88, ratio=1)
    assert plan.layers is None
    assert plan.includes_layer(7)
    plan = PrunePlan.from_arguments(
        32, 88, ratio=1, layers="0,2", available_layers=[0, 1, 2]
    )
    assert [plan.includes_layer(layer) for layer in range(4)] == [
        True,
        False,
        True,
        False,
    ]


@given(st.sets(st.integers(0, 40), min_size=1))
def test_written_layers_can_be_read_again(layers):
    written = written_layers(layers)
    assert layers_of(range(41), layers=written) == tuple(sorted(layers))
    # Two runs never touch, so no shorter text exists.
    ends = [part.split("-") for part in written.split(",")]
    assert all(int(a[-1]) + 1 < int(b[0]) for a, b in itertools.pairwise(ends))


def test_seeds_are_kept_with_and_without_a_size():
    assert PrunePlan.from_arguments(32, 88).seed == 0
    assert PrunePlan.from_arguments(32, 88, seed="7").seed == 7
    assert PrunePlan.from_arguments(32, 88, ratio=1, seed=7).seed == 7
    largest = str(2**43 - 1)
    assert PrunePlan.from_arguments(32, 88, seed=largest).seed == 2**43 - 1
    with pytest.raises(ValueError, match="seed=8796093022208 is too large"):
        PrunePlan.from_arguments(32, 88, seed=2**43)
    assert PrunePlan.from_arguments(32, 88).multiple_of == 1
    with pytest.raises(ValueError, match=r"seed=-1 .* of 0 or more: .* seed=1\."):
        PrunePlan.from_arguments(32, 88, seed=-1)


def test_calibration_belongs_to_criteria_that_look_at_activations():
    def plan(**arguments):
        return PrunePlan.from_arguments(32, 88, ratio=1, **arguments).arguments

    assert (plan().calibration, plan().calibration_samples) == (None, None)
    whole = plan(criterion="act", calibration="a.jsonl")
    assert (whole.calibration, whole.calibration_samples) == ("a.jsonl", None)
    some = plan(criterion="maw_act", calibration="a.jsonl", calibration_samples="3")
    assert (some.calibration, some.calibration_samples) == ("a.jsonl", 3)
    for arguments, message in (
        ({"calibration": "a"}, "calibration=a was given, but criterion=maw looks"),
        (
            {"calibration_samples": 1},
            "calibration_samples=1 was given, but criterion=maw",
        ),
        ({"criterion": "act"}, "criterion=act looks at activations, so it needs text"),
        (
            {"criterion": "act", "calibration": "a", "calibration_samples": 0},
            "calibration_samples=0 is not a whole number of 1 or more",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            plan(**arguments)
