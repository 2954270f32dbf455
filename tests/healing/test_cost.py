"""Seconds and joules of a training, over one stretch or several."""

from __future__ import annotations

import pytest

from lm_eval_pruned.healing.cost import TrainingCost
from tests.helpers.meters import Clock, FakeMeter


@pytest.fixture
def metered(monkeypatch):
    """Return a function that makes the cost of a training on a machine of known power."""

    def make(*, before=None, on_gpu=False, **meter):
        clock = Clock()
        made = FakeMeter(clock, {"cpu": 10.0, "ram": 2.0}, **meter)
        monkeypatch.setattr("lm_eval_pruned.healing.cost.CodecarbonMeter", lambda: made)
        cost = TrainingCost(metered=True, before=before)
        cost.begin(on_gpu=on_gpu)
        return cost, clock

    return make


def test_a_stretch_is_read_again_and_added_to_what_a_checkpoint_says(metered):
    cost, clock = metered()
    for seconds in (5, 10):
        clock.sleep(5)
        found = cost.so_far()
        watts = {"cpu": 10.0, "ram": 2.0, "total": 12.0}
        joules = {name: power * seconds for name, power in watts.items()}
        assert found["energy"]["joules"] == {"gpu": None, **joules}
        assert found["energy"]["notes"] == []
    more, clock = metered(before=found | {"seconds": 100.0})
    clock.sleep(10)
    again = more.so_far()
    assert again["energy"]["joules"]["total"] == pytest.approx(240)
    assert 100 <= again["seconds"] < 101
    # A training that was at its end costs what it had cost.
    assert TrainingCost(metered=True, before=again).so_far() == again


LAUNCH = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("more", "environment", "note"),
    [
        ({"fail_at": 2}, {}, "the meter died: the sensor is gone"),
        ({"on_gpu": True}, {}, "the model runs on a gpu that the meter does not see"),
        ({"before": {"seconds": 3.0}}, {}, "the first part was trained without"),
        ({}, LAUNCH, "only the first of several machines was metered"),
    ],
)
def test_part_of_a_sum_is_no_sum(metered, monkeypatch, more, environment, note):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cost, clock = metered(**more)
    clock.sleep(5)
    energy = cost.so_far()["energy"]
    assert energy["joules"]["total"] is None
    assert energy["notes"][0].startswith(note)
    cost.close()
