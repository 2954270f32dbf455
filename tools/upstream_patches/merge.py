"""Modules of the harness, put together from modules of ours.

A target gets the definitions that its roots need, from the sources that are listed for it, in their
order and with their comments. What nothing needs stays here, so most of what upstream does
not want falls away with the few places that use it; these are `Rules`.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class Rules:
    """What is other upstream in the text of one source.

    Attributes:
        leave_out: Methods that go, such as ``PrefixSharingMixin.get_model_info``.
        change: Texts, each of which the source holds once, and what takes their place.
    """

    leave_out: tuple[str, ...] = ()
    change: Mapping[str, str] = field(default_factory=dict)

    def apply(self, name: str, text: str) -> str:
        """Return the text of the source `name` as it is upstream.

        Raises:
            ValueError: The source has changed, so that a rule does not fit any more.
        """
        for method in self.leave_out:
            text = _without(name, text, *method.split("."))
        for old, new in self.change.items():
            if text.count(old) != 1:
                raise ValueError(
                    f"{name} holds {text.count(old)} times what a rule replaces: {old!r}"
                )
            text = text.replace(old, new)
        return text


def _without(name: str, text: str, owner: str, method: str) -> str:
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for item in node.body:
                if getattr(item, "name", None) == method:
                    first = min([item.lineno, *(d.lineno for d in item.decorator_list)])
                    lines = text.splitlines(keepends=True)
                    del lines[first - 1 : item.end_lineno]
                    return "".join(lines)
    raise ValueError(f"{name} has no {owner}.{method} that a rule leaves out")


@dataclass
class _Definition:
    """A top-level statement that gives something a name, with the comment before it."""

    names: tuple[str, ...]
    text: str
    uses: set[str]
    typing: bool


@dataclass
class _Source:
    """A module of ours, taken apart.

    Attributes:
        definitions: By name.
        imports: Imported name to (module, name in it, whether for type checking only);
            a relative module begins with a dot. The name is None for a whole module.
    """

    definitions: dict[str, _Definition] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None, bool]] = field(default_factory=dict)


def _take_apart(text: str) -> _Source:
    found = _Source()
    lines = text.splitlines()
    tree = ast.parse(text)

    def visit(body: Sequence[ast.stmt], end: int, typing: bool) -> None:
        for node in body:
            begin, end = end, node.end_lineno or node.lineno
            if isinstance(node, ast.ImportFrom):
                module = "." * node.level + (node.module or "")
                for alias in node.names:
                    found.imports[alias.asname or alias.name] = (
                        module,
                        alias.name,
                        typing,
                    )
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    name = alias.asname or alias.name
                    found.imports[name] = (alias.name, None, typing)
            elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                visit(node.body, node.lineno, True)
            elif names := tuple(_named(node)):
                chunk = "\n".join(lines[begin:end]).strip("\n")
                uses = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                definition = _Definition(names, chunk, uses - set(names), typing)
                found.definitions.update(dict.fromkeys(names, definition))

    visit(tree.body, 0, False)
    return found


def _named(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Name):
                yield target.id


@dataclass(frozen=True)
class Target:
    """A module of the harness.

    Attributes:
        module: Its name there, such as ``lm_eval.models.hf_prefix``.
        docstring: What it begins with.
        sources: The modules of ours that it is made from, by file name without ending.
        before: What stands before its imports.
    """

    module: str
    docstring: str
    sources: tuple[str, ...]
    before: str = ""

    @property
    def path(self) -> str:
        """Where it lies in the checkout."""
        return self.module.replace(".", "/") + ".py"


def merge(
    folder: Path,
    targets: Sequence[Target],
    roots: Sequence[tuple[str, str]],
    rules: Mapping[str, Rules],
) -> dict[str, str]:
    """Return the text of every target by its path.

    Args:
        folder: Where the sources lie; their relative imports lead to each other.
        targets: What is made of them.
        roots: Source and name of what the harness uses.
        rules: What changes, by source.

    Raises:
        ValueError: A rule does not fit its source, a name is needed that no target holds, or two
            sources of a target use one name differently.
    """
    texts = {
        name: (folder / f"{name}.py").read_text(encoding="utf-8")
        for target in targets
        for name in target.sources
    }
    sources = {
        name: _take_apart(rules.get(name, Rules()).apply(name, text))
        for name, text in texts.items()
    }
    home = {name: target for target in targets for name in target.sources}
    needed = _needed(sources, roots)
    return {t.path: _written(t, sources, home, needed) for t in targets}


def _needed(
    sources: Mapping[str, _Source], roots: Sequence[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Return the definitions that are reached from `roots`, as source and name."""
    needed: set[tuple[str, str]] = set()
    pending = list(roots)
    while pending:
        source, name = pending.pop()
        if (source, name) in needed:
            continue
        if name not in sources[source].definitions:
            raise ValueError(f"{source} defines no {name}")
        needed.add((source, name))
        for used in sources[source].definitions[name].uses:
            if used in sources[source].definitions:
                pending.append((source, used))
            elif used in sources[source].imports:
                module, imported, _ = sources[source].imports[used]
                if module.startswith("."):
                    if module[1:] not in sources:
                        raise ValueError(
                            f"{name} of {source} uses {used} of {module[1:]}, which is in no target"
                        )
                    pending.append((module[1:], str(imported)))
    return needed


def _written(
    target: Target,
    sources: Mapping[str, _Source],
    home: Mapping[str, Target],
    needed: set[tuple[str, str]],
) -> str:
    runtime: dict[str, set[str | None]] = defaultdict(set)
    typing: dict[str, set[str | None]] = defaultdict(set)
    bodies: list[str] = []
    aliases: list[str] = []
    taken: dict[str, str] = {}
    for name in target.sources:
        source, uses = sources[name], set()
        for definition in dict.fromkeys(map(id, source.definitions.values())):
            found = next(d for d in source.definitions.values() if id(d) == definition)
            if not any((name, each) in needed for each in found.names):
                continue
            for each in found.names:
                if taken.setdefault(each, name) != name:
                    raise ValueError(f"{taken[each]} and {name} both define {each}")
            (aliases if found.typing else bodies).append(found.text)
            uses |= found.uses
        for used in uses & set(source.imports):
            module, imported, for_typing = source.imports[used]
            if module.startswith("."):
                other = home[module[1:]]
                if other is target:
                    continue
                module = other.module
            label = imported if imported in (used, None) else f"{imported} as {used}"
            if imported is None and used != module:
                label, module = None, f"{module} as {used}"
            (typing if for_typing else runtime)[module].add(label)
    for module, labels in runtime.items():
        typing[module] -= labels
    if any(typing.values()) or aliases:
        runtime["typing"].add("TYPE_CHECKING")
    parts = [f'"""{target.docstring}"""', "from __future__ import annotations"]
    parts += [target.before] if target.before else []
    parts += list(_import_lines(runtime))
    if "TYPE_CHECKING" in runtime["typing"]:
        inside = [*_import_lines(typing), *(_unindented(a) for a in aliases)]
        block = "\n".join(inside).replace("\n", "\n    ")
        parts += [f"\n\nif TYPE_CHECKING:\n    {block}"]
    return "\n\n".join(["\n".join(parts), *bodies]) + "\n"


def _import_lines(imports: Mapping[str, set[str | None]]) -> Iterator[str]:
    for module, labels in sorted(imports.items()):
        if None in labels:
            yield f"import {module}"
        names = sorted(label for label in labels if label)
        if names:
            yield f"from {module} import {', '.join(names)}"


def _unindented(text: str) -> str:
    return "\n".join(line.removeprefix("    ") for line in text.splitlines())
