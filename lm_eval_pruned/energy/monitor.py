"""Energy of a stretch of time: readings with units, windows that nest, idle subtracted.

A `Meter` gives cumulative counters; `EnergyMonitor` takes their differences over
named windows and turns whatever the meter does wrong into a note instead of an
exception. The one meter this package ships is `lm_eval_pruned.energy.codecarbon_meter`.

None always means *not measured*. A component is never reported as 0 J.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: Joules in one kilowatt-hour.
JOULES_PER_KWH = 3_600_000.0
#: The parts of a machine that are told apart.
COMPONENTS = ("cpu", "gpu", "ram")

logger = logging.getLogger("lm_eval.pruned.energy")


def joules_from_kwh(kwh: float) -> float:
    """Convert kilowatt-hours to joules."""
    return kwh * JOULES_PER_KWH


def kwh_from_joules(joules: float) -> float:
    """Convert joules to kilowatt-hours."""
    return joules / JOULES_PER_KWH


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
        sources: One `ComponentSource` for each of `COMPONENTS`.
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
class Joules:
    """Energy by component, in joules; None where it was not measured.

    Attributes:
        cpu: Processor packages.
        gpu: All graphics processors that the meter sees.
        ram: Memory modules.
        total: All components together, as the meter adds them up; None where one that the
            meter has, or that the model runs on, was not measured.
    """

    cpu: float | None = None
    gpu: float | None = None
    ram: float | None = None
    total: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """Return the four numbers by name."""
        return {name: getattr(self, name) for name in (*COMPONENTS, "total")}


@dataclass(frozen=True)
class EnergyReading:
    """What one window, or several added up, took.

    Attributes:
        seconds: Wall time in seconds; None if the clock cannot be trusted.
        joules: Energy by component.
        emissions_kg: Emissions in kg CO2e; None without a carbon intensity.
        notes: Why something was not measured.
    """

    seconds: float | None
    joules: Joules = field(default_factory=Joules)
    emissions_kg: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def kwh(self) -> float | None:
        """Total energy in kilowatt-hours."""
        total = self.joules.total
        return None if total is None else kwh_from_joules(total)

    @property
    def mean_watts(self) -> float | None:
        """Total energy over wall time, in watts."""
        return ratio(self.joules.total, self.seconds)

    @property
    def carbon_intensity(self) -> float | None:
        """Carbon intensity that `emissions_kg` was computed with, in g CO2e per kWh."""
        kg_per_kwh = ratio(self.emissions_kg, self.kwh)
        return None if kg_per_kwh is None else 1000 * kg_per_kwh

    def as_dict(self) -> dict[str, Any]:
        """Return the reading as JSON types; the keys carry the units."""
        record: dict[str, Any] = {
            "seconds": self.seconds,
            "joules": self.joules.as_dict(),
            "kwh": self.kwh,
            "mean_watts": self.mean_watts,
            "emissions_kg_co2e": self.emissions_kg,
            "carbon_intensity_g_co2e_per_kwh": self.carbon_intensity,
        }
        if self.notes:
            record["notes"] = list(self.notes)
        return record


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Divide, or return None where that has no meaning (a None, or division by 0)."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def add_up(
    readings: Iterable[EnergyReading], *, at_once: bool = False
) -> EnergyReading:
    """Add readings of windows that do not count the same energy twice.

    A figure that one of them lacks is None in the sum: part of a sum looks like a
    whole one.

    Args:
        readings: Windows one after the other, or of several machines.
        at_once: The windows ran side by side: the wall time is the longest one's.
    """
    parts = list(readings)

    seconds = _all_of([part.seconds for part in parts], max if at_once else sum)
    return EnergyReading(
        seconds if parts else 0.0,
        add_joules(part.joules for part in parts),
        _all_of([part.emissions_kg for part in parts]),
        tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def add_joules(joules: Iterable[Joules]) -> Joules:
    """Add energies by component; a figure that one of them lacks is None in the sum."""
    parts = list(joules)
    return Joules(
        **{
            name: _all_of([getattr(part, name) for part in parts])
            for name in (*COMPONENTS, "total")
        }
    )


def _all_of(
    values: list[float | None], add: Callable[..., float] = sum
) -> float | None:
    known = [value for value in values if value is not None]
    return add(known) if values and len(known) == len(values) else None


def scale_idle(idle: EnergyReading, seconds: float | None) -> Joules:
    """Return what the idle machine would have used in `seconds`, in joules."""

    def share(joules: float | None) -> float | None:
        watts = ratio(joules, idle.seconds)
        return None if watts is None or seconds is None else watts * seconds

    return Joules(
        **{name: share(value) for name, value in idle.joules.as_dict().items()}
    )


def subtract(gross: Joules, idle: Joules) -> Joules:
    """Return gross - idle by component. Negative results are kept as they are."""

    def difference(name: str) -> float | None:
        left, right = getattr(gross, name), getattr(idle, name)
        return None if left is None or right is None else left - right

    return Joules(**{name: difference(name) for name in (*COMPONENTS, "total")})


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
