"""How far a sweep is: a line where a unit starts and where it ends."""

from __future__ import annotations

from datetime import timedelta
from statistics import fmean
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Progress:
    """Prints a line where a unit starts and where it ends.

    Args:
        done, failed: Units of this sweep that were finished, or failed, before.
        waiting: Names of the tasks of the units to run.
        seconds: Task and seconds of units that were finished before, to estimate the time left.
        quick: Configuration and task of further units to run, which take no time to speak of.
    """

    def __init__(
        self,
        done: int,
        failed: int,
        waiting: Sequence[str],
        seconds: Sequence[tuple[str, float]] = (),
        quick: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.done, self.failed, self.elsewhere, self.workers = done, failed, 0, 1
        self._waiting, self._quick, self._seconds = [*waiting], quick, [*seconds]
        to_run = len(waiting) + len(quick)
        self._total = done + failed + to_run
        counts = f"{done} done, {failed} failed before, {to_run} to run"
        print(f"{self._total} units: {counts}", flush=True)

    def start(self, configuration: str, task: str) -> None:
        """Say that a unit starts."""
        self._say(1, f"{configuration} / {task} starts")

    def leave(self, configuration: str, task: str) -> None:
        """Leave a unit to another process."""
        self.elsewhere += 1
        if (configuration, task) not in self._quick:
            self._waiting.remove(task)

    def finish(
        self,
        configuration: str,
        task: str,
        seconds: float,
        scores: Mapping[str, float],
        error: Mapping[str, str] | None,
    ) -> None:
        """Say how a unit ended: with scores after some seconds, or with type and message of an error."""
        if (configuration, task) not in self._quick:
            self._waiting.remove(task)
            self._seconds += [] if error else [(task, seconds)]
        if error is None:
            self.done += 1
            what = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        else:
            self.failed += 1
            message = error["message"].strip().partition("\n")[0]
            what = f"FAILED with {error['type']}: {message}"
        left = self.remaining_seconds()
        known = "time left unknown" if left is None else f"{_clock(left)} left"
        self._say(0, f"{configuration} / {task}: {what} ({_clock(seconds)}, {known})")

    def remaining_seconds(self) -> float | None:
        """Estimate the time left by units of the same tasks, else of all; None while none is known."""
        if not self._seconds:
            return None
        tasks = {task for task, _ in self._seconds}
        known = {t: fmean(s for task, s in self._seconds if task == t) for t in tasks}
        left = sum(known.get(task, fmean(known.values())) for task in self._waiting)
        return left / max(1, min(self.workers, len(self._waiting)))

    def _say(self, more: int, what: str) -> None:
        number = self.done + self.failed + more
        print(f"[{number}/{self._total}] {what}", flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
