"""What one test of a difference says, and what all tests share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np


if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike


Alternative = Literal["two-sided", "less", "greater"]
#: Chance of seeing a difference of the size of `PairedTest.smallest_detectable`.
POWER = 0.8
#: The mean of fewer documents or clusters than this is not taken for normal.
LEAST_UNITS = 10
ALTERNATIVES = ("two-sided", "less", "greater")


def _nothing(level: float) -> None:
    return None


@dataclass(frozen=True)
class PairedTest:
    """A difference between two runs, and what can be said about it.

    Attributes:
        difference: Score of the run minus score of the base.
        low: Lower end of the two-sided interval, or None where none can be given.
        high: Upper end.
        p: p of "there is no difference" against the alternative that was asked for, or
            None where no test was made.
        method: What was done, in words.
        units: Independent units: documents, or clusters of them; 0 where not known.
        level: Level that the test was asked to be made at.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None
    method: str
    units: int
    level: float = 0.05
    _detectable: Callable[[float], float | None] = field(
        default=_nothing, compare=False, repr=False
    )

    def smallest_detectable(self, level: float | None = None) -> float | None:
        """Return the size of true difference that this test finds with chance `POWER`.

        Args:
            level: Level at which p counts as significant; default: the test's own. In a
                table it is what the correction leaves, see `false_discovery_levels`.

        Returns:
            A positive number, or None where this test can find no difference.
        """
        return self._detectable(self.level if level is None else level)


def p_of_tails(lower: float, upper: float, alternative: str) -> float:
    """Return the p of an alternative from the chances of the two tails."""
    if alternative == "less":
        return lower
    if alternative == "greater":
        return upper
    return min(1.0, 2 * min(lower, upper))


def finite_row(name: str, values: ArrayLike) -> np.ndarray:
    """Return `values` as an array of floats, shape (n,).

    Raises:
        ValueError: They have another shape, or hold NaN or infinity; `name` says whose.
    """
    array = np.asarray(values, dtype=float)
    bad = int((~np.isfinite(array)).sum())
    if array.ndim != 1 or bad:
        raise ValueError(
            f"{name} has shape {array.shape} and {bad} values that are NaN or infinite: give one "
            "row of finite numbers."
        )
    return array
