"""Seconds and joules of a training, over one stretch or several."""

from __future__ import annotations

import pytest

from lm_eval_pruned.healing.cost import TrainingCost
from tests.helpers.meters import Clock, FakeMeter


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metered(clock, monkeypatch):
    """Return a function that makes the cost of a training on a machine of known power."""

    def make(watts=None, before=None, **more):
        meter = FakeMeter(clock, watts or {"cpu": 10.0, "ram": 2.0}, **more)
        monkeypatch.setattr(
            "lm_eval_pruned.healing.cost.CodecarbonMeter", lambda: meter
        )
        return TrainingCost(metered=True, before=before)

    return make


def test_a_stretch_is_read_again_and_again(metered, clock):
    cost = metered()
    cost.begin(on_gpu=False)
    clock.sleep(5)
    assert cost.so_far()["energy"]["joules"]["total"] == pytest.approx(60)
    # Nothing since: the counters stand still, and the total is what it was.
    found = cost.so_far()["energy"]
    clock.sleep(5)
    assert cost.so_far()["energy"]["joules"]["total"] == pytest.approx(120)
    assert found == {
        "meter": "fake",
        "joules": {"cpu": 50.0, "gpu": None, "ram": 10.0, "total": 60.0},
        "sources": {"cpu": "measured", "gpu": "none", "ram": "measured"},
        "notes": [],
    }


def test_it_goes_on_from_what_a_checkpoint_says(metered, clock):
    first = metered()
    first.begin(on_gpu=False)
    clock.sleep(5)
    record = first.so_far() | {"seconds": 100.0}
    cost = metered(before=record)
    clock.sleep(1)
    cost.begin(on_gpu=False)
    clock.sleep(10)
    found = cost.so_far()
    assert found["energy"]["joules"]["total"] == pytest.approx(180)
    assert found["energy"]["joules"]["gpu"] is None
    assert 100 <= found["seconds"] < 101
    # A training that was at its end costs what it had cost.
    assert (
        metered(before=found).so_far()["energy"]["joules"] == found["energy"]["joules"]
    )


def test_part_of_a_sum_is_no_sum(metered, clock):
    cost = metered(before={"seconds": 3.0})
    cost.begin(on_gpu=False)
    clock.sleep(5)
    energy = cost.so_far()["energy"]
    assert energy["joules"]["total"] is None
    assert energy["notes"] == ["the first part was trained without a meter"]


@pytest.mark.parametrize(
    ("more", "on_gpu", "note"),
    [
        ({"fail_at": "start"}, False, "the meter did not start: no permission"),
        ({"fail_at": 2}, False, "the meter died: the sensor is gone"),
        ({}, True, "the model runs on a gpu that the meter does not see"),
    ],
)
def test_what_was_not_measured_is_null_with_a_note(metered, clock, more, on_gpu, note):
    cost = metered(**more)
    cost.begin(on_gpu=on_gpu)
    clock.sleep(5)
    energy = cost.so_far()["energy"]
    assert energy["joules"]["total"] is None
    assert energy["notes"][0].startswith(note)
    cost.close()


def test_processes_and_machines(metered, clock, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    cost = metered()
    cost.begin(on_gpu=False)
    energy = cost.so_far()["energy"]
    assert (energy["meter"], energy["joules"]["total"]) == (None, None)
    assert energy["notes"] == ["another process of this machine meters it"]
    for name, value in {
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 2,
        "WORLD_SIZE": 4,
    }.items():
        monkeypatch.setenv(name, str(value))
    cost = metered()
    cost.begin(on_gpu=False)
    clock.sleep(5)
    energy = cost.so_far()["energy"]
    assert energy["joules"]["total"] is None
    assert energy["notes"] == ["only the first of several machines was metered"]


def test_without_a_meter_there_are_seconds_alone():
    assert set(TrainingCost(metered=False).so_far()) == {"seconds"}
