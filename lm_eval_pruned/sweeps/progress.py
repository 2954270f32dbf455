"""The units of a sweep that are to run: who takes which, and a line where one starts and ends."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from datetime import timedelta
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import SIZES


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lm_eval_pruned.sweeps.plan import Configuration, Unit


class Progress:
    """Hands units to whoever holds a model, and prints how far the sweep is.

    The time left is that of units of the same task, else of all, and of loading and pruning the
    models that are still to come, as it was for the last one that is pruned in the same way.

    Attributes:
        waiting: Units that nobody has taken.
        held: The id of the configuration whose model someone holds, by who it is.
        done: Number of units that were finished, before or now.
        failed: Number of those that failed.
        elsewhere: Number of those that another process has.
    """

    def __init__(
        self,
        units: Iterable[Unit],
        done: int = 0,
        failed: int = 0,
        seconds: Iterable[tuple[str, float]] = (),
    ) -> None:
        """Take the units to run, how many were finished or failed before, and the task and seconds of some."""
        self.waiting, self.held = [*units], dict[Any, str]()
        self.done, self.failed, self.elsewhere = done, failed, 0
        self._seconds: dict[str, list[float]] = defaultdict(list)
        for task, spent in seconds:
            self._seconds[task].append(spent)
        #: Units that have started and not ended, and when they started, by their names.
        self._started: dict[tuple[str, str], tuple[Unit, float]] = {}
        #: Ids of configurations that were loaded, and seconds that it took by how they are pruned.
        self._loaded: set[str] = set()
        self._loading: dict[frozenset[Any], float] = {}
        self._total = done + failed + len(self.waiting)
        counts = f"{done} done, {failed} failed before, {len(self.waiting)} to run"
        print(f"{self._total} units: {counts}", flush=True)

    def take(self, holder: Any) -> Unit:
        """Take a unit of the model it holds, else of one nobody holds, else of the one with most left."""
        mine, held = self.held.get(holder), [*self.held.values()]
        left = Counter(unit.configuration.id for unit in self.waiting)

        def rank(unit: Unit) -> tuple[bool, bool, int]:
            name = unit.configuration.id
            return name != mine, name in held, -left[name]

        self.waiting.remove(unit := min(self.waiting, key=rank))
        return unit

    def start(self, unit: Unit) -> None:
        """Say that a unit starts, which nobody else takes any more."""
        if unit in self.waiting:
            self.waiting.remove(unit)
        self._started[unit.names] = unit, time.monotonic()
        self._say(1, f"{' / '.join(unit.names)} starts")

    def finish(
        self,
        unit: Unit,
        seconds: float,
        scores: Mapping[str, float],
        error: Mapping[str, str] | None,
    ) -> None:
        """Say how a unit ended: with scores after some seconds, or with type and message of an error.

        The seconds are those of the evaluation, without loading the model.
        """
        workers, model = len(self._started), unit.configuration
        _, start = self._started.pop(unit.names)
        took = time.monotonic() - start
        if error is None and not model.floor:
            self._seconds[unit.task.name].append(seconds)
            if model.id not in self._loaded:
                self._loading[_way(model)] = max(0.0, took - seconds)
        self._loaded.add(model.id)
        if error is None:
            self.done += 1
            what = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        else:
            self.failed += 1
            message = error["message"].strip().partition("\n")[0]
            what = f"FAILED with {error['type']}: {message}"
        spent = f"{_clock(seconds)}, {self._left(workers)}"
        self._say(0, f"{' / '.join(unit.names)}: {what} ({spent})")

    def _left(self, workers: int) -> str:
        """Say how much time is left for so many workers."""
        known = {task: fmean(spent) for task, spent in self._seconds.items()}
        if not known:
            return "time left unknown"
        usual = fmean(known.values())
        open_units = [*self.waiting, *(unit for unit, _ in self._started.values())]
        # Models that know nothing take no time, and tell nothing of that of the others.
        timed = [unit for unit in open_units if not unit.configuration.floor]
        left = sum(known.get(unit.task.name, usual) for unit in timed)
        models = {unit.configuration.id: unit.configuration for unit in timed}
        ways = [_way(models[name]) for name in models.keys() - self._loaded]
        left += sum(self._loading.get(way, 0) for way in ways)
        left /= max(1, min(workers, len(timed)))
        unknown = sum(way not in self._loading for way in ways)
        models_text = f"{unknown} model{'s' * (unknown != 1)}"
        besides = f", without loading and pruning {models_text}" if unknown else ""
        return f"{_clock(left)} left{besides}"

    def _say(self, more: int, what: str) -> None:
        number = self.done + self.failed + more
        print(f"[{number}/{self._total}] {what}", flush=True)


def _way(configuration: Configuration) -> frozenset[Any]:
    """Return how a model is pruned, whatever its size, on which the time hardly depends."""
    same = (*SIZES, "seed")
    return frozenset(
        (name, None if name in same else value)
        for name, value in configuration.arguments.items()
    )


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
