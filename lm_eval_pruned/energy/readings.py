"""Energies with units: by component, added up, and above what the idle machine takes.

None always means *not measured*. A component is never reported as 0 J.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: Joules in one kilowatt-hour.
JOULES_PER_KWH = 3_600_000.0
#: The parts of a machine that are told apart.
COMPONENTS = ("cpu", "gpu", "ram")


def joules_from_kwh(kwh: float) -> float:
    """Convert kilowatt-hours to joules."""
    return kwh * JOULES_PER_KWH


def kwh_from_joules(joules: float) -> float:
    """Convert joules to kilowatt-hours."""
    return joules / JOULES_PER_KWH


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
