"""How far something is: a bar on a terminal; of a sweep, one line per unit elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import defaultdict
from statistics import fmean
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


class Progress:
    """Reports units as they start and end.

    Args:
        done: Units of this sweep that were finished before.
        failed: Units that failed before and are not tried again.
        waiting: Names of the tasks of the units to run.
        seconds: Task and seconds of units that were finished before, to estimate the time left.
        workers: How many units run at once.
    """

    def __init__(
        self,
        done: int,
        failed: int,
        waiting: Sequence[str],
        seconds: Sequence[tuple[str, float]] = (),
        workers: int = 1,
    ) -> None:
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self.done, self.failed, self.workers = done, failed, workers
        self._total, self._waiting = done + failed + len(waiting), list(waiting)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        for task, duration in seconds:
            self._seconds[task].append(duration)
        form = "{n_fmt}/{total_fmt} |{bar:10}| {desc}"
        started = {"initial": done + failed, "total": self._total}
        # None: a bar on a terminal alone.
        self._bar = tqdm(**started, bar_format=form, disable=None)
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._bar)
        if not self._bar.disable:
            logger = logging.getLogger("lm_eval")
            self._stack.enter_context(logging_redirect_tqdm([logger]))
        already = f"{done} done, {failed} failed before"
        self._say(f"{self._total} units: {already}, {len(waiting)} to run")

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stack.close()

    def start(self, configuration: str, task: str) -> None:
        """Say that a unit starts."""
        if self._bar.disable:
            place = f"[{self.done + self.failed + 1}/{self._total}]"
            self._say(f"{place} {configuration} / {task} starts")
        else:
            self._bar.set_description_str(f"{self._left()}, {task} of {configuration}")

    def finish(
        self,
        configuration: str,
        task: str,
        seconds: float,
        scores: Mapping[str, float],
        error: Mapping[str, str] | None,
    ) -> None:
        """Say how a unit ended: with scores after some seconds, or with type and message of an error."""
        self._waiting.remove(task)
        if error is None:
            self.done += 1
            self._seconds[task].append(seconds)
            what = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        else:
            self.failed += 1
            message = error["message"].strip().partition("\n")[0]
            what = f"FAILED with {error['type']}: {message}"
        self._bar.update()
        place = f"[{self.done + self.failed}/{self._total}]"
        times = f"({_clock(seconds)}, {self._left()})"
        self._say(f"{place} {configuration} / {task}: {what} {times}")

    def remaining_seconds(self) -> float | None:
        """Estimate the time left by units of the same tasks, else of all; None while none is known."""
        known = {task: fmean(durations) for task, durations in self._seconds.items()}
        if not known:
            return None
        left = sum(known.get(task, fmean(known.values())) for task in self._waiting)
        return left / max(1, min(self.workers, len(self._waiting)))

    def _left(self) -> str:
        left = self.remaining_seconds()
        return "time left unknown" if left is None else f"{_clock(left)} left"

    def _say(self, line: str) -> None:
        self._bar.write(line, file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def steps(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """Yield what counts the steps of `what`: a bar on a terminal, and nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="step", leave=False, disable=None) as bar:
        yield bar.update


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
