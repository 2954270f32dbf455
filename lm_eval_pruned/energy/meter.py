"""codecarbon as a meter: machine-wide, offline, silent.

Its ``stop()`` and ``flush()`` return *emissions* in kg CO2e. Energy is ``energy_consumed`` and the
components beside it, in kWh, of the `EmissionsData` that it hands to an output.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import psutil

from lm_eval_pruned.energy.readings import (
    COMPONENTS,
    JOULES_PER_KWH,
    EnergyReading,
    Joules,
)


if TYPE_CHECKING:
    from codecarbon.output_methods.emissions_data import EmissionsData

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
