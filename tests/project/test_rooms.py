"""Who may import whom: the rooms of docs/architecture.md, and no way in a circle."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING

import pytest

from tests.helpers.checkpoints import ROOT


if TYPE_CHECKING:
    from pathlib import Path


#: What each room may import of ours. The package itself may import every room's public names.
MAY_IMPORT = {
    "util": set(),
    "pruning": {"util"},
    "checkpoints": {"pruning", "util"},
    "energy": set(),
    "results": {"util"},
    "compare": {"results", "util"},
    "gate": {"compare", "results", "util"},
    "report": {"compare", "results", "util"},
    "batching": set(),
    "wrappers": {"batching", "checkpoints", "energy", "pruning", "util"},
    "tasks": set(),
    "healing": {"checkpoints", "energy", "pruning", "util"},
    "sweeps": {"checkpoints", "compare", "healing", "pruning", "results", "util"},
    "profiling": {"batching", "checkpoints", "energy", "pruning", "tasks", "util"},
    "cli": {
        "checkpoints",
        "compare",
        "energy",
        "gate",
        "healing",
        "profiling",
        "pruning",
        "report",
        "results",
        "sweeps",
        "util",
    },
    "_autoload": set(),
}
FOLDERS = {
    "lm_eval_pruned": "lm_eval_pruned",
    "model_wrappers": "lm_eval_pruned.model_wrappers",
    "tasks": "lm_eval_pruned.tasks",
}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    """Return the room of a module, or an empty string for the package itself."""
    _, *parts = module.split(".")
    if parts[:1] == ["model_wrappers"]:
        return "batching" if parts[1:2] == ["batching"] else "wrappers"
    return parts[0] if parts else ""


@cache
def imports() -> dict[str, frozenset[str]]:
    """Return our modules that each of ours imports, wherever in its code it does."""
    return {
        module: frozenset(_imports(module, path)) for module, path in modules().items()
    }


def _imports(module: str, path: Path):
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if name in modules() or base in modules():
                    yield name if name in modules() else base


def arrows() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for module, targets in imports().items():
        found[room(module)] |= {room(target) for target in targets} - {room(module), ""}
    return found


def test_every_module_is_in_a_room():
    assert {room(module) for module in modules()} - {""} == MAY_IMPORT.keys()


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_room_imports_what_it_may(name):
    assert arrows()[name] <= MAY_IMPORT[name]


def test_there_is_no_circle_of_rooms():
    tuple(TopologicalSorter({k: v for k, v in arrows().items() if k}).static_order())


def test_there_is_no_circle_of_files():
    """Imports for types alone count too: what a reader has to open is the same."""
    found = {
        module: {each for each in targets if each != module and room(each)}
        for module, targets in imports().items()
        if room(module)
    }
    tuple(TopologicalSorter(found).static_order())


def test_the_map_counts_the_arrows_and_floors():
    found = {name: targets for name, targets in arrows().items() if name}
    floor: dict[str, int] = {}
    for name in TopologicalSorter(found).static_order():
        floor[name] = 1 + max((floor[each] for each in found.get(name, ())), default=0)
    number, floors = sum(map(len, found.values())), max(floor.values())
    assert (number <= 45, floors <= 6) == (True, True)
    said = (
        f"There are {number} arrows between rooms, on {floors} floors, and no circle."
    )
    assert said in (ROOT / "docs" / "architecture.md").read_text("utf-8")


def test_batching_can_be_handed_on_as_a_folder():
    """It imports its own files alone, and these relatively."""
    for module, path in modules().items():
        if room(module) != "batching":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("lm_eval_pruned"), module
                assert node.level <= 1, module
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
                assert not any(name.startswith("lm_eval_pruned") for name in names), (
                    module
                )


def test_no_file_is_longer_than_a_reader_keeps_in_mind():
    long = {
        name: lines
        for name, path in modules().items()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert not long
