"""Stand-ins for wandb and trackio, installed for one test.

Each notes its calls as lines of JSON in a file, which the test reads; none has a network.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from pathlib import Path

NOTE = """\
import json
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

__version__ = "0.99"
LOG = Path(__file__).with_name("calls.jsonl")
config = {}
run = None


def note(what, **more):
    with LOG.open("a") as file:
        file.write(json.dumps({"what": what, **more}, default=str) + "\\n")


def log(values, step=None):
    note("log", keys=sorted(values))


def finish(exit_code=0):
    note("finish")


def anything(*args, **named):
    return SimpleNamespace(add_data=anything, new_file=lambda *_, **__: nullcontext(StringIO()))


Trace = Table = Artifact = anything


def init(project=None, name=None):
    if project == "refused":
        raise RuntimeError("not logged in")
    note("init", project=project, name=name)
    config = SimpleNamespace(update=lambda values, **_: note("config", keys=sorted(values)))
    return SimpleNamespace(
        config=config, summary={}, log=log, log_artifact=anything, finish=finish
    )
"""


def install(monkeypatch, folder: Path):
    """Make both packages importable; return what reads the notes of one."""
    for name in ("wandb", "trackio"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(NOTE)
    printer = folder / "wandb" / "sdk" / "lib"
    printer.mkdir(parents=True)
    (printer / "printer.py").write_text("def new_printer():\n    return None\n")
    monkeypatch.syspath_prepend(str(folder))
    for name in [n for n in sys.modules if n.split(".")[0] in ("wandb", "trackio")]:
        monkeypatch.delitem(sys.modules, name)

    def calls(name):
        return [*map(json.loads, (folder / name / "calls.jsonl").open())]

    return calls
