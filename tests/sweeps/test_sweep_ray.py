"""Sweeps on Ray: a cluster of two CPUs on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lm_eval_pruned.sweeps.plan import Configuration, Sweep, Unit
from lm_eval_pruned.sweeps.ray import Worker, choose_unit
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers import trackers
from tests.helpers.sweeping import files_of, results_of, sweep_options, write_tasks


@pytest.mark.parametrize(
    ("waiting", "holds", "elsewhere", "chosen"),
    [
        ("aab", "b", [], 2),
        ("aab", None, [], 0),
        ("aab", None, ["a"], 2),
        ("aab", "c", ["a", "b"], 0),
        ("abb", "c", ["a", "b"], 1),
        ("abb", "a", ["a", "b"], 0),
    ],
)
def test_a_worker_prefers_the_model_it_holds(waiting, holds, elsewhere, chosen):
    task: Any = SimpleNamespace(name="t")
    units = [Unit(Configuration(name, {}, 1, 1, 1, 0), task) for name in waiting]
    assert choose_unit(units, holds, elsewhere) is units[chosen]


def test_ray_not_installed(tiny_llama, tmp_path, monkeypatch):
    import sys

    from lm_eval_pruned.sweeps.ray import run_on_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'lm-eval-pruned\[ray\]"):
        next(run_on_ray(SimpleNamespace(options={"ray": True}), [], None, None, ""))


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    """Stand-ins for W&B and Trackio."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("packages")
        yield trackers.install(patch, folder)


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two CPUs that lives as long as these tests."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="the package ray is not installed")
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def options(tiny_llama, tmp_path):
    tasks = write_tasks(tmp_path / "tasks")
    return sweep_options(tiny_llama, tasks, tmp_path / "sweep")


def test_a_worker_reports_its_units(quick, options, services, monkeypatch):
    hub = trackers.stand_in_for_the_hub(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    told = {
        "wandb_args": {"project": "of a worker"},
        "trackio_args": {"project": "of a worker"},
        "hf_hub_log_args": {"push_results_to_hub": True, "hub_results_org": "o"},
    }
    worker = Worker({**options, **told, "cpus_per_unit": 2.0}, os.getcwd(), "_worker0")
    assert torch.get_num_threads() == 2
    task = next(t for t in Sweep(options).tasks if t.name == "tiny_choice")
    _, files, failure, _ = worker.run("ratio-1.5", task.name, task.digest)
    assert failure is None
    assert any(name.startswith("results_") for name in files)
    assert not any(b"hf_of_a_test" in content for content in files.values())
    assert _runs_of(services, "of a worker") == ["ratio-1.5 tiny_choice"] * 2
    (place,) = (call["path_in_repo"] for name, call in hub if name == "upload_file")
    assert "_ratio-1.5/results_" in place


def _runs_of(services, project):
    calls = [*services.wandb(), *services.trackio()]
    return [call["name"] for call in calls if call.get("project") == project]


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


def _in_the_first_process(options, statement):
    """Have the process that first loads a task run a statement whenever it loads one."""
    utils = Path(options["include_path"], "utils.py")
    mark = Path(options["include_path"]).parent / "first"
    utils.write_text(
        utils.read_text().replace(
            "def load(**kwargs):\n",
            "def load(**kwargs):\n"
            "    import os, signal, torch\n"
            f"    mark = Path({str(mark)!r})\n"
            "    if not mark.exists():\n"
            "        mark.write_text(str(os.getpid()))\n"
            "    if mark.read_text() == str(os.getpid()):\n"
            f"        {statement}\n",
        )
    )
    return mark


@pytest.mark.slow
def test_units_wait_for_no_worker_that_finds_no_place(one_cpu, options):
    assert run_sweep({**options, "ray": True}) == 0
    assert len(files_of(Path(options["output_path"]))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("cpus", ["cluster", "one_cpu"])
def test_units_of_lost_workers_run_again(cpus, options, request):
    """The process is killed, as it is with a node that is lost."""
    request.getfixturevalue(cpus)
    mark = _in_the_first_process(options, "os.kill(os.getpid(), signal.SIGKILL)")
    assert run_sweep({**options, "ray": True}) == 0
    assert mark.exists()
    assert len(files_of(Path(options["output_path"]))) == 4


@pytest.mark.slow
def test_units_of_a_worker_whose_device_fails_run_on_another(cluster, options):
    mark = _in_the_first_process(
        options, "raise RuntimeError('CUDA error: unspecified launch failure')"
    )
    assert run_sweep({**options, "ray": True}) == 0
    assert mark.exists()
    assert len(results_of(Path(options["output_path"]))) == 4


@pytest.mark.slow
def test_a_sweep_without_a_device_that_works_ends(one_cpu, options, capsys):
    utils = Path(options["include_path"], "utils.py")
    text = utils.read_text().replace(
        "    lines = ", "    raise RuntimeError('CUDA error: no device')\n    lines = "
    )
    utils.write_text(text)
    assert run_sweep({**options, "ray": True}) == 1
    assert "Stopped: no worker is left for" in capsys.readouterr().out
    assert len(list(Path(options["output_path"]).glob("units/*/*"))) < 4


@pytest.mark.slow
def test_a_unit_that_always_kills_its_worker_fails_alone(cluster, options):
    tasks = Path(options["include_path"])
    utils = tasks / "utils.py"
    utils.write_text(
        utils.read_text().replace(
            'raise ConnectionError("the data set cannot be had")',
            "import os; os.kill(os.getpid(), 9)",
        )
    )
    choice = tasks / "choice.yaml"
    choice.write_text(choice.read_text().replace("utils.load", "utils.cannot_be_had"))
    assert run_sweep({**options, "ratios": [], "ray": True}) == 1
    unit = Path(options["output_path"], "units", "baseline")
    error = json.loads((unit / "tiny_choice" / "error.json").read_text())
    assert error["type"].startswith("ray.exceptions.")
    assert list((unit / "tiny_sentence").glob("results_*.json"))


@pytest.mark.slow
def test_more_than_a_node_has(cluster, options):
    with pytest.raises(
        ValueError, match="cpus_per_unit=64 and gpus_per_unit=0 are more than"
    ):
        run_sweep({**options, "ray": True, "cpus_per_unit": 64.0})
