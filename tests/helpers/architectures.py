"""docs/make_architectures.py as a module, and the table that it wrote."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys

from tests.helpers.checkpoints import ROOT


TABLE = (ROOT / "docs" / "architectures.md").read_text()


@functools.cache
def script():
    """Return the script, which builds a tiny model of every class of transformers."""
    path = ROOT / "docs" / "make_architectures.py"
    spec = importlib.util.spec_from_file_location("make_architectures", path)
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def candidates() -> dict[str, tuple]:
    """Return what the script checks, by model type."""
    return {row[0]: row for row in script().candidates()}


def listed(title: str) -> set[str]:
    """Return the model types in a section of the table, in its rows or in a list."""
    text = TABLE.partition(f"## {title}")[2].partition("\n## ")[0]
    found = re.findall(r"^\|`([^`]+)`\|", text, flags=re.MULTILINE)
    lists = re.findall(r"^(?:\|[^`|]+\|)?`.*", text, flags=re.MULTILINE)
    return {*found, *re.findall(r"`([^`]+)`", " ".join(lists))}
