"""How far something is: a bar on a terminal; of a sweep, one line per unit elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import defaultdict
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Progress:
    """Reports units as they start and end.

    Args:
        done: Units of this sweep that were finished before.
        failed: Units that failed before and are not tried again.
        waiting: Names of the tasks of the units to run.
        seconds: ``(task, seconds)`` of units that were finished before, from which
            the time left is estimated.
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
        self._total = done + failed + len(waiting)
        self._waiting = list(waiting)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        for task, duration in seconds:
            self._seconds[task].append(duration)
        form = "{n_fmt}/{total_fmt} |{bar:10}| {desc}"
        # None: a bar on a terminal alone.
        self._bar = tqdm(
            total=self._total, initial=done + failed, bar_format=form, disable=None
        )
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._bar)
        if not self._bar.disable:
            logger = logging.getLogger("lm_eval")
            self._stack.enter_context(logging_redirect_tqdm([logger]))
        self._say(
            f"{self._total} units: {done} done, {failed} failed before, "
            f"{len(waiting)} to run"
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stack.close()

    def start(self, configuration: str, task: str) -> None:
        """Say that a unit starts."""
        if self._bar.disable:
            self._say(f"{self._place(1)} {configuration} / {task} starts")
        else:
            self._bar.set_description_str(f"{self._left()}, {task} of {configuration}")

    def finish(
        self,
        configuration: str,
        task: str,
        seconds: float,
        scores: dict[str, float],
        error: dict[str, str] | None,
    ) -> None:
        """Say how a unit ended.

        Args:
            configuration: Id of its configuration.
            task: Name of its task.
            seconds: Time its evaluation took.
            scores: Its own metrics.
            error: None, or type and message of what it failed with.
        """
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
        self._say(
            f"{self._place()} {configuration} / {task}: {what} "
            f"({clock(seconds)}, {self._left()})"
        )

    def remaining_seconds(self) -> float | None:
        """Estimate the time left, from units of the same task where there are any.

        Returns:
            Seconds, or None while nothing is known.
        """
        known = {task: sum(all_) / len(all_) for task, all_ in self._seconds.items()}
        if not known:
            return None
        typical = sum(known.values()) / len(known)
        left = sum(known.get(task, typical) for task in self._waiting)
        return left / max(1, min(self.workers, len(self._waiting)))

    def _place(self, ahead: int = 0) -> str:
        return f"[{self.done + self.failed + ahead}/{self._total}]"

    def _left(self) -> str:
        left = self.remaining_seconds()
        return "time left unknown" if left is None else f"{clock(left)} left"

    def _say(self, line: str) -> None:
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)


@contextlib.contextmanager
def steps(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """Show a bar on a terminal, and nothing elsewhere, while `what` takes `total` steps.

    Yields:
        A function to be called with how many more were taken.
    """
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="step", leave=False, disable=None) as bar:
        yield bar.update


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds, such as ``0:09:30``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
