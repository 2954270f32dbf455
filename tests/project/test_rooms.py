"""Who may import whom: the rooms of docs/architecture.md, and no way in a circle."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from graphlib import TopologicalSorter

from tests.helpers.installed import modules


#: What each room may import of ours. The package itself may import every room's public names.
MAY_IMPORT = {
    room: {*others.split()}
    for room, others in {
        "util": "",
        "pruning": "util",
        "checkpoints": "compare pruning results util",
        "energy": "",
        "results": "util",
        "compare": "results util",
        "report": "compare pruning results util",
        "batching": "",
        "wrappers": "batching checkpoints energy pruning",
        "tasks": "",
        "healing": "checkpoints pruning results util",
        "sweeps": "checkpoints pruning results util",
        "verdict": "batching compare report results sweeps util",
        "profiling": "batching checkpoints energy pruning tasks util",
        "study": "checkpoints compare pruning report results sweeps util",
        "_autoload": "",
    }.items()
}
MAY_IMPORT["cli"] = MAY_IMPORT.keys() - {"batching", "wrappers", "tasks", "_autoload"}


def room(module: str) -> str:
    """Return the room of a module, or an empty string for the package itself."""
    _, *parts = module.split(".")
    if parts[:1] == ["model_wrappers"]:
        return "batching" if parts[1:2] == ["batching"] else "wrappers"
    return parts[0] if parts else ""


@cache
def imports() -> dict[str, set[str]]:
    """Return our modules that each of ours imports, for types alone too."""
    found: dict[str, set[str]] = {}
    for module, path in modules().items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        targets = found[module] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                above = package.split(".")
                above = above[: len(above) - node.level + 1] if node.level else []
                base = ".".join([*above, node.module or ""]).rstrip(".")
                of_base = (f"{base}.{alias.name}" for alias in node.names)
                names = [name if name in modules() else base for name in of_base]
                # The folder can be handed on to another project.
                alone = room(module) == "batching"
                assert not alone or node.level == 1 or base not in modules(), module
            targets |= {*names} & modules().keys()
        targets -= {module}
    return found


def arrows() -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for module, targets in imports().items():
        found[room(module)] |= {room(target) for target in targets} - {room(module), ""}
    return found


def test_a_room_imports_what_it_may_and_there_is_no_circle():
    assert arrows().keys() - {""} == MAY_IMPORT.keys()
    for name, may in MAY_IMPORT.items():
        assert arrows()[name] <= may, name
    tuple(TopologicalSorter({k: v for k, v in arrows().items() if k}).static_order())
    files = {m: filter(room, t) for m, t in imports().items() if room(m)}
    tuple(TopologicalSorter(files).static_order())


def test_no_file_is_longer_than_a_reader_keeps_in_mind():
    lines = {n: path.read_text("utf-8").count("\n") for n, path in modules().items()}
    assert not {name: number for name, number in lines.items() if number > 450}
