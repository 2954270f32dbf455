"""What a training costs, in seconds and joules, also over several stretches."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.energy.meter import CodecarbonMeter
from lm_eval_pruned.energy.monitor import EnergyMonitor, meters_the_machine
from lm_eval_pruned.energy.readings import EnergyReading, Joules, add_up


if TYPE_CHECKING:
    from collections.abc import Mapping

_WINDOW = "training"


class TrainingCost:
    """Seconds and joules of a training, and of what it goes on from.

    A meter that fails ends no training: what it could not measure is None, with a note.

    Args:
        metered: Whether energy is measured.
    """

    def __init__(self, *, metered: bool) -> None:
        self._before: list[EnergyReading] = []
        self._metered, self._open = metered, False
        meters = metered and meters_the_machine()
        self._monitor = EnergyMonitor(CodecarbonMeter() if meters else None)
        self._monitor.start_in_background()

    def add(self, record: Mapping[str, Any] | None) -> None:
        """Count what was spent up to a checkpoint, as its record says."""
        if record is None:
            return
        energy = record.get("energy") or {
            "joules": {},
            "notes": ["the first part was trained without a meter"],
        }
        joules, notes = Joules(**energy["joules"]), tuple(energy["notes"])
        spent = EnergyReading(record.get("seconds", 0.0), joules, notes=notes)
        self._before.append(spent)

    def begin(self, *, on_gpu: bool) -> None:
        """Begin to count.

        Args:
            on_gpu: Energy without that of the GPU is then no total.
        """
        if on_gpu:
            self._monitor.required.add("gpu")
        self._monitor.begin_window(_WINDOW)
        self._open = True

    def so_far(self) -> dict[str, Any]:
        """Return ``seconds`` and, where it is metered, ``energy``, as records have them."""
        parts = [*self._before]
        if self._open:
            # One window to the end: in a short one of its own a counter may stand still.
            parts.append(self._monitor.read_window(_WINDOW))
        reading = add_up(parts or [EnergyReading(0.0, notes=("nothing was trained",))])
        if _several_machines():
            notes = (*reading.notes, "only the first of several machines was metered")
            reading = replace(reading, joules=Joules(), notes=notes)
        record: dict[str, Any] = {"seconds": round(reading.seconds or 0.0, 1)}
        if self._metered:
            meter = self._monitor.describe()
            record["energy"] = {
                "meter": meter and meter.name,
                "joules": reading.joules.as_dict(),
                "sources": meter
                and {k: each.kind for k, each in meter.sources.items()},
                "notes": list(reading.notes),
            }
        return record

    def close(self) -> None:
        """Stop the meter."""
        self._monitor.stop()


def _several_machines() -> bool:
    """Whether a launcher has started processes on other machines too."""
    everywhere, here = (os.environ.get(n) for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return here is not None and int(everywhere or 1) > int(here or 1)
