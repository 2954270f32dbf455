"""What keeps these tests a contract: they see no more of the package than a user does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lm_eval_pruned
from tests.helpers.checkpoints import ROOT


HERE = Path(__file__).parent
CONTRACTS = sorted(HERE.glob("test_*.py"))
GUIDE = {p.stem.replace("-", "_") for p in ROOT.glob("docs/*.md")}
#: The page of the tasks is in their folder; the map of the code and the glossary promise nothing.
PAGES = GUIDE - {"architecture", "glossary"} | {"readme", "security", "tasks"}


def names_imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", CONTRACTS, ids=lambda file: file.stem)
def test_a_contract_imports_only_public_names_and_replaces_nothing(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    public = {f"lm_eval_pruned.{name}" for name in lm_eval_pruned.__all__}
    ours = {n for n in names_imported(tree) if n.startswith("lm_eval_pruned.")}
    assert ours <= public
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not used & {"patch", "setattr", "setitem"}, "a contract has no mock"
    private = {n for n in used if n.startswith("_") and not n.startswith("__")}
    assert not private, "a contract sees public names only"


@pytest.mark.parametrize("file", CONTRACTS, ids=lambda file: file.stem)
def test_every_test_of_a_contract_can_fail(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    # By a helper of the file, too; `sentence` asserts that a command was refused.
    failing = {"raises", "sentence"} | {f.name for f in functions if asserts(f, set())}
    for function in functions:
        if function.name.startswith("test_"):
            assert asserts(function, failing), function.name


def asserts(function, failing):
    """Return whether a function has an assert, or names one of what may fail."""
    for node in ast.walk(function):
        match node:
            case ast.Assert():
                return True
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in failing:
                return True
            case ast.Name(id=name) if name.startswith("assert_"):
                return True
    return False


def test_every_page_of_the_guide_has_a_contract_and_every_contract_a_page():
    """A page that promises much has further files, such as ``test_sweeps_options.py``."""
    named = {file.stem.removeprefix("test_") for file in CONTRACTS} - {"rules"}
    assert named >= PAGES
    assert all(
        name.startswith(tuple(f"{page}_" for page in PAGES)) for name in named - PAGES
    )
