"""What SECURITY.md says that the package does not do: a reading of its source."""

from __future__ import annotations

import ast

from tests.project.test_types import modules


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
            found += [called] * (called in FUNCTIONS or called.startswith(STARTS))
        found += [n for n in names if n.partition(".")[0] in MODULES or n in FUNCTIONS]
    return found


def test_a_broken_promise_is_seen():
    for source in (
        "def late():\n    from pickle import loads",
        "import urllib.request as request",
        "torch.load(path, weights_only=True)",
        "os.execvp(program, arguments)",
    ):
        assert broken_promises(source)
    assert not broken_promises("import re, yaml\nmodel.eval()\nre.compile('a')")


def test_the_package_keeps_its_promises():
    for path in modules().values():
        assert not broken_promises(path.read_text("utf-8")), path
