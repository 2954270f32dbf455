"""The garbage collector is put off, and back on afterwards whatever happens."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from lm_eval_pruned import load_pruned
from lm_eval_pruned.util.garbage import without_collections


def test_it_is_on_again_after_an_error():
    def fail():
        with without_collections():
            assert not gc.isenabled()
            raise KeyError

    assert gc.isenabled()
    with pytest.raises(KeyError):
        fail()
    assert gc.isenabled()


def test_it_stays_off_where_it_was_off():
    gc.disable()
    try:
        with without_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_loading_leaves_it_on(tiny_llama):
    load_pruned(str(tiny_llama), ratio=2)
    assert gc.isenabled()


def test_importing_the_model_type_collects_nothing_and_leaves_it_on():
    """Each collection walks all that the harness has read: a third of a second."""
    code = (
        "import gc, lm_eval.api.model; found = [];"
        "gc.callbacks.append(lambda phase, info: found.append(info['generation']));"
        "import lm_eval_pruned.model_wrappers.pruned_hf;"
        "print(gc.isenabled(), 2 in found)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]
