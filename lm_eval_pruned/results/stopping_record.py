"""How the comparison of a unit with the unpruned model was ended: what the results file says."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Mapping

#: Version of the block ``stopping`` of a results file.
SCHEMA = 3


@dataclass(frozen=True)
class Stopping:
    """The looks at one comparison with the unpruned model, and what ended them.

    Attributes:
        rule: As the user wrote it: ``decided`` or ``decided:MARGIN``.
        task: Task or group.
        of: Documents that there are.
        level: Chance that any of the `sizes` of a sweep is decided wrongly at any look.
        metric: The metric that decided, with filter.
        reason: ``difference`` shown; ``equivalent`` within the margin; ``all documents``
            used; empty while the unit goes on.
        looks: Documents at each look so far.
        p: Two-sided p of no difference, which holds at all looks of one size; 1 without a test.
        p_margin: The same of a difference outside of the margin.
        difference: Score less that of the unpruned model on the same documents, or None.
        scores: The interval of each score by metric, as (low, high), which holds at all looks.
    """

    rule: str
    task: str
    of: int
    level: float
    sizes: int
    metric: str = ""
    reason: str = ""
    looks: tuple[int, ...] = ()
    p: float = 1.0
    p_margin: float = 1.0
    difference: float | None = None
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
    def share(self) -> float:
        """Share of the level that the last look may spend."""
        before, now = (0, *self.looks)[-2:]
        return spent(now, self.of) - spent(before, self.of)

    @property
    def nominal_level(self) -> float:
        """Level of a single test at the last look."""
        return self.level / self.sizes * self.share

    def as_dict(self) -> dict[str, Any]:
        """Return the block ``stopping`` of a results file."""
        return {"schema_version": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Stopping:
        """Read such a block of version `SCHEMA`."""
        values = {**record, "looks": tuple(record["looks"])}
        del values["schema_version"]
        scores = {metric: tuple(ends) for metric, ends in record["scores"].items()}
        return cls(**values | {"scores": scores})


def spent(documents: int, of: int) -> float:
    """Return the share of the level that looks at up to so many documents may spend together.

    Half of the level goes in proportion to the documents, the rest with the last of them.

    Source: Lan and DeMets 1983, Biometrika 70, 659-663.
    """
    return 1.0 if documents == of else documents / of / 2
