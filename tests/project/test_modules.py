"""Every installed module: its types are checked, its examples run, public names show one."""

from __future__ import annotations

import doctest
import importlib

import pytest
from mypy.main import process_options

import lm_eval_pruned
from tests.helpers.checkpoints import ROOT
from tests.helpers.installed import modules


WITH_EXAMPLES = [
    n for n, path in modules().items() if ">>> " in path.read_text("utf-8")
]


@pytest.mark.parametrize("name", lm_eval_pruned.__all__)
def test_every_public_name_shows_an_example(name):
    found = doctest.DocTestFinder().find(getattr(lm_eval_pruned, name), name)
    assert any(name in each.source for test in found for each in test.examples)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    flags = doctest.ELLIPSIS | doctest.REPORT_NDIFF
    done = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert done.attempted, "a prompt outside of a docstring"
    assert not done.failed


def test_mypy_checks_every_module_under_its_installed_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    sources, _ = process_options([])
    assert {source.module for source in sources} == modules().keys()
