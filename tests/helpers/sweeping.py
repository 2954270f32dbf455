"""Tasks of a few documents, and sweeps over them, for the tests of sweeps."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from unittest import mock

import torch
from tqdm import tqdm


if TYPE_CHECKING:
    from collections.abc import Iterator

TASK = """\
task: {task}
custom_dataset: !function utils.load
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
CHOICE = """\
doc_to_target: answer
doc_to_choice: ["yes", "no", "perhaps"]"""
SENTENCE = """\
doc_to_target: "{{question}}"
generation_kwargs: {until: [], do_sample: true, temperature: 1.0, max_gen_toks: 3}"""
UTILS = """\
import json
from pathlib import Path

from datasets import Dataset


def load(**kwargs):
    lines = Path(__file__).with_name("questions.jsonl").read_text().splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def cannot_be_had(**kwargs):
    raise ConnectionError("the data set cannot be had")
"""
GROUPS = {
    "both.yaml": "group: tiny_both\ntask:\n  - tiny_choice\n  - task: tiny_sentence\n"
    "    num_fewshot: 0\n",
    "nested.yaml": "group: tiny_nested\ntask:\n  - group: tiny_scored\n    num_fewshot: 1\n"
    "  - group: inline\n    task: [tiny_sentence]\n",
    "scored.yaml": "group: tiny_scored\ntask:\n  - tiny_choice\naggregate_metric_list:\n"
    "  - metric: acc\n    weight_by_size: true\nmetadata:\n  version: 1.0\n",
}


def sweep_options(
    model: Path, written: Path, folder: Path, **more: Any
) -> dict[str, Any]:
    """Return options of a sweep of one size over tasks of `write_tasks`, into `folder`."""
    return {
        "model_args": {"pretrained": str(model)},
        "ratios": ["1.5"],
        "tasks": ["tiny_both"],
        "include_path": str(written),
        "output_path": str(folder),
        "device": "cpu",
        "floors": False,
        **more,
    }


def write_tasks(folder: Path, documents: int = 4) -> Path:
    """Write two tasks and two groups of them to `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, kind, metric, more in (
        ("choice", "multiple_choice", "acc", CHOICE),
        ("sentence", "generate_until", "exact_match", SENTENCE),
    ):
        text = TASK.format(task=f"tiny_{name}", kind=kind, metric=metric, more=more)
        (folder / f"{name}.yaml").write_text(text)
    rows = ({"question": f"Is {n} even?", "answer": n % 2} for n in range(documents))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, text in {**GROUPS, "utils.py": UTILS, "questions.jsonl": lines}.items():
        (folder / name).write_text(text)
    return folder


def change(tasks: str | Path, file: str, old: str, new: str) -> None:
    """Replace a text in a file of `write_tasks`; add it where `old` is empty."""
    path = Path(tasks, file)
    text = path.read_text() if path.exists() else ""
    assert old in text
    path.write_text(text.replace(old, new, 1))


def forked(run) -> int:
    """Run a function in a forked process and return the exit code that it returns."""
    child = os.fork()
    if not child:
        _run_fork(run)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_fork(run) -> NoReturn:
    code = 99
    try:
        # tqdm's own lock is shared among forks: one killed inside it would block the next.
        lock, bars = threading.RLock(), [tqdm]
        for bar in bars:
            bar.set_lock(lock)
            bars.extend(bar.__subclasses__())
        # torch makes a new pool of threads at its first use in a fork, and fails if two
        # threads that load a model are the first at once.
        torch.set_num_threads(torch.get_num_threads())
        code = run()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(code)


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Fill the disk of a sweep's folder when its second unit is written."""
    flush = os.fsync

    def full(descriptor):
        if files_of(folder) and [*folder.glob(".unfinished/sweep/*")]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with mock.patch.object(os, "fsync", full):
        yield


def limit_units(patch, tasks: Path, seconds: float, start: str = "fork") -> None:
    """Have a unit reach ``--unit_timeout`` once ``tiny_sentence`` holds it up, however fast the machine is.

    The process of units starts as told: a fork is ready at once, and ``spawn`` is what users have.
    """
    context, poll = multiprocessing.get_context(start), Connection.poll
    acted = tasks.parent / "acted"

    def until_held_up(channel, timeout=0.0):
        if timeout != seconds:
            return poll(channel, timeout)
        while not poll(channel, 0.05):
            if acted.exists() and acted.read_text() == "wait":
                acted.unlink()
                return False
        return True

    patch.setattr(multiprocessing, "get_context", lambda _: context)
    patch.setattr(Connection, "poll", until_held_up)


def results_of(folder: str | Path) -> dict[str, dict]:
    """Return what each unit's results file and samples say, without times and places."""
    found = {}
    for unit in sorted(Path(folder).glob("units/*/*")):
        (file,) = unit.glob("results_*.json")
        results = json.loads(file.read_text())
        samples = {
            path.name.rpartition("_")[0]: [*map(json.loads, path.open())]
            for path in sorted(unit.glob("samples_*.jsonl"))
        }
        found[f"{unit.parent.name}/{unit.name}"] = {
            "scores": results["results"],
            "hashes": results["task_hashes"],
            "samples": samples,
        }
    return found


def files_of(folder: str | Path) -> dict[str, tuple[str, ...]]:
    """Return the names of the files of each unit; results carry the time in theirs."""
    return {
        "/".join(unit.parts[-2:]): tuple(sorted(each.name for each in unit.iterdir()))
        for unit in Path(folder).glob("units/*/*")
    }


def errors_of(folder: str | Path) -> dict[str, dict[str, str]]:
    """Return type, message and traceback of the units that failed."""
    return {
        "/".join(file.parts[-3:-1]): json.loads(file.read_text())
        for file in Path(folder).glob("units/*/*/error.json")
    }


ACTING = """

def acting(doc, results):
    import os, signal, time

    # Not beside the tasks, whose files decide whether a unit is done.
    act = Path(__file__).parents[1] / "act"
    if act.exists():
        word = act.read_text()
        act.rename(act.with_name("acted"))
        if word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "interrupt":
            raise KeyboardInterrupt
        if word == "wait":
            time.sleep(3600)
        raise ValueError("it cannot be scored") from RuntimeError(word)
    return {"exact_match": float(results[0] == doc["question"])}
"""


def write_acting_tasks(folder: Path) -> Path:
    """Write the tasks of `write_tasks`, of which ``tiny_sentence`` may act as `act_once` says."""
    write_tasks(folder)
    change(folder, "utils.py", "\n\ndef load", f"{ACTING}\n\ndef load")
    scored = "process_results: !function utils.acting\nmetric_list:"
    change(folder, "sentence.yaml", "metric_list:", scored)
    return folder


def act_once(tasks: Path, word: str) -> None:
    """Have ``tiny_sentence`` kill, interrupt or hold up (``wait``) the next process that scores it.

    Another word is the message of the error that causes the one it raises.
    """
    (tasks.parent / "acted").unlink(missing_ok=True)
    (tasks.parent / "act").write_text(word)


@contextlib.contextmanager
def started(run, tasks: Path) -> Iterator[None]:
    """Run a function in a forked process, which ``tiny_sentence`` holds up; kill it at the end."""
    child = os.fork()
    if not child:
        _run_fork(run)
    try:
        while not (tasks.parent / "acted").exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the process ended"
            time.sleep(0.05)
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
