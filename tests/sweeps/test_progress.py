"""The progress of a sweep: counts, time left, scores, errors."""

from __future__ import annotations

import pytest

from lm_eval_pruned.util.progress import Progress


def test_lines_where_there_is_no_terminal(capsys):
    progress = Progress(1, 1, ["a", "b"], [("a", 10.0)])
    progress.start("baseline", "a")
    progress.finish("baseline", "a", 12.0, {"acc": 0.5}, None)
    progress.start("baseline", "b")
    error = {"type": "MemoryError", "message": "no memory\nat all"}
    progress.finish("baseline", "b", 3.0, {}, error)
    assert capsys.readouterr().out.splitlines() == [
        "4 units: 1 done, 1 failed before, 2 to run",
        "[3/4] baseline / a starts",
        "[3/4] baseline / a: acc 0.5000 (0:00:12, 0:00:11 left)",
        "[4/4] baseline / b starts",
        "[4/4] baseline / b: FAILED with MemoryError: no memory (0:00:03, 0:00:00 left)",
    ]
    assert (progress.done, progress.failed) == (2, 2)


def test_time_left_comes_from_the_same_task():
    progress = Progress(2, 0, ["a", "b", "c"], [("a", 10.0), ("a", 20.0), ("b", 1.0)])
    # 15 for a, 1 for b, their mean for c.
    assert progress.remaining_seconds() == pytest.approx(15 + 1 + 8)
    progress.workers = 2
    assert progress.remaining_seconds() == pytest.approx(12)
    progress.workers = 64
    assert progress.remaining_seconds() == pytest.approx(8)


def test_time_left_is_unknown_at_first(capsys):
    progress = Progress(0, 0, ["a", "a"])
    assert progress.remaining_seconds() is None
    progress.finish("c", "a", 1.0, {}, {"type": "E", "message": ""})
    assert "time left unknown" in capsys.readouterr().out
