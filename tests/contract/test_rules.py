"""What keeps these tests a contract: they see no more of the package than a user does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lm_eval_pruned
from tests.helpers.checkpoints import ROOT


HERE = Path(__file__).parent
CONTRACTS = sorted(HERE.glob("test_*.py"))
PAGES = {
    p.stem.replace("-", "_") for p in [*ROOT.glob("docs/*.md"), ROOT / "README.md"]
}


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


@pytest.mark.parametrize("file", CONTRACTS, ids=lambda file: file.stem)
def test_a_contract_is_named_after_a_page(file):
    assert file.stem.removeprefix("test_").lower() in {"rules", *map(str.lower, PAGES)}
