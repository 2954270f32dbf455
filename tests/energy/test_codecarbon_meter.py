"""The codecarbon meter: what it reads, what it never does, and how it fails."""

from __future__ import annotations

import logging
import socket
import threading
import time
from types import SimpleNamespace
from typing import ClassVar

import codecarbon
import pytest
from codecarbon.external import hardware

from lm_eval_pruned.energy.meter import (
    CodecarbonMeter,
    _source,
    _with_fresh_readings,
    check_country,
)
from lm_eval_pruned.energy.monitor import EnergyMonitor
from tests.helpers import checkpoints


EMISSIONS_OF_STOP = 1234.5


class FakeTracker:
    """A tracker with the interface of codecarbon's, whose figures are all different."""

    made: ClassVar[list[FakeTracker]] = []

    def __init__(self, **arguments):
        self.arguments = arguments
        self._hardware = [RAM(20.0), CPU("cpu_load", 100.0)]
        self.kwh = 0.0
        self.place = ("ESP", 40.0, -3.0)
        FakeTracker.made.append(self)

    def start(self):
        pass

    def flush(self):
        self.kwh += 0.001
        self.arguments["output_handlers"][0].out(
            SimpleNamespace(
                cpu_energy=0.75 * self.kwh,
                gpu_energy=0.0,
                ram_energy=0.25 * self.kwh,
                energy_consumed=self.kwh,
                emissions=0.2 * self.kwh,
                cpu_model="Abacus",
                gpu_model="",
                pue=1.0,
                country_iso_code=self.place[0],
                latitude=self.place[1],
                longitude=self.place[2],
            ),
            None,
        )
        return EMISSIONS_OF_STOP

    def stop(self):
        return EMISSIONS_OF_STOP


class CPU:
    def __init__(self, mode, tdp, generic=False):
        self._mode, self._tdp, self._is_generic_tdp = mode, tdp, generic


class RAM:
    def __init__(self, watts, forced=None):
        self._watts, self._force_ram_power = watts, forced

    def total_power(self):
        return SimpleNamespace(W=self._watts)


class NvidiaGPUDevice:
    def __init__(self, index, counter):
        self.gpu_index, self._has_counter = index, counter


class GPU:
    def __init__(self, *devices):
        self.devices = SimpleNamespace(devices=list(devices))

    def _get_gpu_ids(self):
        return [device.gpu_index for device in self.devices.devices]


@pytest.fixture
def fake_tracker(monkeypatch):
    monkeypatch.setattr(codecarbon, "OfflineEmissionsTracker", FakeTracker)
    FakeTracker.made.clear()


