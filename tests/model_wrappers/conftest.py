from __future__ import annotations

import os

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.helpers import checkpoints
from tests.helpers.engines import HEADS, end_engine
from tests.helpers.made_tasks import write_made_tasks


TASKS = ["tiny_choice", "tiny_rolling", "tiny_generation"]


@pytest.fixture(scope="session")
def made_folder(tmp_path_factory):
    """Folder of tasks of each type of request, which need no download."""
    return write_made_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def evaluate(made_folder):
    """Return a function that evaluates a model, or model type, on those tasks."""
    manager = TaskManager(include_path=str(made_folder), include_defaults=False)

    def evaluate(model, tasks=TASKS, *, model_args=None, **arguments):
        return simple_evaluate(
            model=model,
            model_args=model_args,
            tasks=tasks,
            task_manager=manager,
            bootstrap_iters=0,
            device="cpu",
            **arguments,
        )

    return evaluate


@pytest.fixture(scope="module")
def engines():
    """Where an engine may be left by a test for the next."""
    yield
    end_engine()


@pytest.fixture
def in_this_process(monkeypatch, engines):
    """Without processes of its own an engine starts in a tenth of the time; one is held."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@pytest.fixture
def two_processes(monkeypatch):
    """Arguments that split a model between two processes, each on a core of its own."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    # Else vLLM asks for a node of memory for each process.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    return 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    heads = {**HEADS, "num_key_value_heads": 2}
    return checkpoints.save_tiny(tmp_path_factory.mktemp("llama"), **heads)
