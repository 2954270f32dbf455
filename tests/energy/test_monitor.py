"""Windows, units and failures of `lm_eval_pruned.energy`, on meters of known power."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from lm_eval_pruned.energy.meter import EnergyMonitor, meters_the_machine
from lm_eval_pruned.energy.readings import EnergyReading, Joules
from tests.helpers.meters import Clock, monitor_of


watts = st.floats(0.01, 1000)
seconds = st.floats(0.001, 10_000)


def windows(monitor, clock, *durations):
    """Return the readings of windows one after the other."""
    readings = []
    for duration in durations:
        monitor.begin_window("w")
        clock.sleep(duration)
        readings.append(monitor.end_window("w"))
    return readings


@given(cpu=watts, gpu=watts, duration=seconds, kg_per_kwh=st.floats(0.001, 2))
def test_energy_is_power_times_seconds_in_each_unit(cpu, gpu, duration, kg_per_kwh):
    (reading,) = windows(*monitor_of({"cpu": cpu, "gpu": gpu}, kg_per_kwh), duration)
    total, record = (cpu + gpu) * duration, reading.as_dict()
    joules = {"cpu": cpu * duration, "gpu": gpu * duration, "ram": None, "total": total}
    assert record.pop("joules") == pytest.approx(joules)
    expected = {"seconds": duration, "kwh": total / 3.6e6, "mean_watts": cpu + gpu}
    expected["emissions_kg_co2e"] = total / 3.6e6 * kg_per_kwh
    expected["carbon_intensity_g_co2e_per_kwh"] = 1000 * kg_per_kwh
    assert record == pytest.approx(expected)


@given(st.lists(st.tuples(seconds, st.booleans()), min_size=1, max_size=6), watts)
def test_windows_nest_and_hold_all_but_what_is_measured_apart(parts, power):
    monitor, clock = monitor_of({"cpu": power, "ram": 1.0}, 0.4)
    monitor.begin_window("outer")
    inside = 0.0
    for duration, apart in parts:
        monitor.begin_window("part")
        clock.sleep(duration)
        reading = monitor.end_window("part", apart=apart)
        assert reading.joules.cpu == pytest.approx(power * duration, rel=1e-6)
        inside += 0 if apart else duration
    window = monitor.end_window("outer")
    slack = 1e-6 * clock()
    assert window.seconds == pytest.approx(inside, abs=slack)
    if inside:
        joules = window.joules.total, window.emissions_kg * 3.6e6 / 0.4
        expected = pytest.approx((power + 1) * inside, abs=slack * (power + 1))
        assert joules == (expected, expected)


def test_a_stretch_apart_too_short_for_the_meter_costs_the_window_nothing():
    monitor, clock = monitor_of({"cpu": 5.0, "gpu": [(0.0, 0.0), (1.0, 100.0)]})
    monitor.begin_window("outer")
    monitor.begin_window("part")
    clock.sleep(0.5)
    assert monitor.end_window("part", apart=True).joules.gpu is None
    clock.sleep(1.5)
    expected = EnergyReading(1.5, Joules(cpu=7.5, gpu=100.0, total=107.5))
    assert monitor.end_window("outer") == expected


@pytest.mark.parametrize(
    ("power", "required", "expected", "note"),
    [
        ({"cpu": 5.0}, (), Joules(cpu=10.0, total=10.0), None),
        # The meter knows a GPU, and its counter does not move.
        ({"cpu": 5.0, "gpu": 0.0}, (), Joules(cpu=10.0), "gpu"),
        ({"cpu": 5.0, "ram": 1.0}, ("gpu",), Joules(cpu=10.0, ram=2.0), "not see"),
        ({"cpu": 0.0, "ram": 0.0}, (), Joules(), "not measured"),
        # Counters that go backwards.
        ({"cpu": -30.0}, (), Joules(), "not measured"),
    ],
)
def test_what_was_not_measured_is_none_never_zero(power, required, expected, note):
    monitor, clock = monitor_of(power, 0.4)
    monitor.required.update(required)
    (reading,) = windows(monitor, clock, 2.0)
    assert (reading.seconds, reading.joules) == (2.0, expected)
    assert len(reading.notes) == 0 if note is None else note in reading.notes[0]
    assert (reading.emissions_kg is None) == (note is not None)


@pytest.mark.parametrize(
    ("fail_at", "totals", "failure"),
    [
        ("start", [None, None, None], "the meter did not start: no permission"),
        (4, [5.0, None, None], "the meter died: the sensor is gone"),
        ("stop", [5.0] * 3, "the meter failed when it was stopped: would not stop"),
    ],
)
def test_a_meter_that_fails_raises_nothing_and_is_not_asked_again(
    fail_at, totals, failure, caplog
):
    monitor, clock = monitor_of({"cpu": 5.0}, fail_at=fail_at)
    # The second stretch lies within another window.
    readings = windows(monitor, clock, 1.0)
    monitor.begin_window("outer")
    readings += windows(monitor, clock, 1.0, 1.0)
    outer = monitor.end_window("outer")
    monitor.stop()
    assert [reading.joules.total for reading in readings] == totals
    assert outer.joules.total == (10.0 if fail_at == "stop" else None)
    assert monitor.failures == [failure]
    assert failure in caplog.text
    for reading in readings:
        notes = () if reading.joules.total else (failure,)
        assert (reading.seconds, reading.notes) == (1.0, notes)


def test_a_monitor_starts_again_after_a_stop():
    monitor, clock = monitor_of({"cpu": 5.0})
    meter = monitor._meter
    for starts in (1, 2):
        assert windows(monitor, clock, 1.0)[0].joules.total == 5.0
        monitor.stop()
        assert (meter.starts, meter.running) == (starts, False)


@pytest.mark.parametrize(
    ("local_rank", "slurm", "expected"),
    [("", "", True), ("0", "3", True), ("1", "", False), ("", "3", False)],
)
def test_one_process_of_a_launcher_meters_its_machine(
    monkeypatch, local_rank, slurm, expected
):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("SLURM_LOCALID", slurm)
    assert meters_the_machine() is expected
    # The others measure time.
    clock = Clock()
    (found,) = windows(EnergyMonitor(None, clock), clock, 2.0)
    note = "another process of this machine meters it"
    assert found == EnergyReading(2.0, notes=(note,))


@given(watts, watts, seconds, seconds)
def test_net_is_gross_minus_idle_and_may_be_negative(idle_watts, run_watts, wait, run):
    power = {"cpu": [(0.0, idle_watts), (wait, run_watts)]}
    idle, gross = windows(*monitor_of(power), wait, run)
    record = gross.as_dict(idle)
    assert record["idle_joules"]["cpu"] == pytest.approx(idle_watts * run)
    net, slack = record["net_joules"], 1e-6 * (run_watts + idle_watts) * run
    assert net["gpu"] is None
    for part in ("cpu", "total"):
        assert net[part] == pytest.approx((run_watts - idle_watts) * run, abs=slack)
