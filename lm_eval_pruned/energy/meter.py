"""codecarbon as a meter, machine-wide, offline and silent, and windows that it measures.

codecarbon's ``stop()`` and ``flush()`` return *emissions* in kg CO2e. Energy is ``energy_consumed``
and the components beside it, in kWh, of the `EmissionsData` that it hands to an output.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import psutil

from lm_eval_pruned.energy.readings import (
    COMPONENTS,
    JOULES_PER_KWH,
    EnergyReading,
    Joules,
    add_up,
)


if TYPE_CHECKING:
    from collections.abc import Callable

    from codecarbon.output_methods.emissions_data import EmissionsData

logger = logging.getLogger("lm_eval.pruned.energy")

#: What codecarbon reads counters or sensors with, by the mode or the type of its hardware.
_COUNTERS = {
    "intel_rapl": "RAPL energy counters of the processor packages",
    "windows_emi": "RAPL energy counters through the Windows Energy Meter Interface",
    "intel_power_gadget": "Intel Power Gadget",
    "AppleSiliconChip": "powermetrics",
    "Raspberry": "power rails of the Raspberry Pi",
}


@dataclass(frozen=True)
class ComponentSource:
    """Where the number of one component comes from."""

    kind: Literal["measured", "modelled", "constant", "none"]
    description: str


@dataclass(frozen=True)
class MeterDescription:
    """What a meter is and what its numbers hold; the keys are those of docs/energy.md."""

    name: str
    scope: str
    resolution_seconds: float
    sources: dict[str, ComponentSource]
    hardware: dict[str, str]
    country: str | None = None


def check_country(country: str) -> str:
    """Return an ISO 3166 alpha-3 code in capitals; ValueError if codecarbon does not know it."""
    from codecarbon.input import DataSource

    code = str(country).upper()
    if code not in DataSource().get_global_energy_mix_data():
        raise ValueError(
            f"energy_country={country} is not a country whose carbon intensity codecarbon "
            "knows: pass an ISO 3166 alpha-3 code such as FRA, USA or ESP."
        )
    return code


class CodecarbonMeter:
    """Counts the energy of this machine with codecarbon, and emissions where `country` is given.

    Of the user's codecarbon configuration, ``force_...``, ``pue`` and ``rapl_...`` apply.
    Source: codecarbon 3.3.2, `emissions_tracker.py`, `core/resource_tracker.py`.
    """

    def __init__(self, country: str | None = None) -> None:
        self._country = country
        self._sources: dict[str, ComponentSource] = {}
        self._latest: EmissionsData | None = None

    def start(self) -> MeterDescription:
        """Measure for the first time; raise RuntimeError where codecarbon swallows an error."""
        import codecarbon
        from codecarbon.output_methods.base_output import BaseOutput

        class Output(BaseOutput):
            def out(output, total: EmissionsData, delta: EmissionsData) -> None:
                self._latest = total

        # A tracker logs to the terminal before it looks at its `log_level`.
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        lock = threading.Lock()

        class Tracker(codecarbon.OfflineEmissionsTracker):
            # Two at once, one by its scheduler, would both count the time since the last one.
            def _measure_power_and_energy(self) -> None:
                with lock:
                    super()._measure_power_and_energy()

            # ``flush`` reuses one of up to 0.05 s ago; its energy would go to the next window.
            def _measure_power_and_energy_if_stale(self, *_: Any, **__: Any) -> None:
                self._measure_power_and_energy()

        self._tracker: Any = Tracker(
            output_methods=[],
            output_handlers=[Output()],
            emissions_endpoint=False,
            electricitymaps_api_token=False,
            allow_multiple_runs=True,
            log_level="critical",
            measure_power_secs=15,
            tracking_mode="machine",
            country_iso_code=self._country,
            # Without a country codecarbon would fall back to the world's average.
            force_carbon_intensity_g_co2e_kwh=None if self._country else 0.0,
            # Not those of the user's codecarbon configuration.
            region=None,
            cloud_provider=None,
            cloud_region=None,
            country_2letter_iso_code=None,
        )
        self._tracker.start()
        data = self._measure()
        hardware = {
            getattr(part, "chip_part", type(part).__name__).lower(): part
            for part in self._tracker._hardware
        }
        self._sources = {name: _source(name, hardware.get(name)) for name in COMPONENTS}
        models = {name: getattr(data, f"{name}_model") for name in ("cpu", "gpu")}
        factor = f", except through the factor PUE {data.pue:g}" * (data.pue != 1)
        return MeterDescription(
            name=f"codecarbon {codecarbon.__version__}",
            scope="the whole machine, including everything else that ran on it; disks, network, fans, "
            f"power supply losses and cooling are not included{factor}",
            # NVML renews its counter so often; the load model sees ticks of 0.01 s.
            resolution_seconds=0.1,
            sources=self._sources,
            hardware={name: str(model) for name, model in models.items() if model},
            country=self._country,
        )

    def read(self) -> EnergyReading:
        """Return the energy since `start`; a component that the meter lacks is None."""
        data = self._measure()
        joules = {
            name: getattr(data, f"{name}_energy") * JOULES_PER_KWH
            for name, source in self._sources.items()
            if source.kind != "none"
        }
        total = data.energy_consumed * JOULES_PER_KWH
        emissions = data.emissions if self._country else None
        return EnergyReading(None, Joules(**joules, total=total), emissions)

    def stop(self) -> None:
        self._tracker.stop()

    def _measure(self) -> EmissionsData:
        self._latest = None
        self._tracker.flush()
        if self._latest is None:
            raise RuntimeError("codecarbon returned no measurement")
        return self._latest


def _source(name: str, part: Any) -> ComponentSource:
    """Say where the power of a component comes from, by codecarbon's object for it or None."""
    if part is None:
        return ComponentSource("none", f"codecarbon found no {name} to measure")
    mode = getattr(part, "_mode", type(part).__name__)
    if mode in _COUNTERS:
        return ComponentSource("measured", _COUNTERS[mode])
    if mode == "GPU":
        devices = part.devices.devices
        library = "NVML" if "Nvidia" in type(devices[0]).__name__ else "AMD SMI"
        counted = all(getattr(card, "_has_counter", False) for card in devices)
        means = "energy counter" if counted else "power, sampled each second"
        count = len(part._get_gpu_ids())
        return ComponentSource("measured", f"{library} {means} of {count} device(s)")
    if mode == "RAM":
        watts = f"{part.total_power().W:g} W"
        if part._force_ram_power is not None:
            return ComponentSource("constant", f"{watts}, forced by the user")
        words = f"codecarbon's constant for the installed memory: {watts}, regardless of load"
        return ComponentSource("modelled", words)
    if mode not in ("constant", "cpu_load"):
        return ComponentSource("modelled", f"codecarbon's {mode}")
    origin = "thermal design power from codecarbon's table, or forced by the user"
    if part._is_generic_tdp:
        origin = "codecarbon's constant for an unknown processor"
    watts = f"{part._tdp:g} W ({origin})"
    if mode == "constant":
        return ComponentSource("constant", f"half of {watts}")
    cores = psutil.cpu_count() or 1
    model = f"codecarbon's load model: {watts} x (0.1 + 0.9 x load^3), the load being that of all"
    idle = f"{cores} cores: an idle machine counts as 10 % of it, one busy core as"
    words = f"{model} {idle} {10 + 90 / cores**3:.4g} %; no counter was readable"
    return ComponentSource("modelled", words)


