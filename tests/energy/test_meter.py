"""The codecarbon meter: what it reads, what it never does, and how it fails."""

from __future__ import annotations

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import SimpleNamespace
from typing import ClassVar

import codecarbon
import pytest
from codecarbon.external import hardware
from codecarbon.external.logger import set_logger_format, set_logger_level

from lm_eval_pruned.energy.meter import CodecarbonMeter, EnergyMonitor
from tests.helpers import checkpoints


EMISSIONS_OF_STOP = 1234.5


def part(kind, mode=None, tdp=None, *, watts=None, forced=None, counters=(), generic=0):
    """Return what codecarbon has for a component: ``CPU``, ``RAM`` or ``GPU``."""
    devices = [type("NvidiaGPU", (), {"_has_counter": each})() for each in counters]
    found = type(kind, (), {})()
    found.__dict__ |= {"_tdp": tdp, "_is_generic_tdp": generic}
    found.__dict__ |= {"_force_ram_power": forced, "_get_gpu_ids": lambda: devices}
    found.total_power = lambda: SimpleNamespace(W=watts)
    found.devices = SimpleNamespace(devices=devices)
    if kind == "CPU":
        found._mode, found.chip_part = mode, "CPU"
    return found


class FakeTracker:
    """A tracker with the interface of codecarbon's, whose figures are all different."""

    made: ClassVar[list[FakeTracker]] = []
    hardware: ClassVar = [part("RAM", watts=20.0), part("CPU", "cpu_load", 100.0)]

    def __init__(self, **arguments):
        self.arguments, self._hardware, self.kwh = arguments, self.hardware, 0.0
        self.inside = self.most = 0
        FakeTracker.made.append(self)

    def start(self):
        pass

    def _measure_power_and_energy_if_stale(self):
        raise AssertionError("a stale measurement was reused")

    def _measure_power_and_energy(self):
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.01)
        self.inside -= 1
        self.kwh += 0.001

    def flush(self):
        self._measure_power_and_energy_if_stale()
        parts = {"cpu": 0.75 * self.kwh, "gpu": 0.0, "ram": 0.25 * self.kwh}
        data = {f"{name}_energy": kwh for name, kwh in parts.items()}
        data |= {"energy_consumed": self.kwh, "emissions": 0.2 * self.kwh}
        data |= {"cpu_model": "Abacus", "gpu_model": "", "pue": 1.0}
        self.arguments["output_handlers"][0].out(SimpleNamespace(**data), None)
        return EMISSIONS_OF_STOP

    def stop(self):
        return EMISSIONS_OF_STOP


@pytest.fixture
def fake_tracker(monkeypatch):
    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", FakeTracker)
    FakeTracker.made.clear()


def window(meter, seconds=0.0):
    monitor = EnergyMonitor(meter)
    monitor.begin_window("w")
    time.sleep(seconds)
    reading = monitor.end_window("w")
    monitor.stop()
    return reading, monitor.describe(), monitor


@pytest.mark.parametrize("country", ["ESP", None])
def test_energy_is_energy_consumed_and_never_what_stop_returns(fake_tracker, country):
    reading, description, monitor = window(CodecarbonMeter(country))
    joules = 0.001 * 3.6e6
    assert asdict(reading.joules) == pytest.approx(
        {"cpu": 0.75 * joules, "gpu": None, "ram": 0.25 * joules, "total": joules}
    )
    assert reading.emissions_kg == (pytest.approx(0.2 * 0.001) if country else None)
    assert description.country == country
    assert description.hardware == {"cpu": "Abacus"}
    assert not monitor.failures
    assert FakeTracker.made[0].arguments["tracking_mode"] == "machine"


@pytest.mark.parametrize("method", ["__init__", "flush"])
def test_what_codecarbon_swallows_is_noticed(fake_tracker, monkeypatch, method):
    monkeypatch.setattr(FakeTracker, method, lambda self, **_: None)
    reading, description, monitor = window(CodecarbonMeter())
    assert reading.joules.total is description is None
    assert monitor.failures


@pytest.mark.parametrize(
    ("part", "kind", "words"),
    [
        (part("CPU", "intel_rapl"), "measured", "RAPL"),
        (part("CPU", "cpu_load", 120.0), "modelled", "one busy core as 10.02 %"),
        (part("CPU", "cpu_load", 85, generic=True), "modelled", "an unknown processor"),
        (part("CPU", "constant", 85, generic=True), "constant", "half of 85 W"),
        (part("CPU", "something_new", 85), "modelled", "something_new"),
        (part("RAM", watts=20.0), "modelled", "20 W"),
        (part("RAM", watts=7.0, forced=7.0), "constant", "7 W"),
        (part("GPU", counters=[True]), "measured", "NVML energy counter of 1"),
        (part("GPU", counters=[True, False]), "measured", "power"),
    ],
)
def test_each_source_is_named(fake_tracker, monkeypatch, part, kind, words):
    monkeypatch.setattr("psutil.cpu_count", lambda: 16)
    monkeypatch.setattr(FakeTracker, "hardware", [part])
    sources = CodecarbonMeter().start().sources
    found = sources.pop(type(part).__name__.lower())
    assert found.kind == kind
    assert words in found.description
    assert {source.kind for source in sources.values()} == {"none"}


@pytest.mark.parametrize("load", [0.0, 1 / 16, 0.5, 1.0])
def test_the_load_model_is_the_installed_codecarbons(monkeypatch, load):
    cpu = hardware.CPU(output_dir="", mode="cpu_load", model="Intel Xeon", tdp=200)
    monkeypatch.setattr(cpu._cpu_load_meter, "percent", lambda: 100 * load)
    assert pytest.approx(200 * (0.1 + 0.9 * load**3)) == cpu.total_power().W
    if load < 1:
        page = (checkpoints.ROOT / "docs" / "energy.md").read_text("utf-8")
        assert f"{10 + 90 * load**3:.4g} %" in page


def test_measurements_come_one_at_a_time_and_fresh(fake_tracker):
    CodecarbonMeter().start()
    (tracker,) = FakeTracker.made
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: tracker.flush(), range(4)))
    assert tracker.most == 1
    assert tracker.kwh == pytest.approx(0.005)


@pytest.mark.parametrize("country", ["FRA", None])
def test_the_real_codecarbon_stays_off_the_network_the_disk_and_the_terminal(
    country, tmp_path, monkeypatch, capfd
):
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("the network is off limits in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    # As after its import, with a handler that writes where this test looks.
    monkeypatch.setattr(logging.getLogger("codecarbon"), "handlers", [])
    set_logger_format()
    set_logger_level("INFO")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".codecarbon.config").write_text(
        "[codecarbon]\nsave_to_api=true\nsave_to_file=true\noutput_methods=csv,api\n"
        "electricitymaps_api_token=secret\nlog_level=debug\ncountry_iso_code=POL\n"
    )
    reading, description, monitor = window(CodecarbonMeter(country), seconds=0.3)
    assert monitor.failures == attempts == []
    assert [path.name for path in tmp_path.iterdir()] == [".codecarbon.config"]
    assert capfd.readouterr() == ("", "")
    joules = asdict(reading.joules)
    total = joules.pop("total")
    assert total == pytest.approx(sum(filter(None, joules.values())), rel=1e-6)
    intensity = reading.as_dict()["carbon_intensity_g_co2e_per_kwh"]
    assert 10 < intensity < 200 if country else intensity is None
    for name, source in description.sources.items():
        assert (source.kind == "none") == (joules[name] is None)
