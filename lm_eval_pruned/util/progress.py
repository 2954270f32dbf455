"""How far something is: a bar on a terminal; of a sweep, one line per unit elsewhere."""

from __future__ import annotations

import contextlib
import logging
import shutil
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
        self.done, self.failed = done, failed
        self.workers = workers
        self._total = done + failed + len(waiting)
        self._waiting = list(waiting)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        for task, duration in seconds:
            self._seconds[task].append(duration)
        self._stack = contextlib.ExitStack()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._stack.enter_context(
                logging_redirect_tqdm([logging.getLogger("lm_eval")])
            )
            self._bar = self._stack.enter_context(
                tqdm(
                    total=self._total,
                    initial=done + failed,
                    bar_format="{n_fmt}/{total_fmt} |{bar:10}| {desc}",
                )
            )
        self._say(
            f"{self._total} units: {done} done, {failed} failed before, "
            f"{len(waiting)} to run"
        )

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stack.close()

    def start(self, configuration: str, task: str) -> None:
        """Say that a unit starts."""
        if self._bar is None:
            self._say(f"{self._place(1)} {configuration} / {task} starts")
        else:
            left = self._left()
            others = f"{self._place()} |{' ' * 10}| {left},  / {task}"
            room = max(shutil.get_terminal_size().columns - len(others), 1)
            if len(configuration) > room:
                configuration = configuration[: room - 1] + "…"
            self._bar.set_description_str(f"{left}, {configuration} / {task}")

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
            message = error["message"].strip().splitlines() or [""]
            what = f"FAILED with {error['type']}: {message[0]}"
        if self._bar is not None:
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
        number = self.done + self.failed + ahead
        return f"[{number}/{self._total}]"

    def _left(self) -> str:
        left = self.remaining_seconds()
        return "time left unknown" if left is None else f"{clock(left)} left"

    def _say(self, line: str) -> None:
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)


@contextlib.contextmanager
def steps(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, and nothing elsewhere, while something takes `total` steps.

    Args:
        total: How many steps there are.
        what: What the bar is of.

    Yields:
        A function to be called with how many more were taken.
    """
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit="step", leave=False) as bar:
        yield lambda count: bar.update(count) and None


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds, such as ``0:09:30``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