class EnergyMonitor:
    """Measures named windows, which may nest and overlap, with a meter that may fail.

    What a window took is the difference of the meter's counters. Failures of the meter raise no
    errors: `failures` has one sentence for each, as have the notes of the readings.

    Args:
        meter: The meter, which the first window starts. None where another process meters the
            machine: only time is measured.
        clock: Returns seconds.

    Attributes:
        meters: Whether there is a meter, also one that failed since.
        required: Components that have to be measured before a total is given, such as ``gpu``.
    """

    def __init__(
        self,
        meter: CodecarbonMeter | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.failures: list[str] = []
        self.required: set[str] = set()
        self.meters = meter is not None
        self.clock = clock
        self._meter, self._running = meter, False
        self._description: MeterDescription | None = None
        self._open: dict[str, EnergyReading] = {}
        # What no open window holds.
        self._apart = EnergyReading(0.0, Joules(0.0, 0.0, 0.0, 0.0), 0.0)
        if not self.meters:
            self.failures.append("another process of this machine meters it")

    def start(self) -> None:
        """Start the meter if it does not run; one that failed is not tried again."""
        if self._meter is not None and not self._running:
            description = self._ask(self._meter.start, "did not start")
            self._description = description or self._description
            self._running = description is not None

    def stop(self) -> None:
        """Stop the meter. A later window starts it again."""
        if self._meter is not None and self._running:
            self._running = False
            self._ask(self._meter.stop, "failed when it was stopped")

    def describe(self) -> MeterDescription | None:
        """Return what the numbers are, or None if the meter never ran."""
        return self._description

    def begin_window(self, name: str) -> None:
        self.start()
        self._open[name] = self._counters()

    def end_window(self, name: str, *, apart: bool = False) -> EnergyReading:
        """Close a window and return what it took; if `apart`, exclude it from open windows."""
        took = self._counters() - self._open.pop(name)
        if apart:
            self._apart = add_up([self._apart, took])
        return self._checked(took)

    def _counters(self) -> EnergyReading:
        counters = EnergyReading()
        if self._meter is not None and self._running:
            counters = self._ask(self._meter.read, "died") or counters
        return replace(counters, seconds=self.clock()) - self._apart

    def _checked(self, took: EnergyReading) -> EnergyReading:
        """Return a difference of counters without figures that are not measurements."""
        if took.joules.total is None:
            note = (self.failures or ["the meter did not run"])[-1]
            return EnergyReading(took.seconds, notes=(note,))
        parts = asdict(took.joules)
        notes = [
            f"the meter counted {part:g} J for {name} in {took.seconds:.3f} s: not measured, "
            "so no total is given"
            for name, part in parts.items()
            if part is not None and part <= 0
        ] + [
            f"the model runs on a {name} that the meter does not see, so no total is given"
            for name in sorted(self.required)
            if parts[name] is None
        ]
        if not notes:
            return took
        measured = {name: part for name, part in parts.items() if part and part > 0}
        joules = Joules(**measured | {"total": None})
        return EnergyReading(took.seconds, joules, notes=tuple(notes))

    def _ask(self, call: Callable[[], Any], failure: str) -> Any:
        """Return what the meter answers; one that fails is not asked again."""
        try:
            return call()
        except Exception as error:  # noqa: BLE001
            self._meter, self._running = None, False
            note = f"the meter {failure}: {error or type(error).__name__}"
            self.failures.append(note)
            logger.warning("Energy is no longer measured: %s.", note)
            return None


def meters_the_machine() -> bool:
    """Whether this process is the one that meters its machine: the first of its launcher."""
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return rank == "0"
