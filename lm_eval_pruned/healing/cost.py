"""What a training costs, in seconds and joules, also over several stretches."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.energy.meter import CodecarbonMeter
from lm_eval_pruned.energy.monitor import EnergyMonitor, meters_the_machine
from lm_eval_pruned.energy.readings import EnergyReading, Joules, add_up


if TYPE_CHECKING:
    from collections.abc import Mapping

_UNMETERED = {"joules": {}, "notes": ["the first part was trained without a meter"]}


class TrainingCost:
    """Seconds and joules of a training; what could not be measured is None, with a note.

    `before` is the record of the checkpoint that the training continues from.
    """

    def __init__(
        self, *, metered: bool, before: Mapping[str, Any] | None = None
    ) -> None:
        self._metered, self._open, self._before = metered, False, before or {}
        meters = metered and meters_the_machine()
        self._monitor = EnergyMonitor(CodecarbonMeter() if meters else None)
        self.close = self._monitor.stop

    def begin(self, *, on_gpu: bool) -> None:
        """Start counting; if `on_gpu`, a total needs the energy of the GPU."""
        if on_gpu:
            self._monitor.required.add("gpu")
        self._monitor.begin_window("training")
        self._open = True

    def so_far(self) -> dict[str, Any]:
        """Return ``seconds`` and, where it is metered, ``energy``, as records have them."""
        before = self._before
        if not self._open:
            # All steps were taken before.
            return {k: before[k] for k in ("seconds", "energy") if k in before}
        # One window to the end: in a short one a counter may not move at all.
        reading = self._monitor.read_window("training")
        if before:
            energy: dict[str, Any] = before.get("energy") or _UNMETERED
            joules, notes = Joules(**energy["joules"]), tuple(energy["notes"])
            earlier = EnergyReading(before["seconds"], joules, notes=notes)
            reading = add_up([earlier, reading])
        everywhere, here = map(os.environ.get, ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if here is not None and int(everywhere or 1) > int(here):
            notes = (*reading.notes, "only the first of several machines was metered")
            reading = replace(reading, joules=Joules(), notes=notes)
        record: dict[str, Any] = {"seconds": round(reading.seconds or 0.0, 1)}
        if self._metered:
            meter = self._monitor.describe()
            record["energy"] = {
                "meter": meter and meter.name,
                "joules": asdict(reading.joules),
                "sources": meter and {k: s.kind for k, s in meter.sources.items()},
                "notes": list(reading.notes),
            }
        return record
