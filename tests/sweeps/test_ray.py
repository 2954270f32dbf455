"""What a worker on Ray does; `tests/contract` runs sweeps on a cluster."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from lm_eval_pruned.sweeps.plan import plan_sweep
from lm_eval_pruned.sweeps.ray import Worker
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers.sweeping import (
    act_once,
    limit_units,
    write_acting_tasks,
    write_tasks,
)


@pytest.fixture
def options(options, tmp_path):
    tasks = write_tasks(tmp_path / "tasks")
    return {**options, "include_path": str(tasks), "ray": True}


def test_a_missing_package_is_named(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'lm-eval-pruned\[ray\]"):
        run_sweep(plan_sweep(options))


def test_a_cluster_that_starts_too_slowly_ends_in_a_sentence(options, monkeypatch):
    """Ray raises an Exception of no kind."""
    slow = Mock(side_effect=Exception("The current node timed out during startup."))
    ray = SimpleNamespace(is_initialized=lambda: False, init=slow)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ValueError, match=r"--ray: .* \(The current node timed out"):
        run_sweep(plan_sweep(options))


def test_a_worker_sends_its_files_and_refuses_another_task(options, one_thread):
    worker = Worker(options, os.getcwd(), "_worker0", threads=2)
    assert torch.get_num_threads() == 2
    (task,) = (t for t in plan_sweep(options).tasks if t.name == "tiny_choice")
    answer = worker.run("ratio-1.5", task.name, task.digest)
    assert (answer.failure, answer.usable) == (None, True)
    assert sorted(name[:7] for name in answer.files) == ["results", "samples"]
    answer = worker.run("ratio-1.5", task.name, "another")
    assert answer.failure and "is not the one" in answer.failure["message"]
    assert answer.usable


def test_a_worker_goes_on_after_a_unit_that_hung(
    options, tmp_path, monkeypatch, one_thread
):
    made = write_acting_tasks(tmp_path / "tasks")
    limit_units(monkeypatch, made, 7200)
    worker = Worker({**options, "unit_timeout": 7200.0}, os.getcwd(), "_w", threads=1)
    (task,) = (t for t in plan_sweep(options).tasks if t.name == "tiny_sentence")
    unit = "ratio-1.5", task.name, task.digest
    act_once(made, "wait")
    answer = worker.run(*unit)
    assert answer.failure and answer.failure["type"] == "TimeoutError"
    assert answer.usable
    answer = worker.run(*unit)
    assert answer.failure is None and len(answer.files) == 2
    worker._runner.release()
