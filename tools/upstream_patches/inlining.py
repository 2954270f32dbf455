"""Writes out, in place of an import from our package, the definitions that it names.

A script for the harness imports what it has in common with us. What it gets is our source, with
all that this needs from our other modules, each definition after those that it needs.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .merge import Rules, _import_lines, _Source, _take_apart
from .patch import ROOT


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


PACKAGE = "lm_eval_pruned"


def inlined(script: Path, rules: Mapping[str, Rules]) -> str:
    """Return a script whose imports from our package are written out.

    Args:
        script: A Python file. Names that it defines itself stay its own.
        rules: What changes, by the name of our module.

    Raises:
        ValueError: A rule does not fit its module; two of our modules define one name; what is
            taken needs a module that is neither numpy nor in the standard library.
    """
    text = script.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    inlining = _Inlining(_take_apart(text), rules)
    parts: list[str] = []
    at, header = 0, -1
    for node in tree.body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        parts.append("\n".join(lines[at : node.lineno - 1]))
        at = node.end_lineno or node.lineno
        module = getattr(node, "module", None) or ""
        if module.split(".")[0] == PACKAGE:
            parts += inlining.take(module, [each.name for each in node.names])
        elif header < 0:
            header = len(parts)
    parts.append("\n".join(lines[at:]))
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    inlining.need(inlining.script, read)
    start = "\n".join([*parts[:header], inlining.header()])
    rest = (part.strip("\n") for part in parts[header:])
    return "\n\n\n".join([start, *filter(None, rest)]) + "\n"


@dataclass
class _Inlining:
    script: _Source
    rules: Mapping[str, Rules]
    sources: dict[str, _Source] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)
    imports: dict[bool, dict[str, set[str | None]]] = field(
        default_factory=lambda: {False: defaultdict(set), True: defaultdict(set)}
    )

    def take(self, module: str, names: Iterable[str]) -> list[str]:
        """Return the texts of definitions of a module of ours, and of all that they need."""
        if module not in self.sources:
            file = ROOT / (module.replace(".", "/") + ".py")
            name, text = file.stem, file.read_text(encoding="utf-8")
            text = self.rules.get(name, Rules()).apply(name, text)
            self.sources[module] = _take_apart(text)
        source, parts = self.sources[module], []
        for name in names:
            if name in self.script.definitions:
                continue
            if name in self.taken:
                if self.taken[name] != module:
                    raise ValueError(
                        f"{self.taken[name]} and {module} both define {name}."
                    )
                continue
            definition = source.definitions[name]
            self.taken.update(dict.fromkeys(definition.names, module))
            parts += self.need(source, definition.uses)
            parts += self.take(
                module, [n for n in source.definitions if n in definition.uses]
            )
            parts.append(definition.text)
        return parts

    def need(self, source: _Source, uses: set[str]) -> list[str]:
        """Note what is imported for `uses`; return the texts of what is ours among them."""
        parts: list[str] = []
        for used in sorted(uses & source.imports.keys()):
            module, imported, typing = source.imports[used]
            root = module.split(".")[0]
            if root == PACKAGE:
                if source is not self.script:
                    parts += self.take(module, [str(imported)])
            elif root == "numpy" or root in sys.stdlib_module_names:
                if imported is None and used != module:
                    module = f"{module} as {used}"
                self.imports[typing][module].add(imported)
            else:
                raise ValueError(f"{module} is needed for {used}: give a rule for it.")
        return parts

    def header(self) -> str:
        """Return the imports, which the harness's linter sorts."""
        now, typing = self.imports[False], self.imports[True]
        lines = ["from __future__ import annotations", ""]
        if typing:
            now["typing"].add("TYPE_CHECKING")
        lines += _import_lines(now)
        if typing:
            lines += ["", "", "if TYPE_CHECKING:"]
            lines += [f"    {line}" for line in _import_lines(typing)]
        return "\n".join(lines)
