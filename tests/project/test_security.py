"""What SECURITY.md says that the package does not do: a reading of its source."""

from __future__ import annotations

import ast
import re

from tests.helpers.installed import modules


#: What unpickles, runs text as code, starts programs or talks to other hosts, by full name.
RULED_OUT = re.compile(
    r"(_?pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal|subprocess|multiprocessing|pty|code"
    r"|runpy|requests|urllib3?|http|httpx|aiohttp|ftplib|smtplib|telnetlib|xmlrpc)(\..*)?"
    r"|(builtins\.)?(eval|exec)|compile|__import__|torch\.load|(numpy|np)\.load|pandas\.read_pickle"
    r"|yaml\.(load|full_load|unsafe_load|load_all)|socket\.(create_connection|socket)"
    r"|os\.(system|popen|startfile|(exec|spawn|posix_spawn).*)"
)


def broken_promises(source: str) -> list[str]:
    """Return the names in `source` that SECURITY.md rules out."""
    names = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                names += [alias.name for alias in node.names]
            case ast.ImportFrom(level=0):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            case ast.Call():
                names.append(ast.unparse(node.func))
    return [name for name in names if RULED_OUT.fullmatch(name)]


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
