"""What SECURITY.md says that the package does not do: a reading of its source."""

from __future__ import annotations

import ast

import pytest

from tests.helpers import checkpoints
from tests.project.test_requirements import SHIPPED


#: Modules that unpickle, start programs or talk to other hosts.
MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"),
    *("marshal", "subprocess", "multiprocessing", "pty", "code", "runpy"),
    *("requests", "urllib", "urllib3", "http", "httpx", "aiohttp", "ftplib"),
    *("smtplib", "telnetlib", "xmlrpc"),
}
FUNCTIONS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"),
    *("torch.load", "numpy.load", "np.load", "pandas.read_pickle"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("os.system", "os.popen", "os.startfile", "socket.create_connection"),
    "socket.socket",
}
STARTS = ("os.exec", "os.spawn", "os.posix_spawn")


def broken_promises(source: str) -> list[str]:
    """Return the names in `source` that SECURITY.md rules out."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FUNCTIONS or called.startswith(STARTS):
                found.append(called)
        for name in names:
            if name.partition(".")[0] in MODULES or name in FUNCTIONS:
                found.append(name)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def late():\n    from pickle import loads",
        "import urllib.request as request",
        "from torch import load",
        "torch.load(path, weights_only=True)",
        "value = eval(text)",
        "os.execvp(program, arguments)",
        "yaml.load(text, Loader=loader)",
    ],
)
def test_a_broken_promise_is_seen(source):
    assert broken_promises(source)


def test_harmless_neighbours_are_allowed():
    source = (
        "import re, socket, yaml\nmodel.eval()\nre.compile('a')\nyaml.safe_load(text)"
    )
    assert not broken_promises(f"{source}\nsocket.gethostname()")


def test_the_package_keeps_its_promises():
    broken = {
        path.relative_to(checkpoints.ROOT).as_posix(): names
        for folder in SHIPPED
        for path in sorted((checkpoints.ROOT / folder).rglob("*.py"))
        if (names := broken_promises(path.read_text("utf-8")))
    }
    assert not broken
