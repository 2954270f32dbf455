"""From what the user asked for to a kept width: exact. What is refused is in `test_refusals`."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import example, given, strategies as st

from lm_eval_pruned import PrunePlan
from lm_eval_pruned.pruning.argument_values import read_widths, written_layers


hidden_sizes = st.integers(1, 20_000)
widths = st.integers(1, 100_000)
percents = st.decimals(min_value="0", max_value="99.999999", places=6).map(str)


def as_written(value: Fraction) -> str:
    """Return `value` in the rational notation that the arguments accept."""
    return f"{value.numerator}/{value.denominator}"


@given(hidden_sizes, widths, percents)
@example(2048, 8192, "40")
def test_the_kept_width_of_a_percentage_is_exact(hidden_size, width, percent):
    plan = PrunePlan.from_arguments(hidden_size, width, prune_percent=percent)
    removed = width - plan.width
    # floor(x) is the largest whole number that is not above x.
    assert removed * 100 <= Fraction(percent) * width < (removed + 1) * 100


@given(hidden_sizes, widths, st.data())
def test_the_kept_width_of_a_ratio_is_exact(hidden_size, width, data):
    own = Fraction(width, hidden_size)
    ratio = data.draw(st.just(own) | st.fractions(own / 100_000, own))
    plan = PrunePlan.from_arguments(hidden_size, width, ratio=as_written(ratio))
    assert plan.width - 1 < ratio * hidden_size <= plan.width
    assert plan.asked == {"ratio": as_written(ratio)}
    assert plan.ratio == plan.width / hidden_size
    assert plan.prunes is (plan.width < width)


@given(widths, st.data())
def test_multiple_of_rounds_down(width, data):
    asked = data.draw(st.integers(1, width))
    multiple = data.draw(st.integers(1, asked))
    given = {"intermediate_size": asked, "multiple_of": multiple}
    plan = PrunePlan.from_arguments(64, width, **given)
    assert plan.width % multiple == 0
    assert asked - multiple < plan.width <= asked


@pytest.mark.parametrize(
    ("hidden_size", "width", "asked", "kept"),
    [
        # In binary floating point, 2.2 * 200 is above 440.
        (200, 10_000, {"ratio": 2.2}, 440),
        (200, 10_000, {"ratio": "1.1"}, 220),
        (2560, 10_240, {"ratio": 3.6}, 9216),
        # The largest ratio that a message offers.
        (576, 1536, {"ratio": "2.6666"}, 1536),
        (2048, 8192, {"ratio": "1e-999"}, 1),
        (32, 88, {"intermediate_size": "44.0"}, 44),
        (32, 88, {"prune_percent": "99.999"}, 1),
        (32, 88, {"intermediate_size": 88, "multiple_of": 88}, 88),
        (32, 88, {}, 88),
    ],
)
def test_widths(hidden_size, width, asked, kept):
    assert PrunePlan.from_arguments(hidden_size, width, **asked).width == kept


@given(widths, widths, st.data())
def test_other_mlps_are_narrowed_in_the_same_proportion(width, other, data):
    kept = data.draw(st.integers(1, width))
    plan = PrunePlan.from_arguments(64, width, intermediate_size=kept)
    share = plan.kept_of(other, other)
    # ceil(x) is the smallest whole number that is not below x.
    assert (share - 1) * width < other * kept <= share * width
    assert plan.kept_of(width, width) == kept


@pytest.mark.parametrize(
    ("asked", "own", "kept"),
    [
        # A share is a share of every layer's own width; any other size is a target.
        ({"prune_percent": 50, "multiple_of": 4}, (88, 60, 9, 5), [44, 28, 4, 3]),
        ({"ratio": 1}, (88, 33, 32, 20), [32, 32, 32, 20]),
        ({"intermediate_size": 32}, (88, 33, 32, 20), [32, 32, 32, 20]),
    ],
)
def test_layers_of_other_widths(asked, own, kept):
    plan = PrunePlan.from_arguments(32, 88, **asked)
    assert [plan.kept_of(each, 88) for each in own] == kept


def test_other_mlps_are_rounded_down_where_that_leaves_something():
    plan = PrunePlan.from_arguments(64, 100, intermediate_size=50, multiple_of=16)
    # 52.8 is 53, and then a multiple of 16; 9.6 is 10, which is less than 16.
    assert [plan.kept_of(n, n) for n in (200, 110, 20)] == [96, 48, 10]


def layers_of(available, **arguments):
    given = {"ratio": 1, "available_layers": available, **arguments}
    return PrunePlan.from_arguments(32, 88, **given).layers


@pytest.mark.parametrize(
    ("written", "layers"),
    [
        *((each, (2,)) for each in ("2", 2, "2-2", "[2]", "(2)")),
        *((each, (0, 5)) for each in ("0,5", "5+0", " 0;5 ", "0  5", "0,,5", [5, 0])),
        *((each, (0, 3, 4)) for each in ("0,3-4", "[0, 3-4]", [4, "0", "3-4", 3])),
    ],
)
def test_layers_are_written_as_numbers_and_ranges(written, layers):
    assert layers_of(range(6), layers=written) == layers
    rest = tuple(sorted({*range(6)} - {*layers}))
    assert layers_of(range(6), skip_layers=written) == rest


@given(st.sets(st.integers(0, 40), min_size=1))
def test_written_layers_can_be_read_again(layers):
    written = written_layers(layers)
    assert layers_of(range(41), layers=written) == tuple(sorted(layers))
    # Two runs never touch, so no shorter text exists.
    ends = [part.split("-") for part in written.split(",")]
    assert all(int(a[-1]) + 1 < int(b[0]) for a, b in itertools.pairwise(ends))


# Widths by layer.

KEPT = {0: 20, 2: 7}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"0": 20, "2": 7}'),
        ("a.json", '\ufeff {"2": "7", " 0 ": 20}'),
        ("a.json", "[20, null, 7]"),
        ("a.csv", "layer,width\n0,20\n2,7\n"),
        ("a.csv", "loss, width, layer\r\n0.5, 7, 2\r\n\r\n1, 20, 0\r\n"),
        ("no-suffix", "layer,width\n2,7\n0,20"),
    ],
)
def test_forms_of_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_widths(str(tmp_path / name)) == read_widths(tmp_path / name) == KEPT


@pytest.mark.parametrize("given", [KEPT, [20, None, 7], {"0": 20, "2": 7}])
def test_from_python_what_a_file_holds(given):
    assert read_widths(given) == KEPT


@pytest.mark.parametrize(
    ("text", "word"),
    [
        *((text, "it names no layer") for text in ("", "{}", "[null]")),
        ('{"0": 20', "Expecting"),
        ('{"block_configs": [{}]}', "'block_configs'"),
        ('{"0": 2.5}', "'2.5'"),
        ('{"0": true}', "'True'"),
        ("layer,size\n0,1\n", "'width'"),
        ("layer,width\n1,\n", "''"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(tmp_path, text, word):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^widths=a\.json .*{word}.*\.$"):
        read_widths(str(tmp_path / "a.json"))


def test_a_plan_of_widths_keeps_the_layers_that_are_not_named():
    given = {"available_layers": range(4), "widths": KEPT}
    plan = PrunePlan.from_arguments(16, 48, **given)
    assert plan.layer_widths == ((0, 20), (1, 48), (2, 7), (3, 48))
    assert plan.asked == {"widths": "0:20,2:7"}
    assert (plan.width, plan.mean_width) == (31, Fraction(123, 4))
    plan = PrunePlan.from_arguments(16, 48, **given, multiple_of=5)
    assert plan.layer_widths == ((0, 20), (1, 48), (2, 5), (3, 48))
    same = PrunePlan.from_arguments(16, 48, available_layers=[0], widths={0: 48})
    assert not same.prunes
