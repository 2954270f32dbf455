"""Energy of a stretch of time, in windows that nest.

A `Meter` gives cumulative counters; `EnergyMonitor` takes their differences over
named windows and turns whatever the meter does wrong into a note instead of an
exception. The one meter this package ships is `lm_eval_pruned.energy.codecarbon_meter`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from lm_eval_pruned.energy.readings import EnergyReading, Joules


if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("lm_eval.pruned.energy")


@dataclass(frozen=True)
class ComponentSource:
    """Where the number of one component comes from.

    Attributes:
        kind: ``measured`` (a counter or sensor of the hardware), ``modelled`` (computed
            from something else, such as processor load), ``constant`` (the same watts
            all the time), or ``none`` (the component is not measured).
        description: The same for people to read, with the model's parameters.
    """

    kind: Literal["measured", "modelled", "constant", "none"]
    description: str


@dataclass(frozen=True)
class MeterDescription:
    """What a meter is and what its numbers hold.

    Attributes:
        name: Name and version of the meter.
        scope: What is metered and what is left out.
        resolution_seconds: Time by which the edge of a window may be off, in seconds.
        sources: One `ComponentSource` for each of `readings.COMPONENTS`.
        hardware: Model names, by component.
        country: ISO 3166 alpha-3 code that the carbon intensity belongs to, or None.
    """

    name: str
    scope: str
    resolution_seconds: float
    sources: dict[str, ComponentSource]
    hardware: dict[str, str]
    country: str | None = None


@dataclass(frozen=True)
class MeterSample:
    """Cumulative counters of a meter at one moment.

    Attributes:
        joules: Energy since the meter started, in joules, for each component that the
            meter has; a component it lacks is missing from the mapping.
        total_joules: Energy of all components together, in joules.
        emissions_kg: Emissions since the meter started, in kg CO2e, or None.
        counters: What the counters of single devices show, in joules, by component and
            name. One that stands still leaves its component unmeasured: the others of
            several GPUs would hide it.
    """

    joules: dict[str, float]
    total_joules: float
    emissions_kg: float | None = None
    counters: dict[str, dict[str, float]] = field(default_factory=dict)


class Meter(Protocol):
    """Something that counts energy. Any of its methods may raise."""

    def start(self) -> None:
        """Begin to count."""

    def read(self) -> MeterSample:
        """Return the counters as they are now."""

    def stop(self) -> None:
        """Stop counting; `read` is not called afterwards."""

    def describe(self) -> MeterDescription:
        """Say what the numbers are; called after `start`."""


@dataclass(frozen=True)
class _Edge:
    seconds: float
    sample: MeterSample | None

    def moved(self, begin: _Edge, end: _Edge) -> _Edge:
        """Return the beginning of a window that leaves out what lies between two edges."""
        seconds = self.seconds + end.seconds - begin.seconds
        if self.sample is None or begin.sample is None or end.sample is None:
            return _Edge(seconds, None)
        mine, before, after = self.sample, begin.sample, end.sample
        kg = (mine.emissions_kg, before.emissions_kg, after.emissions_kg)
        return _Edge(
            seconds,
            replace(
                mine,
                joules={
                    name: mine.joules.get(name, 0.0)
                    + joules
                    - before.joules.get(name, 0.0)
                    for name, joules in after.joules.items()
                },
                total_joules=mine.total_joules
                + after.total_joules
                - before.total_joules,
                emissions_kg=None if None in kg else kg[0] + kg[2] - kg[1],  # type: ignore[operator]
            ),
        )


class EnergyMonitor:
    """Measures named windows with a meter that may fail.

    Windows may nest and overlap; those of one monitor share its counters, so the
    windows inside another one add up to it, but for those measured apart. Nothing here
    raises because of the meter: what went wrong is in `failures` and in the notes of the
    readings.

    Args:
        meter: The meter; it is started by the first window, or by `start`.
        clock: Returns seconds; for tests.

    Attributes:
        failures: What the meter did wrong, one sentence each, in order.
        required: Components without which there is no total, such as ``gpu`` for a model
            that runs on one.

    Example:
        ```python
        monitor = EnergyMonitor(CodecarbonMeter())
        monitor.begin_window("evaluation")
        reading = monitor.end_window("evaluation")
        print(reading.joules.total, reading.mean_watts)
        ```
    """

    def __init__(
        self, meter: Meter, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.failures: list[str] = []
        self.required: set[str] = set()
        self._meter = meter
        self._clock = clock
        self._state: Literal["new", "running", "stopped", "failed"] = "new"
        self._description: MeterDescription | None = None
        self._open: dict[str, _Edge] = {}
        self._starting: threading.Thread | None = None

    def start(self) -> bool:
        """Start the meter if it does not run; return whether it does now."""
        if self._starting is not None:
            self._starting.join()
            self._starting = None
        self._start()
        return self._state == "running"

    def start_in_background(self) -> None:
        """Start the meter while the caller does something else.

        Finding out what hardware there is can take a second or two.
        """
        self._starting = threading.Thread(target=self._start, daemon=True)
        self._starting.start()

    def _start(self) -> None:
        if self._state in ("running", "failed"):
            return
        try:
            self._meter.start()
            self._description = self._meter.describe()
        except Exception as error:  # noqa: BLE001
            self._fail("did not start", error)
        else:
            self._state = "running"

    def stop(self) -> None:
        """Stop the meter. A later window starts it again."""
        if self._starting is not None:
            self._starting.join()
            self._starting = None
        if self._state != "running":
            return
        try:
            self._meter.stop()
        except Exception as error:  # noqa: BLE001
            self._fail("failed when it was stopped", error)
        else:
            self._state = "stopped"

    def describe(self) -> MeterDescription | None:
        """Return what the numbers are, or None if the meter never ran."""
        return self._description

    def begin_window(self, name: str) -> None:
        """Open a window.

        Raises:
            ValueError: A window of this name is open.
        """
        if name in self._open:
            raise ValueError(f"The energy window {name!r} is open already.")
        self.start()
        self._open[name] = self._edge()

    def read_window(self, name: str) -> EnergyReading:
        """Return what a window took so far; it stays open.

        Raises:
            ValueError: No window of this name is open.
        """
        if name not in self._open:
            raise ValueError(f"No energy window {name!r} is open.")
        return self._between(self._open[name], self._edge())

    def end_window(self, name: str, *, apart: bool = False) -> EnergyReading:
        """Close a window and return what it took.

        Args:
            name: The window.
            apart: The windows that are open around it leave out what it took.

        Raises:
            ValueError: No window of this name is open.
        """
        if name not in self._open:
            raise ValueError(f"No energy window {name!r} is open.")
        begin, end = self._open.pop(name), self._edge()
        if apart:
            for other, edge in self._open.items():
                self._open[other] = edge.moved(begin, end)
        return self._between(begin, end)

    def _edge(self) -> _Edge:
        sample = None
        if self._state == "running":
            try:
                sample = self._meter.read()
            except Exception as error:  # noqa: BLE001
                self._fail("died", error)
        return _Edge(self._clock(), sample)

    def _between(self, begin: _Edge, end: _Edge) -> EnergyReading:
        seconds = end.seconds - begin.seconds
        if seconds < 0:
            return EnergyReading(None, notes=("the clock went backwards",))
        if begin.sample is None or end.sample is None:
            why = self.failures[-1] if self.failures else "the meter did not run"
            return EnergyReading(seconds, notes=(why,))
        total = end.sample.total_joules - begin.sample.total_joules
        if total <= 0:
            return EnergyReading(
                seconds,
                notes=(
                    f"the meter counted {total:g} J in {seconds:.3f} s: not measured",
                ),
            )
        notes = []
        parts: dict[str, float] = {}
        for name, after in end.sample.joules.items():
            part = after - begin.sample.joules.get(name, 0.0)
            before = begin.sample.counters.get(name, {})
            still = [
                device
                for device, joules in end.sample.counters.get(name, {}).items()
                if before.get(device) == joules
            ]
            if part > 0 and not still:
                parts[name] = part
                continue
            where = (
                f" (the counter of {', '.join(still)} stands still)" if still else ""
            )
            notes.append(
                f"the meter counted {part:g} J for {name}{where} in {seconds:.3f} s: not "
                "measured, so there is no total"
            )
        notes += [
            f"the model runs on a {name} that the meter does not see, so there is no total"
            for name in sorted(self.required - set(end.sample.joules))
        ]
        if notes:
            return EnergyReading(seconds, Joules(**parts), None, tuple(notes))
        emissions = None
        if (
            begin.sample.emissions_kg is not None
            and end.sample.emissions_kg is not None
        ):
            emissions = end.sample.emissions_kg - begin.sample.emissions_kg
        return EnergyReading(seconds, Joules(total=total, **parts), emissions)

    def _fail(self, what: str, error: Exception) -> None:
        self._state = "failed"
        self.failures.append(f"the meter {what}: {error or type(error).__name__}")
        logger.warning(
            "Energy is not measured any more, the evaluation goes on: %s.",
            self.failures[-1],
        )


def meters_the_machine() -> bool:
    """Whether this process is the one that meters its machine: the first of its launcher."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name]) == 0
    return True
