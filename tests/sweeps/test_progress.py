"""The progress of a sweep: counts, time left, scores, errors."""

from __future__ import annotations

import pytest

from lm_eval_pruned.sweeps.progress import Progress


def test_a_line_where_a_unit_starts_and_where_it_ends(capsys):
    progress = Progress(1, 1, ["a", "b"])
    progress.start("baseline", "a")
    error = {"type": "MemoryError", "message": "no memory\nat all"}
    progress.finish("baseline", "b", 3.0, {}, error)
    progress.finish("baseline", "a", 12.0, {"acc": 0.5}, None)
    assert capsys.readouterr().out.splitlines() == [
        "4 units: 1 done, 1 failed before, 2 to run",
        "[3/4] baseline / a starts",
        "[3/4] baseline / b: FAILED with MemoryError: no memory (0:00:03, time left unknown)",
        "[4/4] baseline / a: acc 0.5000 (0:00:12, 0:00:00 left)",
    ]


def test_time_left_comes_from_the_same_task():
    progress = Progress(2, 0, ["a", "b", "c"], [("a", 10.0), ("a", 20.0), ("b", 1.0)])
    # 15 for a, 1 for b, their mean for c, shared by workers, of whom 3 are busy.
    for workers, seconds in ((1, 24), (2, 12), (64, 8)):
        progress.workers = workers
        assert progress.remaining_seconds() == pytest.approx(seconds)
