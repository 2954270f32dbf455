"""Writes out, in place of an import from our package, the definitions that it names.

A script for the harness imports what it has in common with us. What it gets is our source, with
all that it needs from our other modules; so the two never drift.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from .patch import ROOT


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


PACKAGE = "lm_eval_pruned"


def inlined(script: Path, edits: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Return a script whose imports from our package are written out.

    Args:
        script: A Python file. Names that it defines itself stay its own.
        edits: By name of a definition of ours, texts of its source and what stands
            for them.

    Raises:
        ValueError: A text to be replaced does not occur exactly once; two of our modules
            define one name; what is taken needs a module that is neither numpy nor in the
            standard library.
    """
    return _Inlining(_Source.read(script), edits).text()


@dataclass(frozen=True)
class _Source:
    name: str
    text: str

    @classmethod
    def read(cls, path: Path) -> _Source:
        return cls(path.stem, path.read_text(encoding="utf-8"))

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def body(self) -> list[ast.stmt]:
        return ast.parse(self.text).body

    @cached_property
    def guarded(self) -> list[ast.stmt]:
        """What is imported for annotations alone."""
        return [
            inner
            for node in self.body
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in node.body
        ]

    @cached_property
    def definitions(self) -> dict[str, ast.stmt]:
        found: dict[str, ast.stmt] = {}
        for node in self.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name] = node
            elif isinstance(node, ast.Assign):
                found |= {t.id: node for t in node.targets if isinstance(t, ast.Name)}
        return found

    def imports(self, nodes: list[ast.stmt]) -> dict[str, tuple[str, str]]:
        """Return module and name by what it is called here; the name of a module is empty."""
        found = {}
        for node in nodes:
            if isinstance(node, ast.Import):
                for each in node.names:
                    found[each.asname or each.name] = (each.name, "")
            elif isinstance(node, ast.ImportFrom):
                for each in node.names:
                    found[each.asname or each.name] = (node.module or "", each.name)
        return found

    def segment(self, node: ast.stmt) -> str:
        """Return the lines of a definition, with its decorators and what is said above it."""
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(each.lineno for each in decorators)]) - 1
        while first and self.lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first : node.end_lineno])


@dataclass
class _Inlining:
    script: _Source
    edits: Mapping[str, Sequence[tuple[str, str]]]
    taken: dict[str, str] = field(default_factory=dict)
    imported: dict[bool, set[tuple[str, str, str]]] = field(
        default_factory=lambda: {False: set(), True: set()}
    )

    def text(self) -> str:
        parts: list[str] = []
        at, header = 0, -1
        for node in self.script.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            parts.append("\n".join(self.script.lines[at : node.lineno - 1]))
            at = node.end_lineno or node.lineno
            module = getattr(node, "module", None) or ""
            if module.split(".")[0] == PACKAGE:
                parts += self._take(module, [each.name for each in node.names])
            elif header < 0:
                header = len(parts)
        parts.append("\n".join(self.script.lines[at:]))
        self._import(self.script, ast.parse(self.script.text))
        unused = set(self.edits) - set(self.taken)
        if unused:
            raise ValueError(f"Nothing is taken that is called {', '.join(unused)}.")
        before, after = parts[:header], parts[header:]
        start = "\n".join([*before, self._header()])
        sections = [start, *filter(None, (part.strip("\n") for part in after))]
        return "\n\n\n".join(sections) + "\n"

    def _take(self, module: str, names: Sequence[str]) -> list[str]:
        """Return the sources of definitions, each after those that it needs."""
        source = _Source.read(ROOT / (module.replace(".", "/") + ".py"))
        parts: list[str] = []
        for name in names:
            if name in self.script.definitions:
                continue
            if name in self.taken:
                if self.taken[name] != module:
                    raise ValueError(f"{module} and {self.taken[name]} define {name}.")
                continue
            self.taken[name] = module
            text = source.segment(source.definitions[name])
            for before, after in self.edits.get(name, ()):
                if text.count(before) != 1:
                    raise ValueError(
                        f"{name} of {module} holds {before!r} {text.count(before)} times, not once: "
                        "change the rule for it."
                    )
                text = text.replace(before, after)
            tree = ast.parse(text)
            parts += self._import(source, tree)
            needed = [n for n in _names(tree) if n in source.definitions and n != name]
            parts += self._take(module, needed)
            parts.append(text)
        return parts

    def _import(self, source: _Source, tree: ast.Module) -> list[str]:
        """Note the imports that some source needs; return the definitions of ours among them."""
        parts: list[str] = []
        for guarded, nodes in ((False, source.body), (True, source.guarded)):
            for name, (module, what) in source.imports(nodes).items():
                if name not in _names(tree):
                    continue
                root = module.split(".")[0]
                if root == PACKAGE:
                    if source is not self.script:
                        parts += self._take(module, [what])
                elif root in sys.stdlib_module_names or root == "numpy":
                    self.imported[guarded].add((module, what, name))
                else:
                    raise ValueError(f"{source.name} needs {module} for {name}.")
        return parts

    def _header(self) -> str:
        now, guarded = self.imported[False], self.imported[True]
        blocks = ["from __future__ import annotations", ""]
        if guarded:
            now = now | {("typing", "TYPE_CHECKING", "TYPE_CHECKING")}
        for third_party in (False, True):
            chosen = {e for e in now if (e[0] == "numpy") == third_party}
            blocks += [*_statements(chosen), ""]
        if guarded:
            blocks += ["", "if TYPE_CHECKING:"]
            blocks += [f"    {line}" for line in _statements(guarded)]
        return "\n".join(blocks).rstrip()


def _names(tree: ast.AST) -> list[str]:
    """Return the names that are read, in order, each once."""
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    ordered = sorted(nodes, key=lambda node: (node.lineno, node.col_offset))
    return list(dict.fromkeys(node.id for node in ordered))


def _statements(imports: set[tuple[str, str, str]]) -> list[str]:
    """Return imports as isort sorts them."""

    def renamed(what: str, name: str) -> str:
        return what if what == name else f"{what} as {name}"

    whole = sorted((m, n) for m, what, n in imports if not what)
    lines = [f"import {renamed(module, name)}" for module, name in whole]
    for module in sorted({m for m, what, _ in imports if what}):
        names = sorted(renamed(w, n) for m, w, n in imports if m == module and w)
        names.sort(key=lambda text: (not text.split(" ")[0].isupper(), text))
        lines.append(f"from {module} import {', '.join(names)}")
    return lines
