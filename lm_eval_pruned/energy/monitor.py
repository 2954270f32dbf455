"""Energy of a stretch of time: differences of a meter's counters, in windows that nest."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.energy.readings import EnergyReading, Joules, add_up


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval_pruned.energy.meter import CodecarbonMeter, MeterDescription

logger = logging.getLogger("lm_eval.pruned.energy")


class EnergyMonitor:
    """Measures named windows, which may nest and overlap, with a meter that may fail.

    Failures of the meter raise no errors: `failures` has one sentence for each, as have the notes
    of the readings.

    Args:
        meter: The meter, which the first window starts. None where another process meters the
            machine: only time is measured.
        clock: Returns seconds.

    Attributes:
        meters: Whether there is a meter, also one that failed since.
        required: Components without which there is no total, such as ``gpu``.
    """

    def __init__(
        self,
        meter: CodecarbonMeter | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.failures: list[str] = []
        self.required: set[str] = set()
        self.meters = meter is not None
        self.clock = clock
        self._meter, self._running = meter, False
        self._description: MeterDescription | None = None
        self._open: dict[str, EnergyReading] = {}
        # What no open window holds.
        self._apart = EnergyReading(0.0, Joules(0.0, 0.0, 0.0, 0.0), 0.0)
        if not self.meters:
            self.failures.append("another process of this machine meters it")

    def start(self) -> None:
        """Start the meter if it does not run; one that failed is not tried again."""
        if self._meter is not None and not self._running:
            description = self._ask(self._meter.start, "did not start")
            self._description = description or self._description
            self._running = description is not None

    def stop(self) -> None:
        """Stop the meter. A later window starts it again."""
        if self._meter is not None and self._running:
            self._running = False
            self._ask(self._meter.stop, "failed when it was stopped")

    def describe(self) -> MeterDescription | None:
        """Return what the numbers are, or None if the meter never ran."""
        return self._description

    def begin_window(self, name: str) -> None:
        self.start()
        self._open[name] = self._counters()

    def end_window(self, name: str, *, apart: bool = False) -> EnergyReading:
        """Close a window and return what it took; if `apart`, exclude it from open windows."""
        took = self._counters() - self._open.pop(name)
        if apart:
            self._apart = add_up([self._apart, took])
        return self._checked(took)

    def _counters(self) -> EnergyReading:
        counters = EnergyReading()
        if self._meter is not None and self._running:
            counters = self._ask(self._meter.read, "died") or counters
        return replace(counters, seconds=self.clock()) - self._apart

    def _checked(self, took: EnergyReading) -> EnergyReading:
        """Return a difference of counters without figures that are not measurements."""
        if took.joules.total is None:
            note = (self.failures or ["the meter did not run"])[-1]
            return EnergyReading(took.seconds, notes=(note,))
        parts = asdict(took.joules)
        notes = [
            f"the meter counted {part:g} J for {name} in {took.seconds:.3f} s: not measured, "
            "so no total is given"
            for name, part in parts.items()
            if part is not None and part <= 0
        ] + [
            f"the model runs on a {name} that the meter does not see, so no total is given"
            for name in sorted(self.required)
            if parts[name] is None
        ]
        if not notes:
            return took
        measured = {name: part for name, part in parts.items() if part and part > 0}
        joules = Joules(**measured | {"total": None})
        return EnergyReading(took.seconds, joules, notes=tuple(notes))

    def _ask(self, call: Callable[[], Any], failure: str) -> Any:
        """Return what the meter answers; one that fails is not asked again."""
        try:
            return call()
        except Exception as error:  # noqa: BLE001
            self._meter, self._running = None, False
            note = f"the meter {failure}: {error or type(error).__name__}"
            self.failures.append(note)
            logger.warning("Energy is no longer measured: %s.", note)
            return None


def meters_the_machine() -> bool:
    """Whether this process is the one that meters its machine: the first of its launcher."""
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return rank == "0"
