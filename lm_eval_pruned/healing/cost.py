"""What a training costs, in seconds and joules, also over several stretches."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.energy.meter import CodecarbonMeter
from lm_eval_pruned.energy.monitor import EnergyMonitor, meters_the_machine
from lm_eval_pruned.energy.readings import EnergyReading, Joules, add_up


if TYPE_CHECKING:
    from collections.abc import Mapping

_WINDOW = "training"


class Cost:
    """Seconds and joules of a training, and of what it goes on from.

    A meter that fails ends no training: what it could not measure is None, with a note.

    Args:
        metered: Whether energy is measured.
    """

    def __init__(self, *, metered: bool) -> None:
        self._seconds = 0.0
        self._before: EnergyReading | None = None
        self._began = time.monotonic()
        self._monitor: EnergyMonitor | None = None
        self._metered, self._open = metered, False
        if metered and meters_the_machine():
            self._monitor = EnergyMonitor(CodecarbonMeter())
            self._monitor.start_in_background()

    def add(self, record: Mapping[str, Any] | None) -> None:
        """Count what was spent up to a checkpoint, as its record says."""
        if record is None:
            return
        self._seconds += record.get("seconds", 0.0)
        energy = record.get("energy")
        if energy is None:
            notes: tuple[str, ...] = ("the first part was trained without a meter",)
            self._before = EnergyReading(self._seconds, notes=notes)
        else:
            notes = tuple(energy["notes"])
            self._before = EnergyReading(
                self._seconds, Joules(**energy["joules"]), notes=notes
            )

    def begin(self, *, on_gpu: bool) -> None:
        """Begin to count.

        Args:
            on_gpu: Energy without that of the GPU is then no total.
        """
        if self._monitor is not None:
            if on_gpu:
                self._monitor.required.add("gpu")
            self._monitor.begin_window(_WINDOW)
            self._open = True
        # The meter may take a second or two to start.
        self._began = time.monotonic()

    def so_far(self) -> dict[str, Any]:
        """Return ``seconds`` and, where it is metered, ``energy``, as records have them."""
        record: dict[str, Any] = {"seconds": round(self._spent(), 1)}
        if self._metered:
            record["energy"] = self._energy()
        return record

    def close(self) -> None:
        """Stop the meter."""
        if self._monitor is not None:
            self._monitor.stop()

    def _spent(self) -> float:
        now = time.monotonic()
        self._seconds, self._began = self._seconds + now - self._began, now
        return self._seconds

    def _energy(self) -> dict[str, Any]:
        if self._monitor is None:
            notes: tuple[str, ...] = ("another process of this machine meters it",)
            return _written(EnergyReading(None, notes=notes), None)
        parts = [] if self._before is None else [self._before]
        if self._open:
            # One window to the end: in a short one of its own a counter may stand still.
            parts.append(self._monitor.read_window(_WINDOW))
        nothing = EnergyReading(None, notes=("nothing was trained",))
        reading = add_up(parts) if parts else nothing
        if _machines() > 1:
            notes = (*reading.notes, "only the first of several machines was metered")
            reading = EnergyReading(None, notes=notes)
        return _written(reading, self._monitor)


def _machines() -> int:
    """Return on how many machines a launcher has started processes."""
    of_all, of_one = (
        os.environ.get(n) or "1" for n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
    )
    return max(1, int(of_all) // int(of_one)) if "LOCAL_WORLD_SIZE" in os.environ else 1


def _written(reading: EnergyReading, monitor: EnergyMonitor | None) -> dict[str, Any]:
    meter = None if monitor is None else monitor.describe()
    return {
        "meter": meter and meter.name,
        "joules": reading.joules.as_dict(),
        "sources": meter and {name: each.kind for name, each in meter.sources.items()},
        "notes": list(dict.fromkeys(reading.notes)),
    }
