"""Meters and clocks for tests: energy is a known function of a time that tests set."""

from __future__ import annotations

from lm_eval_pruned.energy.meter import (
    ComponentSource,
    EnergyMonitor,
    MeterDescription,
)
from lm_eval_pruned.energy.readings import COMPONENTS, EnergyReading, Joules


class Clock:
    """A clock that moves when it is told to, in seconds."""

    now = 0.0

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
        self.clock, self.watts = clock, watts
        self.kg_per_kwh, self.fail_at = kg_per_kwh, fail_at
        self.starts = self.reads = 0
        self.running = False

    def start(self):
        self.starts += 1
        self._fail("start", "no permission")
        self.running = True
        sources = dict.fromkeys(COMPONENTS, ComponentSource("none", "not there"))
        sources |= dict.fromkeys(self.watts, ComponentSource("measured", "by decree"))
        country = None if self.kg_per_kwh is None else "FRA"
        return MeterDescription("fake", "nothing real", 0.0, sources, {}, country)

    def stop(self):
        self.running = False
        self._fail("stop", "would not stop")

    def read(self):
        assert self.running
        self.reads += 1
        self._fail(self.reads, "the sensor is gone")
        joules = {name: self._joules(power) for name, power in self.watts.items()}
        total = sum(joules.values())
        kg = None if self.kg_per_kwh is None else total / 3.6e6 * self.kg_per_kwh
        return EnergyReading(None, Joules(**joules, total=total), kg)

    def _fail(self, event, message):
        if event == self.fail_at:
            raise RuntimeError(message)

    def _joules(self, power):
        steps = power if isinstance(power, list) else [(0.0, power)]
        ends = [start for start, _ in steps[1:]] + [float("inf")]
        return sum(
            watts * max(0.0, min(self.clock.now, end) - start)
            for (start, watts), end in zip(steps, ends, strict=True)
        )


def monitor_of(watts, *more, **meter):
    """Return a monitor of a machine of known power, and the clock that both look at."""
    clock = Clock()
    return EnergyMonitor(FakeMeter(clock, watts, *more, **meter), clock), clock
