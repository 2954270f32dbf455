"""The progress of a sweep: who takes which unit, counts, time left, scores, errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lm_eval_pruned.sweeps import progress as module
from lm_eval_pruned.sweeps.plan import FLOORS, Configuration, Unit
from lm_eval_pruned.sweeps.progress import Progress


BEST = {"recipe": "best"}
#: Configurations by the letters that name them in these tests.
MODELS = {
    "b": Configuration("baseline", {}),
    "x": Configuration("ratio-2", {"ratio": 2, **BEST}),
    "y": Configuration("ratio-3", {"ratio": 3, **BEST}),
    "z": Configuration("ratio-2_maw", {"ratio": 2}),
    "f": FLOORS[0],
}


def units(words: str) -> list[Unit]:
    """Return units of these names: a letter of `MODELS`, and one for the task."""
    tasks = {letter: SimpleNamespace(name=letter) for letter in "at"}
    return [Unit(MODELS[a], cast("Any", tasks[b])) for a, b in words.split()]


@pytest.fixture
def clock(monkeypatch):
    """What a test sets to the time that it is."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


def test_a_line_where_a_unit_starts_and_where_it_ends(capsys, clock):
    first, second = units("ba bt")
    progress = Progress([first, second], 1, 1)
    progress.start(first)
    progress.start(second)
    error = {"type": "MemoryError", "message": "no memory\nat all"}
    progress.finish(second, 3.0, {}, error)
    progress.finish(first, 12.0, {"acc": 0.5}, None)
    assert capsys.readouterr().out.splitlines() == [
        "4 units: 1 done, 1 failed before, 2 to run",
        "[3/4] baseline / a starts",
        "[3/4] baseline / t starts",
        "[3/4] baseline / t: FAILED with MemoryError: no memory (0:00:03, time left unknown)",
        "[4/4] baseline / a: acc 0.5000 (0:00:12, 0:00:00 left)",
    ]


def run(progress, clock, unit, loading, seconds, capsys):
    """Run a unit on that clock and return what is said of the time left."""
    progress.start(unit)
    clock.now += loading + seconds
    progress.finish(unit, seconds, {}, None)
    return capsys.readouterr().out.splitlines()[-1].partition(", ")[2].rstrip(")")


def test_time_left_has_loading_and_pruning_of_the_models_to_come(capsys, clock):
    order = units("fa ba bt xa xt ya yt za")
    progress = Progress(order)
    loads = {"ba": 2, "xa": 300, "ya": 200, "za": 1}
    said = [
        run(progress, clock, unit, loads.get(names, 0), 10, capsys)
        for names, unit in zip(
            ["fa", "ba", "bt", "xa", "xt", "ya", "yt", "za"], order, strict=True
        )
    ]
    assert said == [
        "time left unknown",
        # Two sizes by one recipe, and one by weights.
        "0:01:00 left, without loading and pruning 3 models",
        "0:00:50 left, without loading and pruning 3 models",
        # Another size by the same recipe takes as long.
        "0:05:40 left, without loading and pruning 1 model",
        "0:05:30 left, without loading and pruning 1 model",
        "0:00:20 left, without loading and pruning 1 model",
        "0:00:10 left, without loading and pruning 1 model",
        "0:00:00 left",
    ]


def test_time_left_comes_from_the_same_task_and_is_shared_by_busy_workers(
    capsys, clock
):
    order = units("ba bt xa xt ya yt")
    # 10 for each of two of a, 25 for each of three of t.
    for workers, left in ((1, "0:01:35"), (3, "0:00:32")):
        progress = Progress(order, 3, 0, [("a", 5.0), ("a", 15.0), ("t", 25.0)])
        for unit in order[1:workers]:
            progress.start(unit)
        said = run(progress, clock, order[0], 0, 10, capsys)
        assert said == f"{left} left, without loading and pruning 2 models"


@pytest.mark.parametrize(
    ("waiting", "held", "chosen"),
    [
        ("xa xa yt", {"me": "ratio-3"}, 2),
        ("xa xa yt", {}, 0),
        ("xa xa yt", {"other": "ratio-2"}, 2),
        ("xa yt yt", {"me": "c", 1: "ratio-2", 2: "ratio-3"}, 1),
        ("xa yt yt", {"me": "ratio-2", 1: "ratio-2", 2: "ratio-3"}, 0),
    ],
)
def test_a_worker_prefers_its_model_and_then_the_one_with_most_left(
    waiting, held, chosen
):
    progress = Progress(left := units(waiting))
    progress.held |= held
    assert progress.take("me") is left[chosen]
    assert len(progress.waiting) == len(left) - 1
