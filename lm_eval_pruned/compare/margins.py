"""Margins: how far two scores may be apart and still count as the same, and what is shown of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import argparse


#: What may be claimed with a margin, by the option that asks for it.
CLAIMS = ("equivalent", "not_worse")


@dataclass(frozen=True)
class Margin:
    """How far a score may be away from that of the base.

    Attributes:
        claim: ``equivalent``, neither better nor worse by the margin, or ``not_worse``.
        text: The margin as the user wrote it: ``1pt``, a percentage point of a score
            between 0 and 1; ``2%``, a share of the base's score; or ``0.5``, in the
            metric's own unit.

    Example:
        >>> Margin("equivalent", "1pt").size(0.4, 0.41)
        0.01
        >>> Margin("not_worse", "2%").size(20.0, 21.0)
        0.4
        >>> print(Margin("equivalent", "1pt").size(20.0, 21.0))
        None
    """

    claim: str
    text: str

    def __post_init__(self) -> None:
        if self.claim not in CLAIMS:
            raise ValueError(f"{self.claim} is none of {', '.join(CLAIMS)}.")
        if not self._parsed or not 0 < float(self._parsed[1]) < math.inf:
            raise ValueError(
                f"{self.claim}={self.text} is no margin: give percentage points such as 1pt, a "
                "share of the base's score such as 2%, or a positive number in the metric's own "
                "unit."
            )

    @property
    def _parsed(self) -> re.Match[str] | None:
        number = r"(\d+\.?\d*|\.\d+)"
        return re.fullmatch(rf"{number}\s*(pts?|%|)", str(self.text).strip())

    def size(self, base: float, score: float) -> float | None:
        """Return the margin in the metric's own unit.

        Args:
            base: Score of the base.
            score: Score of the run.

        Returns:
            None for percentage points of scores that are not between 0 and 1, and for a
            share of 0.
        """
        assert self._parsed is not None
        number, unit = float(self._parsed[1]), self._parsed[2]
        if unit == "%":
            return number / 100 * abs(base) or None
        if not unit:
            return number
        return number / 100 if 0 <= base <= 1 and 0 <= score <= 1 else None

    def bounds(
        self, base: float, score: float, higher_is_better: bool | None
    ) -> tuple[float, float] | None:
        """Return between what the true difference has to lie, or None where that is not known.

        Which side may be open follows from `higher_is_better`; where that is None, neither.
        """
        size = self.size(base, score)
        if size is None:
            return None
        if self.claim == "equivalent" or higher_is_better is None:
            return -size, size
        return (-size, math.inf) if higher_is_better else (-math.inf, size)

    @property
    def verdict(self) -> str:
        """What is claimed, in words."""
        return self.claim.replace("_", " ")


@dataclass(frozen=True)
class Claim:
    """Whether a difference is shown to lie within a margin.

    Attributes:
        margin: The margin in the metric's own unit.
        low: Lower end of the interval that decides: it lies within the margin exactly
            where the claim is shown. None where the margin does not bound this side.
        high: Upper end.
        p: p of "the true difference lies outside of the margin".
        q: p, adjusted as the q of differences is.
    """

    margin: float
    low: float | None
    high: float | None
    p: float
    q: float


def add_margins(parser: argparse.ArgumentParser, also: str = "") -> None:
    """Declare the options that ask for a claim, and say `also` of both."""
    for claim, what in (
        ("equivalent", "neither better nor worse by it"),
        ("not_worse", "not worse by it"),
    ):
        parser.add_argument(
            f"--{claim}",
            metavar="MARGIN",
            help=f"ask whether scores are shown to be {what}: 1pt (a percentage point), 2%% (of "
            f"the base's score), or a number in the metric's own unit{also}",
        )


def margin_of(arguments: argparse.Namespace) -> Margin | None:
    """Return the margin that was asked for on the command line, if any.

    Raises:
        ValueError: It is none, or two were given.
    """
    given = {
        claim: text
        for claim in CLAIMS
        if (text := getattr(arguments, claim)) is not None
    }
    if len(given) > 1:
        raise ValueError(
            "--equivalent and --not_worse were given together: pass one, because each decides "
            "the verdict."
        )
    return next((Margin(*each) for each in given.items()), None)
