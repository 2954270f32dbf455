"""How the comparison of a unit with the unpruned model was ended: what the results file says."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Mapping

#: Version of the block ``stopping`` of a results file.
SCHEMA = 1
#: Why a unit stopped.
REASONS = ("difference", "equivalent", "all documents", "no test")
_NO_ENDS = (None, None)


@dataclass(frozen=True)
class Stopping:
    """The looks at one comparison with the unpruned model, and what ended them.

    Attributes:
        rule: As the user wrote it: ``decided`` or ``decided:MARGIN``.
        task: Task or group.
        metric: The metric that decided, with filter.
        documents: Documents that were used.
        of: Documents that there are.
        reason: ``difference`` shown; ``equivalent`` within the margin; ``all documents``
            used; ``no test`` can be made of this metric, so that all documents were used.
        level: Family-wise level over the sizes of the sweep.
        sizes: Sizes that share it.
        looks: Documents at each look so far.
        p: Two-sided p of no difference at each look; None where there was no test.
        p_margin: p of a difference outside of the margin at each look; empty without one.
        nominal_level: Level that `p` is held at, at the last look.
        difference: Score less that of the unpruned model on the same documents, or None.
        low: Lower end of its interval, which holds at all looks together.
        high: Upper end.
        scores: The interval of each score by metric, as (low, high), of the same kind.

    Example:
        >>> stopping = Stopping("decided", "boolq", "acc,none", 84, 3270, "difference",
        ...     0.05, 7, (25, 38, 56, 84), (0.5, 0.1, 0.01, 1e-6), (), 2e-5,
        ...     -0.4, -0.6, -0.2, {})
        >>> stopping.text
        'partial: 84 of 3270'
        >>> Stopping.from_dict(stopping.as_dict()) == stopping
        True
    """

    rule: str
    task: str
    metric: str
    documents: int
    of: int
    reason: str
    level: float
    sizes: int
    looks: tuple[int, ...]
    p: tuple[float | None, ...]
    p_margin: tuple[float | None, ...]
    nominal_level: float
    difference: float | None
    low: float | None
    high: float | None
    scores: Mapping[str, tuple[float | None, float | None]]

    @property
    def is_partial(self) -> bool:
        """Whether there are documents that were not used."""
        return self.documents < self.of

    @property
    def text(self) -> str:
        """How many documents were used, in words."""
        return (
            f"{'partial' if self.is_partial else 'all'}: {self.documents} of {self.of}"
        )

    @property
    def margin(self) -> str | None:
        """The margin of the rule, or None."""
        return self.rule.partition(":")[2] or None

    @property
    def fractions(self) -> tuple[float, ...]:
        """Share of the documents that were used at each look."""
        return tuple(count / self.of for count in self.looks)

    def score_interval(
        self, task: str, metric: str
    ) -> tuple[float | None, float | None]:
        """Return the interval of a score, or no ends where it is not known."""
        return self.scores.get(metric, _NO_ENDS) if task == self.task else _NO_ENDS

    def as_dict(self) -> dict[str, Any]:
        """Return the block ``stopping`` of a results file."""
        return {"schema_version": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Stopping:
        """Read such a block.

        Raises:
            KeyError: Something is missing.
            TypeError: Something is of another kind.
            ValueError: It is of another version, or does not fit together.
        """
        if record["schema_version"] != SCHEMA or record["reason"] not in REASONS:
            raise ValueError
        found = cls(
            rule=str(record["rule"]),
            task=str(record["task"]),
            metric=str(record["metric"]),
            documents=int(record["documents"]),
            of=int(record["of"]),
            reason=record["reason"],
            sizes=int(record["sizes"]),
            level=float(record["level"]),
            looks=tuple(int(count) for count in record["looks"]),
            p=_numbers(record["p"]),
            p_margin=_numbers(record["p_margin"]),
            nominal_level=float(record["nominal_level"]),
            difference=_number(record["difference"]),
            low=_number(record["low"]),
            high=_number(record["high"]),
            scores={
                str(metric): (_number(low), _number(high))
                for metric, (low, high) in record["scores"].items()
            },
        )
        counts = (0, *found.looks)
        rises = all(one < other for one, other in itertools.pairwise(counts))
        fits = len(found.p) == len(found.looks) and found.looks[-1:] == (
            found.documents,
        )
        if not (rises and fits and found.documents <= found.of and found.sizes > 0):
            raise ValueError
        if found.p_margin and len(found.p_margin) != len(found.looks):
            raise ValueError
        return found


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _numbers(values: Any) -> tuple[float | None, ...]:
    return tuple(_number(value) for value in values)
