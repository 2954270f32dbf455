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
from tests.helpers import checkpoints


if TYPE_CHECKING:
    from collections.abc import Iterator

SHIPPED = ("lm_eval_pruned", "model_wrappers", "tasks")
#: Scripts import their neighbours by name.
OURS = (
    {"lm_eval_pruned", "tests", "tools"}
    | {
        path.stem
        for folder in ("benchmarks", "docs", "tests")
        for path in (checkpoints.ROOT / folder).glob("*.py")
    }
    | {
        path.parent.name
        for path in (checkpoints.ROOT / "benchmarks").glob("*/__init__.py")
    }
)
#: `tox -e vllm` brings it.
ON_REQUEST = {"vllm"}


def requirements(section: str, key: str) -> dict[str, Requirement]:
    """Return one list of requirements of setup.cfg by normalised name."""
    config = configparser.ConfigParser()
    config.read(checkpoints.ROOT / "setup.cfg", encoding="utf-8")
    lines = config[section][key].splitlines()
    listed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(each.name): each for each in listed}


def required() -> dict[str, Requirement]:
    return requirements("options", "install_requires")


def extras() -> dict[str, dict[str, Requirement]]:
    config = configparser.ConfigParser()
    config.read(checkpoints.ROOT / "setup.cfg", encoding="utf-8")
    names = config["options.extras_require"]
    return {name: requirements("options.extras_require", name) for name in names}


def imported(*folders: str) -> dict[str, set[str]]:
    """Return the distributions that the code of `folders` imports, and where."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for path in sorted((checkpoints.ROOT / folder).rglob("*.py")):
            for module in top_level_imports(ast.parse(path.read_text("utf-8"))):
                if module in sys.stdlib_module_names or module in OURS:
                    continue
                where = path.relative_to(checkpoints.ROOT).as_posix()
                found.setdefault(distribution(module), set()).add(where)
    return found


def top_level_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            argument = node.args[0]
            if called in ("import_module", "find_spec") and (
                isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            ):
                names = [argument.value]
        yield from (name.partition(".")[0] for name in names)


def distribution(module: str) -> str:
    """Return the normalised name of the distribution that `module` comes from."""
    return canonicalize_name(distributions_by_module().get(module, [module])[0])


@cache
def distributions_by_module():
    return metadata.packages_distributions()


def test_every_kind_of_import_is_seen():
    source = """
import yaml.nodes
from tqdm.auto import tqdm
from . import sibling
def later():
    if find_spec("matplotlib") is None:
        importlib.import_module("jinja2.ext")
"""
    seen = set(top_level_imports(ast.parse(source)))
    assert seen == {"yaml", "tqdm", "matplotlib", "jinja2"}


def test_what_is_imported_is_required():
    optional = {
        name for extra, listed in extras().items() if extra != "test" for name in listed
    }
    undeclared = {
        name: where
        for name, where in imported(*SHIPPED).items()
        if name not in required() and name not in optional
    }
    assert not undeclared


def test_what_is_required_is_imported():
    """A requirement that nothing imports is a download for nothing."""
    assert set(required()) <= set(imported(*SHIPPED))


@pytest.mark.parametrize("extra", sorted(set(extras()) - {"test"}))
def test_a_command_that_lacks_a_package_names_its_extra(extra):
    named = {distribution(module): brings for module, brings in cli.EXTRAS.items()}
    for name in extras()[extra]:
        assert name not in required()
        assert named[name] == extra


def test_the_tests_and_benchmarks_bring_what_they_import():
    listed = {*required(), *extras()["test"], *ON_REQUEST}
    needed = imported("tests", "benchmarks", "docs")
    assert not {name: where for name, where in needed.items() if name not in listed}


def test_the_tests_run_with_every_extra():
    for extra, listed in extras().items():
        for name, requirement in listed.items():
            if name not in ON_REQUEST:
                assert extras()["test"][name] == requirement, extra


@pytest.mark.parametrize("requirement", required().values(), ids=str)
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
        ("0.4.13.dev0", True),
        ("0.4.13.dev0+g4e7e0d4", True),
        ("0.4.13", True),
        ("0.4.14", True),
        ("0.4.99", True),
        # What its branch next0.5 calls itself: another interface.
        ("0.5.0.dev2", False),
        ("0.5.0rc1", False),
        ("0.5.0", False),
        ("1.0", False),
    ],
)
def test_versions_of_the_harness(version, admitted):
    specifier = required()["lm-eval"].specifier
    # pip asks so of what is installed; of what it could download, without the argument.
    assert specifier.contains(version, prereleases=True) is admitted
    assert specifier.contains(version) is admitted
