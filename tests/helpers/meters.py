"""Meters and clocks for tests: energy is a known function of a time that tests set."""

from __future__ import annotations

from lm_eval_pruned.energy.meter import ComponentSource, MeterDescription
from lm_eval_pruned.energy.readings import EnergyReading, Joules


class Clock:
    """A clock that moves when it is told to, in seconds."""

    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeMeter:
    """Counts known power over the time of a `Clock`.

    Args:
        clock: The time.
        watts: Power by component: a number, or a list of (from second, watts) steps.
        kg_per_kwh: Carbon intensity, or None.
        fail_at: Reading (counted from 1) that raises; or ``start`` or ``stop``.
    """

    def __init__(self, clock, watts, kg_per_kwh=None, fail_at=None):
        self.clock = clock
        self.watts = watts
        self.kg_per_kwh = kg_per_kwh
        self.fail_at = fail_at
        self.starts = 0
        self.reads = 0
        self.running = False

    def start(self):
        self.starts += 1
        if self.fail_at == "start":
            raise RuntimeError("no permission")
        self.running = True
        return self._description()

    def stop(self):
        self.running = False
        if self.fail_at == "stop":
            raise RuntimeError("would not stop")

    def read(self):
        assert self.running
        self.reads += 1
        if self.reads == self.fail_at:
            raise RuntimeError("the sensor is gone")
        joules = {name: self._joules(power) for name, power in self.watts.items()}
        total = sum(joules.values())
        return EnergyReading(
            None,
            Joules(**joules, total=total),
            None if self.kg_per_kwh is None else total / 3.6e6 * self.kg_per_kwh,
        )

    def _description(self):
        return MeterDescription(
            name="fake",
            scope="nothing real",
            resolution_seconds=0.0,
            sources={
                name: ComponentSource("measured", "by decree")
                if name in self.watts
                else ComponentSource("none", "not there")
                for name in ("cpu", "gpu", "ram")
            },
            hardware={},
            country="FRA" if self.kg_per_kwh is not None else None,
        )

    def _joules(self, power):
        steps = power if isinstance(power, list) else [(0.0, power)]
        ends = [start for start, _ in steps[1:]] + [float("inf")]
        return sum(
            watts * max(0.0, min(self.clock.now, end) - start)
            for (start, watts), end in zip(steps, ends, strict=True)
        )
