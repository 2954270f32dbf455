"""From what the user asked for to kept widths, exactly. `test_refusals` has what is refused."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import example, given, strategies as st

from lm_eval_pruned import PrunePlan
from lm_eval_pruned.pruning.argument_values import read_widths, written_layers
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.plan import whole_or_mean


plan_of = PrunePlan.from_arguments


def plan_of_layers(hidden_size, width, present, **arguments) -> PrunePlan:
    """Return the plan for a model whose layers are known and equally wide."""
    before = dict.fromkeys(present, width)
    return PrunePlan.of(PruneArguments(**arguments), hidden_size, width, before)


widths = st.integers(1, 100_000)
percents = st.decimals(min_value="0", max_value="99.999999", places=6).map(str)


@given(st.integers(1, 20_000), widths, percents)
@example(2048, 8192, "40")
def test_the_kept_width_of_a_percentage_is_exact(hidden_size, width, percent):
    removed = width - plan_of(hidden_size, width, prune_percent=percent).width
    # floor(x) is the largest whole number that is not above x.
    assert removed * 100 <= Fraction(percent) * width < (removed + 1) * 100


@given(st.integers(1, 20_000), widths, widths, st.data())
def test_the_kept_width_of_a_ratio_is_exact(hidden_size, width, other, data):
    own = Fraction(width, hidden_size)
    ratio = data.draw(st.just(own) | st.fractions(own / 100_000, own))
    plan = plan_of(hidden_size, width, ratio=str(ratio))
    assert plan.width - 1 < ratio * hidden_size <= plan.width
    assert (plan.asked, plan.ratio) == ({"ratio": str(ratio)}, plan.width / hidden_size)
    assert plan.prunes is (plan.width < width)
    # MLPs of another width are narrowed in the same proportion, rounded up.
    share = plan.kept_of(other, other)
    assert (share - 1) * width < other * plan.width <= share * width
    multiple = data.draw(st.integers(1, plan.width))
    rounded = plan_of(hidden_size, width, ratio=str(ratio), multiple_of=multiple).width
    assert rounded % multiple == 0
    assert plan.width - multiple < rounded <= plan.width


@pytest.mark.parametrize(
    ("hidden_size", "asked", "own", "kept"),
    [
        # In binary floating point, 2.2 * 200 is above 440.
        (200, {"ratio": 2.2}, [10_000], [440]),
        (2560, {"ratio": 3.6}, [10_240], [9216]),
        # The largest ratio that a message offers.
        (576, {"ratio": "2.6666"}, [1536], [1536]),
        (2048, {"ratio": "1e-999"}, [8192], [1]),
        (32, {"intermediate_size": "44.0"}, [88], [44]),
        (32, {}, [88], [88]),
        # A share is a share of every layer's width; any other size is a target.
        (32, {"prune_percent": 50, "multiple_of": 4}, [88, 60, 9, 5], [44, 28, 4, 3]),
        (32, {"ratio": 1}, [88, 33, 32, 20], [32, 32, 32, 20]),
        (32, {"intermediate_size": 32}, [88, 33, 32, 20], [32, 32, 32, 20]),
    ],
)
def test_layers_of_several_widths(hidden_size, asked, own, kept):
    plan = plan_of(hidden_size, own[0], **asked)
    assert [plan.kept_of(each, own[0]) for each in own] == kept
    assert plan.width == kept[0]


def test_other_mlps_are_rounded_down_where_that_leaves_something():
    plan = plan_of(64, 100, intermediate_size=50, multiple_of=16)
    # 52.8 is 53, and then a multiple of 16; 9.6 is 10, which is less than 16.
    assert [plan.kept_of(n, n) for n in (200, 110, 20)] == [96, 48, 10]


def layers_of(available, **arguments):
    return plan_of_layers(32, 88, available, ratio=1, **arguments).layers


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


KEPT = {0: 20, 2: 7}


@pytest.mark.parametrize(
    "text",
    [
        '\ufeff {"2": "7", " 0 ": 20}',
        "[20, null, 7]",
        "layer,width\n2,7\n0,20",
        "loss, width, layer\r\n0.5, 7, 2\r\n\r\n1, 20, 0\r\n",
    ],
)
def test_forms_of_a_file_of_widths(tmp_path, text):
    (tmp_path / "a").write_text(text, encoding="utf-8")
    for source in (str(tmp_path / "a"), KEPT, [20, None, 7], {"0": 20, "2": 7}):
        assert read_widths(source) == KEPT


@pytest.mark.parametrize(
    ("text", "word"),
    [
        *((text, "it names no layer") for text in ("", "{}", "[null]")),
        ('{"0": 20, "1": 9, "0": 30}', "it names layer 0 twice"),
        ('{"0": null, "00": 30}', "it names layer 0 twice"),
        ("layer,width\n1,9\n0,9\n1,8\n", "it names layer 1 twice"),
        ('{"0": 20', "Expecting"),
        ('{"0": 2.5}', "'2.5'"),
        ("layer,size\n0,1\n", "'width'"),
        ("layer,width\n1,\n", "''"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_file_of_widths_that_cannot_be_read_is_named(tmp_path, text, word):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^widths=a\.json .*{word}"):
        read_widths(tmp_path / "a.json")


def test_a_plan_of_widths_keeps_the_layers_that_are_not_named():
    plan = plan_of_layers(16, 48, range(4), widths=KEPT)
    assert plan.layer_widths == ((0, 20), (1, 48), (2, 7), (3, 48))
    assert plan.asked == {"widths": "0:20,2:7"}
    assert (plan.width, plan.mean_width) == (31, Fraction(123, 4))
    plan = plan_of_layers(16, 48, range(4), widths=KEPT, multiple_of=5)
    assert plan.layer_widths == ((0, 20), (1, 48), (2, 5), (3, 48))
    assert not plan_of_layers(16, 48, [0], widths={0: 48}).prunes


def test_a_mean_width_is_written_with_four_digits_and_a_whole_one_with_none():
    assert whole_or_mean(Fraction(7000, 3)) == 2333.3333
    assert str(whole_or_mean(Fraction(6, 2))) == "3"
