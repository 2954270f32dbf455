"""The examples in docstrings are what Python prints, without a network."""

from __future__ import annotations

import doctest
import importlib

import pytest

import lm_eval_pruned
from tests.helpers import checkpoints
from tests.project.test_types import FOLDERS


FLAGS = doctest.ELLIPSIS | doctest.REPORT_NDIFF


def modules_with_examples() -> list[str]:
    """Return the modules of the package whose source shows a prompt."""
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((checkpoints.ROOT / folder).rglob("*.py")):
            if ">>> " in path.read_text("utf-8"):
                inside = path.relative_to(checkpoints.ROOT / folder).with_suffix("")
                names = [part for part in inside.parts if part != "__init__"]
                found.append(".".join([package, *names]))
    return found


def examples(owner, name: str) -> list[doctest.DocTest]:
    """Return the docstrings with examples of a module, class or function."""
    return [test for test in doctest.DocTestFinder().find(owner, name) if test.examples]


@pytest.mark.parametrize("name", lm_eval_pruned.__all__)
def test_every_public_name_shows_an_example(name):
    public = getattr(lm_eval_pruned, name)
    shown = examples(public, name)
    assert shown
    assert any(name in example.source for test in shown for example in test.examples)
    for part in ("Raises:", "Source:", "Example:"):
        assert any(part in test.docstring for test in documented(public, name)), part


def documented(owner, name: str) -> list[doctest.DocTest]:
    return doctest.DocTestFinder(exclude_empty=False).find(owner, name)


@pytest.mark.parametrize("module", modules_with_examples())
def test_examples_run(module):
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    report: list[str] = []
    for test in examples(importlib.import_module(module), module):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).attempted, "a prompt outside of a docstring"
    assert not runner.failures, "".join(report)
