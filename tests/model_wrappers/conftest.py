from __future__ import annotations

import os

import pytest

from tests.helpers import checkpoints
from tests.helpers.engines import HEADS, end_engine


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