@pytest.fixture
def no_network(monkeypatch):
    """Fail on any use of a socket that could leave this machine; return the attempts."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("the network is off limits in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return attempts


def window(meter, seconds=0.0):
    monitor = EnergyMonitor(meter)
    monitor.begin_window("w")
    time.sleep(seconds)
    reading = monitor.end_window("w")
    description = monitor.describe()
    monitor.stop()
    return reading, description, monitor


def test_energy_is_energy_consumed_and_never_what_stop_or_flush_return(fake_tracker):
    reading, _, monitor = window(CodecarbonMeter("ESP"))
    assert reading.joules.total == pytest.approx(0.001 * 3.6e6)
    assert reading.joules.cpu == pytest.approx(0.75 * reading.joules.total)
    assert reading.joules.ram == pytest.approx(0.25 * reading.joules.total)
    assert reading.joules.gpu is None
    assert reading.emissions_kg == pytest.approx(0.2 * 0.001)
    assert reading.as_dict()["carbon_intensity_g_co2e_per_kwh"] == pytest.approx(200.0)
    assert not monitor.failures
    figures = [
        *reading.joules.as_dict().values(),
        reading.emissions_kg,
        reading.as_dict()["kwh"],
    ]
    for wrong in (EMISSIONS_OF_STOP, EMISSIONS_OF_STOP * 3.6e6):
        assert wrong not in figures


def test_without_a_country_there_are_no_emissions_and_the_same_energy(fake_tracker):
    reading, description, _ = window(CodecarbonMeter())
    assert reading.emissions_kg is None
    assert description.country is None
    assert reading.joules.total == pytest.approx(0.001 * 3.6e6)


def test_codecarbon_is_told_to_write_and_send_nothing(fake_tracker):
    window(CodecarbonMeter("ESP"))
    arguments = FakeTracker.made[0].arguments
    assert arguments["output_methods"] == []
    assert arguments["emissions_endpoint"] is False
    assert arguments["electricitymaps_api_token"] is False
    assert arguments["tracking_mode"] == "machine"


@pytest.mark.parametrize("method", ["__init__", "start", "flush"])
def test_what_codecarbon_swallows_is_noticed(fake_tracker, monkeypatch, method):
    def swallow(self, *args, **kwargs):
        try:
            raise PermissionError("energy_uj cannot be read")
        except PermissionError:
            logging.getLogger("codecarbon").warning("graceful shutdown", exc_info=True)

    if method != "start":
        monkeypatch.setattr(FakeTracker, method, swallow)
    else:
        monkeypatch.setattr(FakeTracker, "start", swallow)
        monkeypatch.setattr(FakeTracker, "flush", lambda self: None)
    reading, description, monitor = window(CodecarbonMeter())
    assert reading.joules.total is None
    assert description is None
    assert monitor.failures


@pytest.mark.parametrize(
    ("part", "kind", "words"),
    [
        (CPU("intel_rapl", None), "measured", "RAPL"),
        (CPU("cpu_load", 120.0), "modelled", "120 W"),
        (CPU("cpu_load", 120.0), "modelled", "x (0.1 + 0.9 x load^3)"),
        (CPU("cpu_load", 85, generic=True), "modelled", "does not know"),
        (CPU("constant", 85, generic=True), "constant", "half of 85 W"),
        (CPU("something_new", 85), "modelled", "something_new"),
        (RAM(20.0), "modelled", "20 W"),
        (RAM(7.0, forced=7.0), "constant", "7 W"),
        (GPU(NvidiaGPUDevice(0, True)), "measured", "NVML energy counter of 1"),
        (GPU(NvidiaGPUDevice(0, True), NvidiaGPUDevice(1, False)), "measured", "power"),
    ],
)
def test_each_source_is_named(part, kind, words):
    source = _source("part", part)
    assert source.kind == kind
    assert words in source.description


@pytest.mark.parametrize("model", ["Intel Xeon", "AMD Ryzen Threadripper 3990X"])
@pytest.mark.parametrize("load", [0.0, 1 / 16, 0.3, 0.5, 1.0])
def test_the_load_model_is_the_installed_codecarbons(monkeypatch, model, load):
    cpu = hardware.CPU(output_dir="", mode="cpu_load", model=model, tdp=200)
    monkeypatch.setattr(cpu._cpu_load_meter, "percent", lambda: 100 * load)
    assert pytest.approx(200 * (0.1 + 0.9 * load**3)) == cpu.total_power().W


def test_one_busy_core_of_sixteen_is_said_to_look_like_an_idle_machine(monkeypatch):
    monkeypatch.setattr("psutil.cpu_count", lambda: 16)
    description = _source("cpu", CPU("cpu_load", 200.0)).description
    figures = "an idle machine counts as 10 % of it, one busy core as 10.02 %"
    assert figures in description
    page = (checkpoints.ROOT / "docs" / "energy.md").read_text("utf-8")
    assert "(0.1 + 0.9 x load^3)" in page
    for load in (0, 1 / 16, 0.5):
        assert f"{10 + 90 * load**3:.4g} %" in page


def test_measurements_come_one_at_a_time_and_fresh():
    inside, most = 0, 0
    counter = threading.Lock()

    class Base:
        def _measure_power_and_energy(self):
            nonlocal inside, most
            with counter:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            with counter:
                inside -= 1
            self.measured = True

        def _measure_power_and_energy_if_stale(self):
            raise AssertionError("a stale measurement was reused")

    tracker = _with_fresh_readings(Base)()
    threads = [
        threading.Thread(target=tracker._measure_power_and_energy_if_stale)
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tracker.measured
    assert most == 1


def test_unknown_countries_are_refused():
    assert check_country("fra") == "FRA"
    with pytest.raises(ValueError, match=r"energy_country=France.*FRA"):
        check_country("France")


def test_the_real_codecarbon_stays_off_the_network_the_disk_and_the_terminal(
    no_network, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".codecarbon.config").write_text(
        "[codecarbon]\nsave_to_api=true\nsave_to_file=true\noutput_methods=csv,api\n"
        "emissions_endpoint=http://localhost:9\nelectricitymaps_api_token=secret\n"
        "log_level=debug\ncountry_iso_code=POL\n"
    )
    reading, description, monitor = window(CodecarbonMeter("FRA"), seconds=0.3)
    assert monitor.failures == []
    assert no_network == []
    assert [path.name for path in tmp_path.iterdir()] == [".codecarbon.config"]
    assert capfd.readouterr() == ("", "")
    joules = reading.joules
    assert joules.total == pytest.approx(
        sum(part for part in (joules.cpu, joules.gpu, joules.ram) if part), rel=1e-6
    )
    assert joules.cpu > 0
    assert joules.ram > 0
    assert description.country == "FRA"
    assert 10 < reading.as_dict()["carbon_intensity_g_co2e_per_kwh"] < 200
    for name, source in description.sources.items():
        assert (source.kind == "none") == (getattr(joules, name) is None)
