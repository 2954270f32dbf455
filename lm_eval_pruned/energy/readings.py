"""Energies with units: by component, added up, and above what the idle machine takes.

None always means *not measured*. A component is never reported as 0 J.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass, field, replace
from operator import sub
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Joules in one kilowatt-hour.
JOULES_PER_KWH = 3_600_000.0
#: The parts of a machine that are told apart.
COMPONENTS = ("cpu", "gpu", "ram")


@dataclass(frozen=True)
class Joules:
    """Energy by component, in joules; None where it was not measured.

    `total` is None where a component that the meter has, or that the model runs on, is missing.
    """

    cpu: float | None = None
    gpu: float | None = None
    ram: float | None = None
    total: float | None = None


@dataclass(frozen=True)
class EnergyReading:
    """What one window, or several added up, took; or what a meter's counters show.

    Emissions are kg CO2e, and None without a carbon intensity; `notes` say what is missing and why.
    """

    seconds: float | None = None
    joules: Joules = field(default_factory=Joules)
    emissions_kg: float | None = None
    notes: tuple[str, ...] = ()

    def __sub__(self, before: EnergyReading) -> EnergyReading:
        """Return by how much counters moved on."""
        return _combined(lambda figures: sub(*figures), self, before)

    def as_dict(self, idle: EnergyReading | None = None) -> dict[str, Any]:
        """Return the reading as JSON types; the keys carry the units.

        With a reading of the `idle` machine, its power times `seconds` is told too, and taken off.
        """
        total = self.joules.total
        kwh = ratio(total, JOULES_PER_KWH)
        kg_per_kwh = ratio(self.emissions_kg, kwh)
        record: dict[str, Any] = {
            "seconds": self.seconds,
            "joules": asdict(self.joules),
            "kwh": kwh,
            "mean_watts": ratio(total, self.seconds),
            "emissions_kg_co2e": self.emissions_kg,
            "carbon_intensity_g_co2e_per_kwh": kg_per_kwh and 1000 * kg_per_kwh,
        }
        if self.notes:
            record["notes"] = list(self.notes)
        if idle is not None:
            times, spent = ratio(self.seconds, idle.seconds), EnergyReading()
            if times is not None:
                spent = _combined(lambda figures: figures[0] * times, idle)
            record["idle_joules"] = asdict(spent.joules)
            record["net_joules"] = asdict((self - spent).joules)
        return record


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Divide, or return None where that has no meaning (a None, or division by 0)."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator


def add_up(
    readings: Sequence[EnergyReading], *, at_once: bool = False
) -> EnergyReading:
    """Add one or more readings of windows; a figure that one of them lacks is None in the sum.

    Where they ran `at_once`, on several machines, the wall time is the longest one's.
    """
    notes = tuple(dict.fromkeys(note for reading in readings for note in reading.notes))
    total = replace(_combined(sum, *readings), notes=notes)
    if at_once:
        total = replace(total, seconds=_combined(max, *readings).seconds)
    return total


def _combined(
    function: Callable[[Any], float], *readings: EnergyReading
) -> EnergyReading:
    """Call a function with each figure of all readings; None where one lacks it."""
    rows = [(r.seconds, *astuple(r.joules), r.emissions_kg) for r in readings]
    seconds, *joules, emissions = (
        None if None in figures else function(figures)
        for figures in zip(*rows, strict=True)
    )
    return EnergyReading(seconds, Joules(*joules), emissions)
