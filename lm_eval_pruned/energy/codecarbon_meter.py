"""codecarbon as a `lm_eval_pruned.energy.monitor.Meter`: machine-wide, offline, silent.

codecarbon's ``stop()`` and ``flush()`` return *emissions* in kg CO2e. Energy is read
from the `EmissionsData` that it hands to an output handler, field
``energy_consumed`` and the components beside it, in kWh.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Any

import psutil

from lm_eval_pruned.energy.monitor import ComponentSource, MeterDescription, MeterSample
from lm_eval_pruned.energy.readings import COMPONENTS, joules_from_kwh


if TYPE_CHECKING:
    from codecarbon.output_methods.emissions_data import EmissionsData

#: Seconds between codecarbon's own measurements; load and power are sampled each second.
MEASURE_SECONDS = 15
#: How old a figure may be at the edge of a window, in seconds: NVML renews its counter
#: within this time, and the load model sees ticks of 0.01 s.
RESOLUTION_SECONDS = 0.1
#: Where codecarbon says it is when it could not find out (`GeoMetadata.from_geo_js`).
_LOCATION_UNKNOWN = ("CAN", 46.8, -71.2)

logger = logging.getLogger("lm_eval.pruned.energy")


def check_country(country: str) -> str:
    """Return an ISO 3166 alpha-3 country code in capitals.

    Raises:
        ValueError: codecarbon has no carbon intensity for it.
    """
    from codecarbon.input import DataSource

    known = DataSource().get_global_energy_mix_data()
    code = str(country).upper()
    if code not in known:
        raise ValueError(
            f"energy_country={country} is no country that codecarbon knows a carbon intensity "
            "of: pass an ISO 3166 alpha-3 code such as FRA, USA or ESP."
        )
    return code


class CodecarbonMeter:
    """Counts the energy of this machine with codecarbon.

    It writes no file and uses no network unless `online`. The settings
    ``force_cpu_power``, ``force_ram_power``, ``pue`` and ``rapl_*`` of the user's codecarbon
    configuration apply, and the description says so.

    Args:
        country: ISO 3166 alpha-3 code whose carbon intensity gives the emissions; None
            leaves them out.
        online: Let codecarbon ask the network where it is instead.

    Source: codecarbon 3.3.2, `emissions_tracker.py`, `core/resource_tracker.py`.
    """

    def __init__(self, country: str | None = None, online: bool = False) -> None:
        self._country = country
        self._online = online
        self._tracker: Any = None
        self._latest: EmissionsData | None = None
        self._log = _LogKeeper()

    def start(self) -> None:
        """Start a tracker and take a first measurement.

        Raises:
            RuntimeError: codecarbon did not start, or measured nothing.
        """
        import codecarbon

        base = (
            codecarbon.EmissionsTracker
            if self._online
            else codecarbon.OfflineEmissionsTracker
        )
        arguments: dict[str, Any] = {
            "output_methods": [],
            "output_handlers": [self],
            "emissions_endpoint": False,
            "electricitymaps_api_token": False,
            "allow_multiple_runs": True,
            "api_call_interval": -1,
            "log_level": "warning",
            "measure_power_secs": MEASURE_SECONDS,
            "tracking_mode": "machine",
        }
        if not self._online:
            arguments |= {
                "country_iso_code": self._country,
                "region": None,
                "cloud_provider": None,
                "cloud_region": None,
                "country_2letter_iso_code": None,
                # Without a country codecarbon would fall back to the world's average.
                "force_carbon_intensity_g_co2e_kwh": None if self._country else 0.0,
            }
        self._log.take_over()
        self._tracker = _with_fresh_readings(base)(**arguments)
        # Constructing a tracker puts codecarbon's own handler back.
        self._log.take_over()
        self._tracker.start()
        self.read()

    def read(self) -> MeterSample:
        """Return the energy since `start`.

        Raises:
            RuntimeError: codecarbon measured nothing. It catches its own exceptions and
                logs them, so that the log is the only place to learn why.
        """
        self._latest = None
        self._tracker.flush()
        data = self._latest
        if data is None:
            raise RuntimeError(
                self._log.latest or "codecarbon handed out no measurement"
            )
        located = self._located(data)
        return MeterSample(
            {
                name: joules_from_kwh(getattr(data, f"{name}_energy"))
                for name, source in self._sources().items()
                if source.kind != "none"
            },
            joules_from_kwh(data.energy_consumed),
            data.emissions if located else None,
            self._counters(),
        )

    def _counters(self) -> dict[str, dict[str, float]]:
        """Return the energy counters of single GPUs, which codecarbon only adds up."""
        counters: dict[str, dict[str, float]] = {}
        for hardware in self._tracker._hardware:
            if type(hardware).__name__ == "GPU":
                counters["gpu"] = {
                    f"GPU {device.gpu_index}": joules_from_kwh(device.last_energy.kWh)
                    for device in _watched(hardware)
                    # Without a counter codecarbon samples the power. Of two chips on one
                    # card AMD counts on the first.
                    if device._has_counter
                    and not device._use_power_fallback
                    and not device._reports_zero_power_by_design()
                }
        return counters

    def stop(self) -> None:
        """Stop the tracker."""
        tracker, self._tracker = self._tracker, None
        try:
            tracker.stop()
        finally:
            self._log.hand_back()

    def describe(self) -> MeterDescription:
        """Say which hardware is metered by which means."""
        import codecarbon

        found = self._tracker.get_detected_hardware()
        pue = getattr(self._tracker, "_pue", 1.0)
        located = self._latest is not None and self._located(self._latest)
        return MeterDescription(
            name=f"codecarbon {codecarbon.__version__}",
            scope=(
                "the whole machine, with whatever else ran on it; disks, network, fans, power "
                "supply losses and cooling are not in it"
                + (f", except through the factor PUE {pue:g}" if pue != 1 else "")
            ),
            resolution_seconds=RESOLUTION_SECONDS,
            sources=self._sources(),
            hardware={
                name: str(model)
                for name in ("cpu", "gpu")
                if (model := found.get(f"{name}_model"))
            },
            country=self._latest.country_iso_code
            if located and self._latest is not None
            else None,
        )

    def _located(self, data: EmissionsData) -> bool:
        if not self._online:
            return self._country is not None
        place = (data.country_iso_code, data.latitude, data.longitude)
        return place != _LOCATION_UNKNOWN

    def _sources(self) -> dict[str, ComponentSource]:
        sources = {}
        for hardware in self._tracker._hardware:
            part = getattr(hardware, "chip_part", type(hardware).__name__).lower()
            if part in COMPONENTS:
                sources[part] = _source(hardware)
        for name in COMPONENTS:
            sources.setdefault(
                name, ComponentSource("none", f"codecarbon found no {name} to measure")
            )
        return {name: sources[name] for name in COMPONENTS}

    # codecarbon calls these on its output handlers; live_out and task_out are not used here.

    def out(self, total: EmissionsData, delta: EmissionsData) -> None:
        """Receive the totals of a measurement from codecarbon."""
        self._latest = total

    def live_out(self, total: EmissionsData, delta: EmissionsData) -> None:
        """Receive a periodic measurement from codecarbon: not used."""

    def task_out(self, data: list[Any], experiment_name: str) -> None:
        """Receive the tasks of a tracker from codecarbon: not used."""

    def exit(self) -> None:
        """Learn that the tracker stopped: nothing to close."""


def _with_fresh_readings(base: type) -> type:
    """Return `base` with measurements that are fresh and come one at a time.

    Its scheduler measures in a thread of its own; two measurements at once would both
    count the time since the last one. ``flush`` reuses a measurement of up to 0.05 s ago,
    and would move energy from one window into the next.
    """
    lock = threading.Lock()

    class Tracker(base):  # type: ignore[misc, valid-type]
        def _measure_power_and_energy(self) -> None:
            with lock:
                super()._measure_power_and_energy()

        def _measure_power_and_energy_if_stale(self, *args: Any, **kwargs: Any) -> None:
            self._measure_power_and_energy()

    return Tracker


def _source(hardware: Any) -> ComponentSource:
    kind = type(hardware).__name__
    if kind == "RAM":
        return _ram_source(hardware)
    if kind == "CPU":
        return _cpu_source(hardware)
    if kind == "GPU":
        return _gpu_source(hardware)
    if kind == "AppleSiliconChip":
        return ComponentSource("measured", "powermetrics")
    if kind == "Raspberry":
        return ComponentSource("measured", "power rails of the Raspberry Pi")
    return ComponentSource("modelled", f"codecarbon's {kind}, unknown to this package")


def load_factor(load: float) -> float:
    """Return the share of the design power that codecarbon's load model counts.

    Args:
        load: Mean load of all cores, from 0 to 1.

    Source: codecarbon 3.3.2, `external/hardware.py`, `CPU._get_power_from_cpu_load`, for
    every processor. (`_calculate_power_from_cpu_load`, with other curves, is not called.)
    """
    return 0.1 + 0.9 * load**3


def _cpu_source(cpu: Any) -> ComponentSource:
    mode = cpu._mode
    counters = {
        "intel_rapl": "RAPL energy counters of the processor packages",
        "windows_emi": "RAPL energy counters through the Windows Energy Meter Interface",
        "intel_power_gadget": "Intel Power Gadget",
    }
    if mode in counters:
        return ComponentSource("measured", counters[mode])
    watts = f"{cpu._tdp:g} W"
    origin = (
        "codecarbon's constant for a processor that it does not know"
        if cpu._is_generic_tdp
        else "thermal design power from codecarbon's table, or forced by the user"
    )
    if mode == "constant":
        return ComponentSource("constant", f"half of {watts} ({origin})")
    if mode == "cpu_load":
        cores = psutil.cpu_count() or 1
        return ComponentSource(
            "modelled",
            f"codecarbon's load model: {watts} ({origin}) x (0.1 + 0.9 x load^3), the load being "
            f"that of all {cores} cores: an idle machine counts as {100 * load_factor(0):.4g} % "
            f"of it, one busy core as {100 * load_factor(1 / cores):.4g} %; no counter was "
            "readable",
        )
    return ComponentSource("modelled", f"codecarbon's mode {mode}")


def _watched(gpu: Any) -> list[Any]:
    watched = set(gpu._get_gpu_ids())
    return [d for d in gpu.devices.devices if d.gpu_index in watched]


def _gpu_source(gpu: Any) -> ComponentSource:
    devices = _watched(gpu)
    interface = (
        "NVML"
        if any("nvidia" in type(d).__name__.lower() for d in devices)
        else "AMD SMI"
    )
    counted = all(getattr(d, "_has_counter", False) for d in devices)
    how = "energy counter" if counted else "power, sampled each second"
    return ComponentSource("measured", f"{interface} {how} of {len(devices)} device(s)")


def _ram_source(ram: Any) -> ComponentSource:
    watts = ram.total_power().W
    if ram._force_ram_power is not None:
        return ComponentSource("constant", f"{watts:g} W, forced by the user")
    return ComponentSource(
        "modelled",
        f"codecarbon's constant for the installed memory: {watts:g} W, whatever the load",
    )


class _LogKeeper(logging.Handler):
    """Takes codecarbon's log off the terminal: it goes to the harness's log, at debug level."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.latest: str | None = None
        self._theirs: tuple[list[logging.Handler], int] | None = None

    def take_over(self) -> None:
        log = logging.getLogger("codecarbon")
        if self._theirs is None:
            self._theirs = (log.handlers, log.level)
        log.handlers = [self]
        log.setLevel(logging.WARNING)

    def hand_back(self) -> None:
        if self._theirs is not None:
            log = logging.getLogger("codecarbon")
            log.handlers, level = self._theirs
            log.setLevel(level)
            self._theirs = None

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip()
        with contextlib.suppress(TypeError, IndexError):
            if record.exc_info and record.exc_info[1] is not None:
                error = record.exc_info[1]
                self.latest = f"{type(error).__name__}: {error}"
        logger.debug("codecarbon: %s", text)
