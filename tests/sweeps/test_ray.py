"""Sweeps on Ray: a cluster of two CPUs on this machine."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.ray import Worker
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers.sweeping import change, errors_of, files_of, results_of, write_tasks


@pytest.fixture
def options(options, tmp_path):
    tasks = write_tasks(tmp_path / "tasks")
    return {**options, "include_path": str(tasks), "ray": True}


def test_a_missing_package_is_named(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'lm-eval-pruned\[ray\]"):
        run_sweep(options)


def test_a_worker_sends_its_files_and_refuses_another_task(options, one_thread):
    worker = Worker(options, os.getcwd(), "_worker0", threads=2)
    assert torch.get_num_threads() == 2
    (task,) = (t for t in Sweep(options).tasks if t.name == "tiny_choice")
    answer = worker.run("ratio-1.5", task.name, task.digest)
    assert (answer.failure, answer.usable) == (None, True)
    assert sorted(name[:7] for name in answer.files) == ["results", "samples"]
    answer = worker.run("ratio-1.5", task.name, "another")
    assert answer.failure and "is not the one" in answer.failure["message"]
    assert answer.usable


@pytest.mark.slow
def test_same_results_as_without_ray(cluster, options, tmp_path, one_thread):
    here = {**options, "output_path": str(tmp_path / "here"), "ray": False}
    assert run_sweep(here) == run_sweep(options) == 0
    assert results_of(tmp_path / "sweep") == results_of(tmp_path / "here")
    # A sweep may go on with or without Ray.
    before = files_of(tmp_path / "sweep")
    assert run_sweep({**options, "ray": False}) == 0
    assert files_of(tmp_path / "sweep") == before


class Other:
    """Another program on the cluster."""

    def there(self):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("taken", "statement"),
    [
        (0, "os.kill(os.getpid(), signal.SIGKILL)"),
        (1, "raise RuntimeError('CUDA error: an assert')"),
        # It waits until the other worker, without a unit, has given its CPU back.
        (
            0,
            "import ray, time\n        while not ray.available_resources().get('CPU'): time.sleep(1)",
        ),
    ],
)
def test_units_of_lost_workers_and_devices_run_again(
    cluster, taken, statement, options, tmp_path
):
    """The process that first loads a task runs a statement whenever it loads one."""
    other = cluster.remote(num_cpus=taken)(Other).remote()
    cluster.get(other.there.remote())
    load = "def load(**kwargs):\n"
    first = f"""{load}    import os, signal
    mark = Path({str(tmp_path / "first")!r})
    if not mark.exists():
        mark.write_text(str(os.getpid()))
    if mark.read_text() == str(os.getpid()):
        {statement}
"""
    change(options["include_path"], "utils.py", load, first)
    assert run_sweep(options) == 0
    assert len(files_of(options["output_path"])) == 4
    cluster.kill(other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("import signal; signal.pause() #(", "TimeoutError"),
        ("import os; os.kill(os.getpid(), 9) #(", "ray.exceptions"),
    ],
)
def test_a_unit_that_never_ends_or_kills_its_worker_fails_alone(
    cluster, options, statement, kind
):
    change(options["include_path"], "utils.py", "raise ConnectionError(", statement)
    change(options["include_path"], "choice.yaml", "utils.load", "utils.cannot_be_had")
    asked = {**options, "ratios": []}
    if kind == "TimeoutError":
        asked |= {"tasks": ["tiny_choice"], "minutes_per_unit": 0.01}
    assert run_sweep(asked) == 1
    ((unit, error),) = errors_of(options["output_path"]).items()
    assert unit == "baseline/tiny_choice"
    assert error["type"].startswith(kind)
    others = len(files_of(options["output_path"])) - 1
    assert others == (kind != "TimeoutError")


@pytest.mark.slow
def test_more_than_a_node_has(cluster, options):
    with pytest.raises(ValueError, match="cpus_per_unit=64 and gpus_per_unit=0"):
        run_sweep({**options, "cpus_per_unit": 64.0})
