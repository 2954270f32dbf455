"""Stand-ins for wandb and trackio, installed for one test, and for the Hub's API.

Each notes its calls as lines of JSON in a file, which the test reads; none has a network.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import huggingface_hub


if TYPE_CHECKING:
    from pathlib import Path


WANDB = """\
import json
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

__version__ = "0.99"
run = None
LOG = Path(__file__).with_name("calls.jsonl")


def note(what, **more):
    with LOG.open("a") as file:
        file.write(json.dumps({"what": what, **more}, default=str) + "\\n")


class Config(dict):
    def update(self, values, allow_val_change=False):
        note("config", keys=sorted(values))


class Run:
    def __init__(self):
        self.config, self.summary = Config(), {}

    def log(self, values, step=None):
        note("log", keys=sorted(values), step=step)

    def log_artifact(self, artifact):
        note("artifact", name=artifact.name)

    def finish(self, exit_code=0):
        global run
        run = None
        note("finish", exit_code=exit_code)


def init(project=None, name=None, id=None, group=None, entity=None):
    global run
    if project == "refused":
        raise RuntimeError("not logged in")
    note("init", project=project, name=name, group=group)
    run = Run()
    return run


class Table:
    def __init__(self, columns):
        pass

    def add_data(self, *values):
        pass


class Artifact:
    def __init__(self, name, type):
        self.name = name

    @contextmanager
    def new_file(self, name, mode, encoding):
        yield StringIO()
"""

TRACKIO = """\
import json
from pathlib import Path

LOG = Path(__file__).with_name("calls.jsonl")
config = {}


def note(what, **more):
    with LOG.open("a") as file:
        file.write(json.dumps({"what": what, **more}, default=str) + "\\n")


class Trace:
    def __init__(self, messages, metadata):
        pass


def init(project, name=None, group=None):
    note("init", project=project, name=name)


def log(values, step=None):
    if "broken" in str(values):
        raise RuntimeError
    note("log", keys=sorted(values))


def finish():
    note("finish")
"""


def install(monkeypatch, folder: Path) -> SimpleNamespace:
    """Make both packages importable; return their notes, each as a function."""
    calls = {}
    for name, text in (("wandb", WANDB), ("trackio", TRACKIO)):
        package = folder / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(text)
        calls[name] = package / "calls.jsonl"
    printer = folder / "wandb" / "sdk" / "lib"
    printer.mkdir(parents=True)
    for place in (printer, printer.parent):
        (place / "__init__.py").touch()
    (printer / "printer.py").write_text("def new_printer():\n    return None\n")
    monkeypatch.syspath_prepend(str(folder))
    for name in [n for n in sys.modules if n.split(".")[0] in calls]:
        monkeypatch.delitem(sys.modules, name)

    def reader(file: Path):
        def read() -> list[dict]:
            if not file.exists():
                return []
            return [json.loads(line) for line in file.read_text().splitlines()]

        return read

    return SimpleNamespace(**{name: reader(file) for name, file in calls.items()})


def stand_in_for_the_hub(monkeypatch) -> list[tuple[str, dict]]:
    """Put a Hub into place that notes what it is asked; return the notes."""
    calls: list[tuple[str, dict]] = []

    class Hub:
        def __init__(self, token=None):
            self.token = token

        def whoami(self):
            calls.append(("whoami", {"token": self.token}))
            return {"name": "somebody"}

        def __getattr__(self, name):
            def call(**arguments):
                calls.append((name, arguments))
                return []

            return call

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return calls
