"""Sweeps of tiny models over tasks of four documents, and engines, for the pages that run some."""

from __future__ import annotations

import pytest

from tests.contract.commands import pruned
from tests.helpers.sweeping import write_tasks
from tests.model_wrappers.conftest import (  # noqa: F401
    engines,
    in_this_process,
    llama,
    two_processes,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def sweep_of(made):
    """Return the command of a sweep of 20 % on one task of four documents."""

    def sweep_of(model, folder, *words, task="tiny_choice", size=20, dtype="float32"):
        given = ["--model_args", f"pretrained={model}", f"dtype={dtype}"]
        given += ["--prune_percents", size, "--tasks", task, "--include_path", made]
        given += ["--output_path", folder, "--device", "cpu", "--floors", "no"]
        return pruned("sweep", *given, *words)

    return sweep_of


@pytest.fixture(scope="module")
def finished(tiny_llama, sweep_of, tmp_path_factory):
    """The folder of a finished sweep of `tiny_llama`."""
    folder = tmp_path_factory.mktemp("finished") / "sweep"
    assert sweep_of(tiny_llama, folder).code == 0
    return folder
