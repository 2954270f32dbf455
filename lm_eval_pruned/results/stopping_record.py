"""How the comparison of a unit with the unpruned model was ended: what the results file says."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

#: Version of the block ``stopping`` of a results file.
SCHEMA = 2


@dataclass(frozen=True)
class Stopping:
    """The looks at one comparison with the unpruned model, and what ended them.

    Each look may spend a share of the level, fixed before the first (alpha spending): half of
    the level in proportion to the documents, and the rest with the last of them. A p below its
    share of ``level / sizes`` decides. By Bonferroni's inequality, the chance of a wrong
    decision of any size at any look is then `level` at most, however the looks depend on each
    other.

    Attributes:
        rule: As the user wrote it: ``decided`` or ``decided:MARGIN``.
        task: Task or group.
        of: Documents that there are.
        level: Family-wise level over the sizes of the sweep.
        sizes: Sizes that share it.
        metric: The metric that decided, with filter.
        reason: ``difference`` shown; ``equivalent`` within the margin; ``all documents``
            used; ``no test`` can be made of this metric; empty while the unit goes on.
        looks: Documents at each look so far.
        p: Two-sided p of no difference at each look; None where there was no test.
        p_margin: p of a difference outside of the margin at each look, or None.
        difference: Score less that of the unpruned model on the same documents, or None; from
            `low` to `high` is its interval, which holds at all looks together.
        scores: The interval of each score by metric, as (low, high), of the same kind.

    Source: Lan and DeMets 1983, Biometrika 70, 659-663 (spending); Jennison and Turnbull 2000,
    Group Sequential Methods, chapter 9 (p and intervals that hold at all looks).
    """

    rule: str
    task: str
    of: int
    level: float
    sizes: int
    metric: str = ""
    reason: str = ""
    looks: tuple[int, ...] = ()
    p: tuple[float | None, ...] = ()
    p_margin: tuple[float | None, ...] = ()
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    scores: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)

    @property
    def documents(self) -> int:
        """How many documents were used."""
        return self.looks[-1]

    @property
    def is_partial(self) -> bool:
        """Whether there are documents that were not used."""
        return self.documents < self.of

    @property
    def text(self) -> str:
        """How many documents were used, such as ``partial: 800 of 3200``."""
        part = "partial" if self.is_partial else "all"
        return f"{part}: {self.documents} of {self.of}"

    @property
    def margin(self) -> str:
        """The margin of the rule; empty without one."""
        return self.rule.partition(":")[2]

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the level that each look may spend."""
        spent = [1.0 if n == self.of else n / self.of / 2 for n in self.looks]
        return tuple(now - before for before, now in itertools.pairwise((0, *spent)))

    @property
    def nominal_level(self) -> float:
        """Level of a single test at the last look."""
        return self.level / self.sizes * self.shares[-1]

    def repeated(self, ps: Iterable[float | None]) -> float:
        """Return a p of one size that holds at all looks, from p or None at each of them."""
        pairs = zip(ps, self.shares, strict=True)
        return min([1.0, *(p / share for p, share in pairs if p is not None)])

    def score_interval(self, task: str, metric: str) -> tuple[float | None, ...]:
        """Return the interval of a score, or no ends where it is not known."""
        known = self.scores if task == self.task else {}
        return known.get(metric, (None, None))

    def as_dict(self) -> dict[str, Any]:
        """Return the block ``stopping`` of a results file."""
        return {"schema_version": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Stopping:
        """Read such a block of version `SCHEMA`."""
        values = {
            key: value for key, value in record.items() if key != "schema_version"
        }
        values |= {key: tuple(values[key]) for key in ("looks", "p", "p_margin")}
        values["scores"] = {key: tuple(ends) for key, ends in values["scores"].items()}
        return cls(**values)
