"""The one rule that says the answer, from the word of each claim."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from lm_eval_pruned.compare.answer import (
    CODES,
    DO_NOT_SHIP,
    NO_LOSS,
    NOT_DECIDED,
    REFUTED,
    SHIP,
    WORDS,
    answer,
)


claims = st.lists(st.tuples(st.sampled_from([*WORDS]), st.booleans()), max_size=6)


@pytest.mark.parametrize(
    ("taken", "others", "expected"),
    [
        # All that shipping takes is shown.
        ("equivalent", "", SHIP),
        ("equivalent, not worse, better", "", SHIP),
        # Of one that another stands for, or that shipping does not take, nothing need be shown.
        ("equivalent", "undecided, not judged", SHIP),
        ("not worse", NO_LOSS, SHIP),
        # One that is taken is open.
        ("equivalent, undecided", "", NOT_DECIDED),
        ("equivalent, not tested", "", NOT_DECIDED),
        ("equivalent, not shown", "", NOT_DECIDED),
        # Nothing is taken.
        ("", "", NOT_DECIDED),
        ("", NO_LOSS, NOT_DECIDED),
        ("", "equivalent", NOT_DECIDED),
        # One that is refuted beats all, whether it is taken or not.
        ("equivalent, worse", "", DO_NOT_SHIP),
        ("equivalent", "worse", DO_NOT_SHIP),
        ("equivalent, different", "", DO_NOT_SHIP),
        ("undecided", "not comparable", DO_NOT_SHIP),
        ("", "worse", DO_NOT_SHIP),
    ],
)
def test_the_answer(taken, others, expected):
    words = [
        (word, is_taken)
        for text, is_taken in ((taken, True), (others, False))
        for word in filter(None, text.split(", "))
    ]
    assert answer(words) == expected


@given(claims.filter(bool), st.data())
def test_a_claim_that_becomes_worse_never_makes_another_answer_ship(words, data):
    n = data.draw(st.integers(0, len(words) - 1))
    for word in REFUTED:
        lost = [*words[:n], (word, words[n][1]), *words[n + 1 :]]
        assert answer(lost) == DO_NOT_SHIP


@given(claims, st.randoms(use_true_random=False))
def test_the_order_of_claims_does_not_matter(words, random):
    turned = random.sample(words, len(words))
    assert answer(turned) == answer(iter(words))


def test_each_answer_has_its_exit_code():
    assert CODES == {SHIP: 0, DO_NOT_SHIP: 1, NOT_DECIDED: 3}
