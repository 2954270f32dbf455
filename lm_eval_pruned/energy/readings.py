"""Energies with units: by component, added up, and above what the idle machine takes.

None always means *not measured*. A component is never reported as 0 J.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass, field
from operator import sub
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: Joules in one kilowatt-hour.
JOULES_PER_KWH = 3_600_000.0
#: The parts of a machine that are told apart.
COMPONENTS = ("cpu", "gpu", "ram")


@dataclass(frozen=True)
class Joules:
    """Energy by component, in joules; None where it was not measured.

    Attributes:
        cpu, gpu, ram: All processors and memory modules that the meter sees.
        total: As the meter adds them up; None where one that the meter has, or that the model
            runs on, was not measured.
    """

    cpu: float | None = None
    gpu: float | None = None
    ram: float | None = None
    total: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """Return the four numbers by name."""
        return asdict(self)

    def __sub__(self, other: Joules) -> Joules:
        return _by_component(sub, self, other)


@dataclass(frozen=True)
class EnergyReading:
    """What one window, or several added up, took; or what a meter's counters show.

    Attributes:
        seconds: Wall time in seconds; None where it was not measured.
        emissions_kg: Emissions in kg CO2e; None without a carbon intensity.
        notes: Why something was not measured.
    """

    seconds: float | None
    joules: Joules = field(default_factory=Joules)
    emissions_kg: float | None = None
    notes: tuple[str, ...] = ()

    def __sub__(self, before: EnergyReading) -> EnergyReading:
        """Return by how much counters moved on."""
        return EnergyReading(
            _if_known(sub, self.seconds, before.seconds),
            self.joules - before.joules,
            _if_known(sub, self.emissions_kg, before.emissions_kg),
        )

    def as_dict(self, idle: EnergyReading | None = None) -> dict[str, Any]:
        """Return the reading as JSON types; the keys carry the units.

        With a reading of the `idle` machine, its power times `seconds` is told too, and taken off.
        """
        total = self.joules.total
        kwh = ratio(total, JOULES_PER_KWH)
        kg_per_kwh = ratio(self.emissions_kg, kwh)
        record: dict[str, Any] = {
            "seconds": self.seconds,
            "joules": self.joules.as_dict(),
            "kwh": kwh,
            "mean_watts": ratio(total, self.seconds),
            "emissions_kg_co2e": self.emissions_kg,
            "carbon_intensity_g_co2e_per_kwh": kg_per_kwh and 1000 * kg_per_kwh,
        }
        if self.notes:
            record["notes"] = list(self.notes)
        if idle is not None:
            times = ratio(self.seconds, idle.seconds)
            power = Joules() if times is None else idle.joules
            spent = _by_component(lambda each: each * times, power)
            net = self.joules - spent
            record |= {"idle_joules": spent.as_dict(), "net_joules": net.as_dict()}
        return record


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Divide, or return None where that has no meaning (a None, or division by 0)."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def add_up(
    readings: Iterable[EnergyReading], *, at_once: bool = False
) -> EnergyReading:
    """Add readings of windows; a figure that one of them lacks is None in the sum.

    Where they ran `at_once`, on several machines, the wall time is the longest one's.
    """
    parts = list(readings)
    if not parts:
        return EnergyReading(0.0)
    return EnergyReading(
        _if_known(max if at_once else _sum, *(part.seconds for part in parts), 0.0),
        _by_component(_sum, *(part.joules for part in parts)),
        _if_known(_sum, *(part.emissions_kg for part in parts)),
        tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def _sum(*values: float) -> float:
    return sum(values)


def _by_component(function: Callable[..., float], *parts: Joules) -> Joules:
    columns = zip(*map(astuple, parts), strict=True)
    return Joules(*(_if_known(function, *column) for column in columns))


def _if_known(function: Callable[..., Any], *values: Any) -> Any:
    """Call a function with values; None where one of them is."""
    return None if None in values else function(*values)
