"""What can be said of a claim, in one table of words, and the answer that several claims give."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from collections.abc import Iterable

#: What a study says of a score over sizes.
FALLS, KEEPS, RISES, UNKNOWN = "falls", "keeps", "rises", "cannot tell"


class Word(NamedTuple):
    """What can be said of a score: how a report marks it, what a study calls it, what `check` makes of it.

    `status` is that of a gate, which GitHub Actions gets as an `annotation`; its `summary` counts them.
    """

    mark: str
    state: str
    status: str
    annotation: str
    summary: str


_PASS, _FAIL = ("pass", "", "as expected"), ("fail", "error", "failed")
_OPEN = ("undecided", "error", "undecided")
#: The base is not shown to be above the floor.
NO_LOSS = "cannot show a loss"
#: Everything that is said of a score, in the order in which a report lists it.
WORDS = {
    "better": Word("\u25b2", RISES, "improved", "notice", "improved"),
    "worse": Word("\u25bc", FALLS, *_FAIL),
    "different": Word("\u25c6", UNKNOWN, *_FAIL),
    "equivalent": Word("=", KEEPS, *_PASS),
    "not worse": Word("", UNKNOWN, *_PASS),
    "not shown": Word("\u25cb", UNKNOWN, *_PASS),
    "undecided": Word("\u25cb", UNKNOWN, *_OPEN),
    "not tested": Word("\u00d7", UNKNOWN, *_OPEN),
    "not comparable": Word("\u00d7", UNKNOWN, *_FAIL),
    NO_LOSS: Word("", UNKNOWN, "blind", "notice", NO_LOSS),
    "not judged": Word("", UNKNOWN, *_PASS),
    "restated": Word("", UNKNOWN, *_PASS),
    "missing": Word("", UNKNOWN, *_FAIL),
    "asked otherwise": Word("", UNKNOWN, "refused", "error", "asked otherwise"),
    "new": Word("", UNKNOWN, "new", "notice", "not in the baseline"),
}
#: A claim of which this is said is shown; one of which that is said is refuted.
SHOWN, REFUTED = (
    ("equivalent", "not worse", "better"),
    ("worse", "different", "not comparable"),
)


def word_of(
    up: bool | None,
    *,
    claimed: str = "",
    shown: bool = False,
    within: bool = False,
    worse: bool = False,
    better: bool = False,
    tested: bool = True,
) -> str:
    """Return the word for what tests show of a score.

    `up` says whether more is better, None if neither way is. `claimed` is what is claimed, and `shown`
    whether that is; `within` whether the difference is shown to lie within the margin on both sides.
    `worse` and `better` are differences that are shown.
    """
    if within:
        return "equivalent"
    if better and up is not None:
        return "better"
    if shown:
        return claimed
    if worse:
        return "different" if up is None else "worse"
    if claimed:
        return "undecided"
    return "not shown" if tested else "not tested"


SHIP, DO_NOT_SHIP, NOT_DECIDED = "ship", "do not ship", "not decided"
#: Exit codes of `verdict` and `check`. 2 is for input that cannot be used, 70 for an error of ours.
CODES = {SHIP: 0, DO_NOT_SHIP: 1, NOT_DECIDED: 3}


def answer(words: Iterable[tuple[str, bool]]) -> str:
    """Say whether a candidate may be shipped, from the word of each claim and whether shipping takes it.

    Shipping takes a claim unless another one stands for it, or its base is not above the floor.
    """
    claims = [*words]
    if any(word in REFUTED for word, _ in claims):
        return DO_NOT_SHIP
    taken = [word for word, is_taken in claims if is_taken]
    if taken and all(word in SHOWN for word in taken):
        return SHIP
    return NOT_DECIDED
