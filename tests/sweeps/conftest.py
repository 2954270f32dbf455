"""What tests that run sweeps in this process share."""

from __future__ import annotations

import functools

import pytest
import torch
from lm_eval.tasks import TaskManager

from tests.helpers.sweeping import sweep_options, write_tasks


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Leave out what takes seconds and decides nothing: thirteen thousand YAML files of
    other tasks, and the harness's look at the machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # Imports the evaluator, which must not keep the manager of the next line.
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        patch.setattr(
            "lm_eval.tasks.TaskManager",
            functools.partial(TaskManager, include_defaults=False),
        )
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def options(tiny_llama, tasks, tmp_path):
    return sweep_options(tiny_llama, tasks, tmp_path / "sweep")
