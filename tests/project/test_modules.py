"""Every installed module: its types are checked, its examples run, its messages are filled in."""

from __future__ import annotations

import ast
import doctest
import importlib
import re

import pytest
from mypy.main import process_options

import lm_eval_pruned
from tests.helpers.checkpoints import ROOT
from tests.helpers.installed import modules


WITH_EXAMPLES = [
    n for n, path in modules().items() if ">>> " in path.read_text("utf-8")
]


@pytest.mark.parametrize("name", lm_eval_pruned.__all__)
def test_every_public_name_shows_an_example(name):
    found = doctest.DocTestFinder().find(getattr(lm_eval_pruned, name), name)
    assert any(name in each.source for test in found for each in test.examples)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    flags = doctest.ELLIPSIS | doctest.REPORT_NDIFF
    done = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert done.attempted, "a prompt outside of a docstring"
    assert not done.failed


def test_mypy_checks_every_module_under_its_installed_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    sources, _ = process_options([])
    assert {source.module for source in sources} == modules().keys()


#: Modules that Windows does not have, and what `os` and `signal` lack there.
POSIX = re.compile(
    r"fcntl|grp|posix|pty|pwd|resource|syslog|termios|tty"
    r"|os\.(fork(pty)?|(get|set)e?[ug]id|[gs]etp?gid|setsid|killpg|openpty|mkfifo|f?statvfs|l?chown|sync"
    r"|O_(DIRECTORY|NOFOLLOW)|sched_\w+|getloadavg|sysconf|WNOHANG)"
    r"|signal\.(SIG(KILL|ALRM|HUP|USR[12]|CHLD|STOP)|alarm|setitimer|pthread_\w+)"
)


def test_no_module_needs_what_windows_lacks():
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Import(names=names):
                    used = [alias.name for alias in names]
                case ast.ImportFrom(module=str(module), names=names):
                    used = [module, *(f"{module}.{alias.name}" for alias in names)]
                case ast.Attribute(value=ast.Name(id=module), attr=attribute):
                    used = [f"{module}.{attribute}"]
                case _:
                    continue
            assert not [*filter(POSIX.fullmatch, used)], f"{name}, line {node.lineno}"


def test_no_part_of_a_message_lacks_its_f():
    """Of strings that Python joins, one without an f shows its braces to the user."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            plain = [part.value for part in parts if isinstance(part, ast.Constant)]
            found = re.search(r"\{[a-z_][\w.]*\}", " ".join(plain))
            assert not found, f"{name}, line {node.lineno}"
