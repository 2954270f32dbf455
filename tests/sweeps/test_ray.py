"""Sweeps on Ray: a cluster of two CPUs on this machine."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch

from lm_eval_pruned.sweeps.plan import Configuration, Sweep, Unit, choose_unit
from lm_eval_pruned.sweeps.ray import Worker
from lm_eval_pruned.sweeps.run import run_sweep
from lm_eval_pruned.sweeps.unit import UnitRunner
from tests.helpers.sweeping import files_of, results_of, sweep_options, write_tasks


@pytest.mark.parametrize(
    ("waiting", "holds", "elsewhere", "known", "chosen"),
    [
        ("at at bt", "b", [], {}, 2),
        ("at at bt", None, [], {}, 0),
        ("at at bt", None, ["a"], {}, 2),
        ("at bt bt", "c", ["a", "b"], {}, 1),
        ("at bt bt", "a", ["a", "b"], {}, 0),
        ("at au bt", "a", [], {"t": 1, "u": 2}, 1),
        ("at bu cv", None, [], {"t": 1, "u": 3}, 1),
        ("at bu cv cv", None, [], {"t": 1, "u": 3}, 2),
    ],
)
def test_a_worker_prefers_its_model_and_then_the_longest_unit(
    waiting, holds, elsewhere, known, chosen
):
    units = [
        Unit(Configuration(a, {}, 1, 1, 1, 0), cast("Any", SimpleNamespace(name=b)))
        for a, b in waiting.split()
    ]
    assert choose_unit(units, holds, elsewhere, list(known.items())) is units[chosen]


def test_a_unit_that_the_hub_refuses_waits_longer_and_longer(monkeypatch, tmp_path):
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    runner = mock.Mock()
    told = {"traceback": "Client error '429 Too Many Requests' for url"}
    runner.attempt.side_effect = [(1.0, told), (1.0, told), (2.0, None)]
    unit = SimpleNamespace(names=("baseline", "t"))
    assert UnitRunner.attempt_patiently(runner, cast("Any", unit), tmp_path) == (
        2.0,
        None,
    )
    assert slept[1] > slept[0] > 0
    runner.attempt.side_effect = [(1.0, {"traceback": "429 documents"})]
    UnitRunner.attempt_patiently(runner, cast("Any", unit), tmp_path)
    assert len(slept) == runner.release.call_count == 2


@pytest.fixture
def options(tiny_llama, tmp_path):
    return sweep_options(
        tiny_llama, write_tasks(tmp_path / "tasks"), tmp_path / "sweep"
    )


def test_a_missing_package_is_named(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'lm-eval-pruned\[ray\]"):
        run_sweep({**options, "ray": True})


def test_a_worker_sends_its_files_and_refuses_another_task(options, one_thread):
    worker = Worker(options, os.getcwd(), "_worker0", threads=2)
    assert torch.get_num_threads() == 2
    (task,) = (t for t in Sweep(options).tasks if t.name == "tiny_choice")
    _, files, failure, usable = worker.run("ratio-1.5", task.name, task.digest)
    assert (failure, usable) == (None, True)
    assert sorted(name[:7] for name in files) == ["results", "samples"]
    _, _, failure, usable = worker.run("ratio-1.5", task.name, "another")
    assert "is not the one" in failure["message"]
    assert usable


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two CPUs that lives as long as these tests."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="the package ray is not installed")
    more = {"include_dashboard": False, "log_to_driver": False}
    ray.init("local", num_cpus=2, num_gpus=0, object_store_memory=100 * 2**20, **more)
    yield ray
    ray.shutdown()


@pytest.fixture
def one_cpu(cluster):
    """Another program holds one of the two CPUs."""

    @cluster.remote(num_cpus=1)
    class Other:
        def there(self):
            pass

    other = Other.remote()
    cluster.get(other.there.remote())
    yield
    cluster.kill(other)


@pytest.mark.slow
def test_same_results_as_without_ray(cluster, options, tmp_path, one_thread):
    here = {**options, "output_path": str(tmp_path / "here")}
    assert run_sweep(here) == 0
    assert run_sweep({**options, "ray": True}) == 0
    assert results_of(tmp_path / "sweep") == results_of(tmp_path / "here")
    # A sweep may go on with or without Ray.
    before = files_of(tmp_path / "sweep")
    assert run_sweep(options) == 0
    assert files_of(tmp_path / "sweep") == before


def change_utils(options, *replaced):
    utils = Path(options["include_path"], "utils.py")
    utils.write_text(utils.read_text().replace(*replaced))


def in_the_first_process(options, statement):
    """Have the process that first loads a task run a statement whenever it loads one."""
    mark = Path(options["include_path"]).parent / "first"
    first = f"""def load(**kwargs):
    import os, signal, torch
    mark = Path({str(mark)!r})
    if not mark.exists():
        mark.write_text(str(os.getpid()))
    if mark.read_text() == str(os.getpid()):
        {statement}
"""
    change_utils(options, "def load(**kwargs):\n", first)


@pytest.mark.slow
@pytest.mark.parametrize("cpus", ["cluster", "one_cpu"])
def test_units_of_lost_workers_run_again(cpus, options, request):
    """The process is killed, as it is with a node that is lost; one worker finds no place."""
    request.getfixturevalue(cpus)
    in_the_first_process(options, "os.kill(os.getpid(), signal.SIGKILL)")
    assert run_sweep({**options, "ray": True}) == 0
    assert len(files_of(Path(options["output_path"]))) == 4


@pytest.mark.slow
def test_after_a_device_has_failed_another_process_takes_the_unit(one_cpu, options):
    in_the_first_process(options, "raise RuntimeError('CUDA error: an assert')")
    assert run_sweep({**options, "ray": True}) == 0


@pytest.mark.slow
def test_a_unit_that_never_ends_fails_alone(cluster, options):
    change_utils(options, 'raise ConnectionError("the data set', 'signal.pause() #("')
    change_utils(options, "import json", "import json, signal")
    choice = Path(options["include_path"], "choice.yaml")
    choice.write_text(choice.read_text().replace("utils.load", "utils.cannot_be_had"))
    asked = {**options, "ratios": [], "tasks": ["tiny_choice"], "ray": True}
    assert run_sweep({**asked, "minutes_per_unit": 0.01}) == 1
    (file,) = Path(options["output_path"]).glob("units/*/*/error.json")
    error = json.loads(file.read_text())
    assert (error["type"], "minutes_per_unit=0.01" in error["message"]) == (
        "TimeoutError",
        True,
    )


@pytest.mark.slow
def test_a_unit_that_always_kills_its_worker_fails_alone(cluster, options):
    change_utils(
        options,
        'raise ConnectionError("the data set',
        'import os; os.kill(os.getpid(), 9) #("',
    )
    choice = Path(options["include_path"], "choice.yaml")
    choice.write_text(choice.read_text().replace("utils.load", "utils.cannot_be_had"))
    assert run_sweep({**options, "ratios": [], "ray": True}) == 1
    unit = Path(options["output_path"], "units", "baseline")
    error = json.loads((unit / "tiny_choice" / "error.json").read_text())
    assert error["type"].startswith("ray.exceptions.")
    assert list((unit / "tiny_sentence").glob("results_*.json"))


@pytest.mark.slow
def test_more_than_a_node_has(cluster, options):
    with pytest.raises(ValueError, match="cpus_per_unit=64 and gpus_per_unit=0"):
        run_sweep({**options, "ray": True, "cpus_per_unit": 64.0})
