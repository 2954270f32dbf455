"""The progress of a sweep: counts, time left, scores, errors."""

from __future__ import annotations

import sys

import pytest

from lm_eval_pruned.util.progress import Progress


def test_lines_where_there_is_no_terminal(capsys):
    progress = Progress(1, 1, ["a", "b"], [("a", 10.0)])
    for task, error in (("a", None), ("b", {"type": "E", "message": "none\nat all"})):
        progress.start("baseline", task)
        scores = {} if error else {"acc": 0.5}
        progress.finish("baseline", task, 12.0, scores, error)
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "4 units: 1 done, 1 failed before, 2 to run",
        "[3/4] baseline / a starts",
        "[3/4] baseline / a: acc 0.5000 (0:00:12, 0:00:11 left)",
        "[4/4] baseline / b starts",
        "[4/4] baseline / b: FAILED with E: none (0:00:12, 0:00:00 left)",
    ]
    assert (progress.done, progress.failed) == (2, 2)


def test_time_left_comes_from_the_same_task():
    assert Progress(0, 0, ["a", "a"]).remaining_seconds() is None
    progress = Progress(2, 0, ["a", "b", "c"], [("a", 10.0), ("a", 20.0), ("b", 1.0)])
    # 15 for a, 1 for b, their mean for c.
    for workers, seconds in ((1, 15 + 1 + 8), (2, 12), (64, 8)):
        progress.workers = workers
        assert progress.remaining_seconds() == pytest.approx(seconds)


def test_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(1, 0, ["a"], [("a", 10.0)])
    progress.start("ratio-2", "a")
    progress.finish("ratio-2", "a", 12.0, {"acc": 0.5}, None)
    progress.close()
    out, err = capsys.readouterr()
    assert "[2/2] ratio-2 / a: acc 0.5000" in out
    assert all(
        shown in err for shown in ("1/2 |", "0:00:10 left, a of ratio-2", "2/2 |")
    )
