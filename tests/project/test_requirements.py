"""What setup.cfg requires: all that is imported, nothing else, in versions that are true."""

from __future__ import annotations

import ast
import configparser
import sys
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lm_eval_pruned import cli
from tests.helpers.checkpoints import ROOT


if TYPE_CHECKING:
    from collections.abc import Iterator

SHIPPED = ("lm_eval_pruned", "model_wrappers", "tasks")
SCRIPTS = [p for f in ("benchmarks", "docs", "tests") for p in (ROOT / f).glob("*")]
#: Scripts import their neighbours by name.
OURS = {"lm_eval_pruned", "tests", "tools", *(path.stem for path in SCRIPTS)}
#: `tox -e vllm` brings it.
ON_REQUEST = {"vllm"}


@cache
def lists() -> dict[str, dict[str, Requirement]]:
    """Return the requirements of setup.cfg by normalised name, "" those without an extra."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = dict(config["options.extras_require"])
    texts[""] = config["options"]["install_requires"]
    return {
        extra: {
            canonicalize_name(Requirement(line).name): Requirement(line)
            for line in text.splitlines()
            if line and not line.startswith("#")
        }
        for extra, text in texts.items()
    }


REQUIRED, TEST = lists()[""], lists()["test"]
EXTRAS = {name: each for name, each in lists().items() if name not in ("", "test")}


def imported(*folders: str) -> set[str]:
    """Return the distributions that the code of `folders` imports."""
    known = metadata.packages_distributions()
    return {
        canonicalize_name(known.get(module, [module])[0])
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for module in top_level_imports(ast.parse(path.read_text("utf-8")))
        if module not in sys.stdlib_module_names and module not in OURS
    }


def top_level_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(level=0):
                names = [node.module or ""]
            case ast.Call(args=[ast.Constant(value=str() as name), *_]):
                called = ast.unparse(node.func).rpartition(".")[2]
                names = [name] if called in ("import_module", "find_spec") else []
            case _:
                names = []
        yield from (name.partition(".")[0] for name in names)


def test_what_is_imported_is_required_and_the_reverse():
    """A requirement that nothing imports is a download for nothing."""
    optional = {name for listed in EXTRAS.values() for name in listed}
    shipped = imported(*SHIPPED)
    assert shipped <= {*REQUIRED, *optional}
    assert {*REQUIRED} <= shipped
    assert imported("tests", "benchmarks", "docs") <= {*REQUIRED, *TEST, *ON_REQUEST}


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_command_that_lacks_a_package_names_its_extra(extra):
    known = metadata.packages_distributions()
    named = {
        canonicalize_name(known.get(module, [module])[0]): brings
        for module, brings in cli.EXTRAS.items()
    }
    for name, requirement in EXTRAS[extra].items():
        assert name not in REQUIRED
        assert named[name] == extra
        # The tests run with every extra.
        assert name in ON_REQUEST or TEST[name] == requirement


@pytest.mark.parametrize("requirement", REQUIRED.values(), ids=str)
def test_every_requirement_states_its_lowest_version(requirement):
    assert any(clause.operator == ">=" for clause in requirement.specifier)
    assert requirement.specifier.contains(
        metadata.version(requirement.name), prereleases=True
    )


@pytest.mark.parametrize(
    ("version", "admitted"),
    [
        ("0.4.12", False),
        # What a checkout of the harness's main branch calls itself.
        ("0.4.13.dev0+g4e7e0d4", True),
        ("0.4.13", True),
        ("0.4.99", True),
        # What its branch next0.5 calls itself: another interface.
        ("0.5.0.dev2", False),
        ("0.5.0", False),
    ],
)
def test_versions_of_the_harness(version, admitted):
    specifier = REQUIRED["lm-eval"].specifier
    # pip asks so of what is installed; of what it could download, without the argument.
    assert specifier.contains(version, prereleases=True) is admitted
    assert specifier.contains(version) is admitted
