"""Windows, units and failures of `lm_eval_pruned.energy`, on meters of known power."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from lm_eval_pruned.energy.monitor import EnergyMonitor
from lm_eval_pruned.energy.readings import (
    EnergyReading,
    Joules,
    add_up,
)
from tests.helpers.meters import Clock, FakeMeter


watts = st.floats(0.01, 1000)
seconds = st.floats(0.001, 10_000)


def measured(meter, clock, *durations):
    """Return one reading for each duration, from windows one after the other."""
    monitor = EnergyMonitor(meter, clock)
    readings = []
    for duration in durations:
        monitor.begin_window("w")
        clock.sleep(duration)
        readings.append(monitor.end_window("w"))
    return readings


@given(cpu=watts, gpu=watts, ram=watts, duration=seconds)
def test_constant_power_gives_watts_times_seconds_and_components_add_up(
    cpu, gpu, ram, duration
):
    clock = Clock()
    meter = FakeMeter(clock, {"cpu": cpu, "gpu": gpu, "ram": ram})
    (reading,) = measured(meter, clock, duration)
    assert reading.seconds == pytest.approx(duration)
    assert reading.joules.cpu == pytest.approx(cpu * duration)
    assert reading.joules.gpu == pytest.approx(gpu * duration)
    assert reading.joules.ram == pytest.approx(ram * duration)
    assert reading.joules.total == pytest.approx(
        reading.joules.cpu + reading.joules.gpu + reading.joules.ram
    )
    assert reading.as_dict()["mean_watts"] == pytest.approx(cpu + gpu + ram)
    assert reading.as_dict()["kwh"] * 3.6e6 == pytest.approx(reading.joules.total)
    assert reading.notes == ()


def test_stepped_power_is_integrated_over_the_window():
    clock = Clock()
    meter = FakeMeter(clock, {"cpu": [(0.0, 10.0), (4.0, 100.0), (6.0, 20.0)]})
    first, second, third = measured(meter, clock, 3.0, 2.0, 5.0)
    assert first.joules.cpu == 30.0
    assert second.joules.cpu == 10.0 + 100.0
    assert third.joules.cpu == 100.0 + 4 * 20.0


@given(st.lists(seconds, min_size=1, max_size=6), watts, watts)
def test_windows_nest_and_the_inner_ones_add_up_to_the_outer(durations, cpu, ram):
    clock = Clock()
    monitor = EnergyMonitor(FakeMeter(clock, {"cpu": cpu, "ram": ram}, 0.4), clock)
    monitor.begin_window("outer")
    inner = []
    for number, duration in enumerate(durations):
        monitor.begin_window(f"inner {number}")
        clock.sleep(duration)
        inner.append(monitor.end_window(f"inner {number}"))
    outer = monitor.end_window("outer")
    together = add_up(inner)
    assert together.seconds == pytest.approx(outer.seconds)
    assert together.joules.total == pytest.approx(outer.joules.total, rel=1e-6)
    assert together.joules.cpu == pytest.approx(outer.joules.cpu, rel=1e-6)
    assert together.emissions_kg == pytest.approx(outer.emissions_kg, rel=1e-6)


@given(watts, seconds, st.floats(0.001, 2.0))
def test_emissions_are_energy_times_carbon_intensity(cpu, duration, kg_per_kwh):
    clock = Clock()
    (reading,) = measured(FakeMeter(clock, {"cpu": cpu}, kg_per_kwh), clock, duration)
    assert reading.emissions_kg == pytest.approx(
        reading.joules.total / 3.6e6 * kg_per_kwh
    )
    assert reading.as_dict()["carbon_intensity_g_co2e_per_kwh"] == pytest.approx(
        1000 * kg_per_kwh
    )


def test_a_component_the_meter_lacks_is_none_never_zero():
    clock = Clock()
    (reading,) = measured(FakeMeter(clock, {"cpu": 5.0}), clock, 2.0)
    assert reading.joules.as_dict() == {
        "cpu": 10.0,
        "gpu": None,
        "ram": None,
        "total": 10.0,
    }
    assert reading.emissions_kg is None
    assert reading.as_dict()["carbon_intensity_g_co2e_per_kwh"] is None


def test_a_component_that_stands_still_is_not_measured():
    clock = Clock()
    (reading,) = measured(FakeMeter(clock, {"cpu": 5.0, "gpu": 0.0}), clock, 2.0)
    assert reading.joules == Joules(cpu=10.0)
    assert reading.as_dict()["mean_watts"] is None
    assert reading.emissions_kg is None
    assert "gpu" in reading.notes[0]


def test_without_a_required_component_there_is_no_total():
    clock = Clock()
    monitor = EnergyMonitor(FakeMeter(clock, {"cpu": 5.0, "ram": 1.0}, 0.4), clock)
    monitor.required.add("gpu")
    monitor.begin_window("w")
    clock.sleep(2.0)
    reading = monitor.end_window("w")
    assert reading.joules == Joules(cpu=10.0, ram=2.0)
    assert [
        reading.as_dict()[key] for key in ("kwh", "mean_watts", "emissions_kg_co2e")
    ] == [None] * 3
    assert "the meter does not see" in reading.notes[0]


@given(
    st.lists(st.tuples(seconds, st.booleans()), min_size=1, max_size=6), watts, watts
)
def test_what_is_measured_apart_is_in_no_window_around_it(parts, cpu, ram):
    clock = Clock()
    monitor = EnergyMonitor(FakeMeter(clock, {"cpu": cpu, "ram": ram}, 0.4), clock)
    monitor.begin_window("outer")
    monitor.begin_window("inner")
    inside, apart = [], []
    for duration, is_apart in parts:
        monitor.begin_window("part")
        clock.sleep(duration)
        reading = monitor.end_window("part", apart=is_apart)
        assert reading.joules.total == pytest.approx((cpu + ram) * duration, rel=1e-6)
        (apart if is_apart else inside).append(reading)
    for name in ("inner", "outer"):
        window = monitor.end_window(name)
        if not inside:
            # What is left is rounding, in time as in energy.
            assert abs(window.seconds or 0.0) <= 1e-9 * clock()
            continue
        expected = add_up(inside)
        slack = {"rel": 1e-6, "abs": 1e-6 * clock() * (cpu + ram)}
        assert window.seconds == pytest.approx(expected.seconds, **slack)
        assert window.joules.cpu == pytest.approx(expected.joules.cpu, **slack)
        assert window.joules.total == pytest.approx(expected.joules.total, **slack)
        assert window.emissions_kg == pytest.approx(expected.emissions_kg, **slack)


def test_a_stretch_apart_too_short_for_the_meter_costs_the_window_nothing():
    clock = Clock()
    meter = FakeMeter(clock, {"cpu": 5.0, "gpu": [(0.0, 0.0), (1.0, 100.0)]})
    monitor = EnergyMonitor(meter, clock)
    monitor.begin_window("outer")
    monitor.begin_window("part")
    clock.sleep(0.5)
    assert monitor.end_window("part", apart=True).joules.gpu is None
    clock.sleep(1.5)
    reading = monitor.end_window("outer")
    assert reading.seconds == 1.5
    assert reading.joules == Joules(cpu=7.5, gpu=100.0, total=107.5)


def test_a_meter_that_dies_in_a_stretch_apart_leaves_the_window_unmeasured():
    clock = Clock()
    monitor = EnergyMonitor(FakeMeter(clock, {"cpu": 5.0}, fail_at=3), clock)
    monitor.begin_window("outer")
    monitor.begin_window("part")
    clock.sleep(1.0)
    assert monitor.end_window("part", apart=True).joules == Joules()
    clock.sleep(1.0)
    reading = monitor.end_window("outer")
    assert reading.seconds == 1.0
    assert reading.joules == Joules()
    assert reading.notes == ("the meter died: the sensor is gone",)


def test_a_window_with_time_but_no_energy_is_not_measured():
    clock = Clock()
    (reading,) = measured(FakeMeter(clock, {"cpu": 0.0, "ram": 0.0}), clock, 60.0)
    assert reading.seconds == 60.0
    assert reading.joules == Joules()
    assert reading.as_dict()["mean_watts"] is None
    assert "not measured" in reading.notes[0]


def test_counters_that_go_backwards_are_not_measured():
    clock = Clock()
    meter = FakeMeter(clock, {"cpu": [(0.0, 10.0), (1.0, -30.0)]})
    _, second = measured(meter, clock, 1.0, 1.0)
    assert second.joules == Joules()


def test_a_meter_that_does_not_start_is_noted_and_asked_once(caplog):
    clock = Clock()
    meter = FakeMeter(clock, {"cpu": 5.0}, fail_at="start")
    monitor = EnergyMonitor(meter, clock)
    for _ in range(2):
        monitor.begin_window("w")
        clock.sleep(3.0)
        reading = monitor.end_window("w")
        assert reading.seconds == 3.0
        assert reading.joules == Joules()
        assert reading.notes == ("the meter did not start: no permission",)
    assert meter.starts == 1
    assert monitor.describe() is None
    assert "no permission" in caplog.text


def test_a_meter_that_dies_in_the_middle_keeps_what_it_measured():
    clock = Clock()
    monitor = EnergyMonitor(FakeMeter(clock, {"cpu": 5.0}, fail_at=4), clock)
    readings = []
    for _ in range(3):
        monitor.begin_window("w")
        clock.sleep(1.0)
        readings.append(monitor.end_window("w"))
    assert [reading.joules.total for reading in readings] == [5.0, None, None]
    assert readings[1].notes == ("the meter died: the sensor is gone",)
    assert add_up(readings).joules.total is None
    assert add_up(readings).seconds == 3.0
    monitor.stop()


def test_a_meter_that_fails_at_stop_keeps_its_readings():
    clock = Clock()
    monitor = EnergyMonitor(FakeMeter(clock, {"cpu": 5.0}, fail_at="stop"), clock)
    monitor.begin_window("w")
    clock.sleep(1.0)
    assert monitor.end_window("w").joules.total == 5.0
    monitor.stop()
    assert monitor.failures == ["the meter failed when it was stopped: would not stop"]


def test_a_stopped_monitor_starts_again():
    clock = Clock()
    meter = FakeMeter(clock, {"cpu": 5.0})
    monitor = EnergyMonitor(meter, clock)
    assert measured_once(monitor, clock) == 5.0
    monitor.stop()
    assert not meter.running
    assert measured_once(monitor, clock) == 5.0
    assert meter.starts == 2


def measured_once(monitor, clock):
    monitor.begin_window("w")
    clock.sleep(1.0)
    return monitor.end_window("w").joules.total


def test_a_start_in_the_background_is_over_before_the_first_window():
    clock = Clock()
    meter = FakeMeter(clock, {"cpu": 5.0})
    monitor = EnergyMonitor(meter, clock)
    monitor.start_in_background()
    assert measured_once(monitor, clock) == 5.0
    assert meter.starts == 1


def test_a_process_that_does_not_meter_its_machine_measures_time():
    clock = Clock()
    (reading,) = measured(None, clock, 2.0)
    note = "another process of this machine meters it"
    assert reading == EnergyReading(2.0, notes=(note,))


@given(watts, watts, seconds, seconds)
def test_net_is_gross_minus_idle_and_may_be_negative(idle_watts, run_watts, wait, run):
    clock = Clock()
    meter = FakeMeter(clock, {"cpu": [(0.0, idle_watts), (wait, run_watts)]})
    idle, gross = measured(meter, clock, wait, run)
    record = gross.as_dict(idle)
    assert record["idle_joules"]["cpu"] == pytest.approx(idle_watts * run)
    net = record["net_joules"]
    expected = (run_watts - idle_watts) * run
    scale = (run_watts + idle_watts) * run
    assert math.isclose(net["cpu"], expected, abs_tol=1e-6 * scale)
    assert net["gpu"] is None
    if run_watts < 0.9 * idle_watts:
        assert net["total"] < 0


def test_sums_take_the_longest_time_of_windows_side_by_side():
    machines = [
        EnergyReading(2.0, Joules(cpu=10.0, total=10.0)),
        EnergyReading(3.0, Joules(cpu=20.0, total=20.0), notes=("slow",)),
    ]
    together = add_up(machines, at_once=True)
    assert together.seconds == 3.0
    assert together.joules.cpu == 30.0
    assert together.joules.gpu is None
    assert together.notes == ("slow",)
    assert add_up([]) == EnergyReading(0.0)
