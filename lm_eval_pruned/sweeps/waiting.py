"""Which unit of a sweep is run next, by whoever holds a model."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.sweeps.plan import Unit


class Waiting:
    """Units that wait to be run, by whoever holds a model; `known` are tasks and seconds of others."""

    def __init__(self, units: Sequence[Unit], known: list[tuple[str, float]]) -> None:
        self.units, self.known = list(units), known
        #: The id of the configuration whose model someone holds, by who it is.
        self.held: dict[Any, str] = {}

    def take(self, holder: Any) -> Unit:
        """Take a unit of the model it holds, else of one nobody holds, else of the one with most left.

        The longest unit of a model goes first, and what is left of a model is counted in seconds. A
        task that is unknown takes as long as the known ones on average.
        """
        times = defaultdict(list)
        for task, seconds in self.known:
            times[task].append(seconds)
        spent = {task: fmean(each) for task, each in times.items()}
        usual = fmean(spent.values()) if spent else 1.0
        costs = [(u.names[0], spent.get(u.names[1], usual)) for u in self.units]
        left: dict[str, float] = defaultdict(float)
        for name, seconds in costs:
            left[name] += seconds
        own, held = self.held.get(holder), [*self.held.values()]
        ranks = [(name != own, name in held, -left[name], -s) for name, s in costs]
        return self.units.pop(ranks.index(min(ranks)))
