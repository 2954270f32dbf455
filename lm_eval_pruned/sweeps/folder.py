"""The folder of a sweep: how a unit gets there whole or not at all.

A unit is written below ``DIR/.unfinished``, flushed to the disk and renamed into place,
so a process that dies at any moment leaves either the whole unit or none of it. What the
files are called and say is `lm_eval_pruned.results.runs`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.runs import (
    DEFINITION,
    ERROR,
    UNIT,
    as_text,
    error_text,
    read_unit,
    unit_folder,
)
from lm_eval_pruned.sweeps.tasks import fingerprint
from lm_eval_pruned.util.atomic import sync, write_atomically


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lm_eval_pruned.results.runs import UnitRecord


class SweepFolder:
    """The folder of one sweep, or of part I of N where `shard` is ``(I, N)``.

    Processes for which it is `shared` hold units of it, one at a time.
    """

    def __init__(
        self,
        path: str | Path,
        shard: tuple[int, int] | None = None,
        shared: bool = False,
    ) -> None:
        self.path, self._shared = Path(path), shared
        self._part = f"shard-{shard[0]}-of-{shard[1]}" if shard else "sweep"
        self._unfinished = self.path / ".unfinished" / self._part

    def read(self, configuration: str, task: str) -> UnitRecord | None:
        """Return what is there for a unit; None for nothing, or nothing whole."""
        return read_unit(unit_folder(self.path, configuration, task))

    def write_definition(self, definition: dict[str, Any]) -> None:
        """Write ``sweep.json``, the same bytes for the same definition."""
        write_atomically(self.path / DEFINITION, as_text(definition))

    @contextlib.contextmanager
    def new_unit(self) -> Iterator[Path]:
        """Give an empty folder on the sweep's file system; what is left of it goes."""
        folder = self._unfinished / uuid.uuid4().hex
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(
        self,
        folder: Path,
        names: tuple[str, str],
        seconds: float,
        definition: Mapping[str, Any],
        error: dict[str, str] | None = None,
    ) -> dict[str, float]:
        """Make `folder`, one of `new_unit`, the unit's folder, and return the unit's own scores.

        Results that were there before move to ``DIR/superseded``, so that a mistyped command
        loses none. The harness's files go where the unit has failed.
        """
        scores: dict[str, float] = {}
        if error is None:
            (results,) = folder.glob("results_*.json")
            scores = _own_scores(json.loads(results.read_text(encoding="utf-8")))
        else:
            for file in folder.iterdir():
                file.unlink()
            (folder / ERROR).write_text(error_text(error), encoding="utf-8")
        unit = {
            "configuration": names[0],
            "task": names[1],
            "fingerprint": fingerprint(definition),
            "seconds": round(seconds, 3),
            "definition": definition,
        }
        (folder / UNIT).write_text(as_text(unit), encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            sync(path)
        target = unit_folder(self.path, *names)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            self._set_aside(target)
        os.rename(folder, target)
        for path in (target.parent, target.parent.parent, self.path):
            sync(path)
        return scores

    def _set_aside(self, target: Path) -> None:
        record = read_unit(target)
        if record is not None and record.error is not None:
            shutil.rmtree(target)
            return
        name = record.fingerprint[:12] if record else "unreadable"
        place = self.path / "superseded" / target.parent.name / target.name / name
        place.parent.mkdir(parents=True, exist_ok=True)
        number = itertools.count(1)
        while place.exists():
            place = place.with_name(f"{name}-{next(number)}")
        os.rename(target, place)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, or its part, against a second process, and remove what one that died left.

        Where it is shared, units are held instead; see `claimed`.

        Raises:
            ValueError: Another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self._shared:
            yield
            return
        with locked(self.path / f"{self._part}.lock"):
            shutil.rmtree(self._unfinished, ignore_errors=True)
            yield

    @contextlib.contextmanager
    def claimed(self, names: tuple[str, str]) -> Iterator[bool]:
        """Hold a unit, and say whether it could be held: another process may have it."""
        key = unit_folder(self.path, *names).relative_to(self.path)
        lock = self.path / ".locks" / key.parent / f"{key.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(lock))
            except ValueError:
                yield False
                return
            self._unfinished = self.path / ".unfinished" / key
            shutil.rmtree(self._unfinished, ignore_errors=True)
            yield True


@contextlib.contextmanager
def locked(file: Path, wait: float = 0) -> Iterator[None]:
    """Hold a file against other processes, after at most `wait` seconds; -1 waits for ever.

    Raises:
        ValueError: Another process still holds it.
    """
    from filelock import FileLock, Timeout

    try:
        lock = FileLock(file).acquire(timeout=wait)
    except Timeout:
        raise ValueError(
            f"--output_path {file.parent} is in use by another sweep: wait until it has ended, "
            "stop it, or pass another folder."
        ) from None
    with lock:
        yield


def write_results(results: dict[str, Any], tracker: Any, folder: Path) -> None:
    """Let the harness write its files; OSError if one is missing or cut short, which it only logs."""
    samples = results.pop("samples", None) or {}
    # The tracker writes beside a path that ends in .json.
    tracker.output_path = str(folder / "results.json")
    tracker.save_results_aggregated(results=results, samples=samples or None)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)
    total = sum(map(len, samples.values()))
    written = (file.read_bytes() for file in folder.glob("samples_*.jsonl"))
    lines = sum(content.count(b"\n") for content in written)
    whole = [file.read_bytes()[-1:] for file in folder.glob("results_*.json")] == [b"}"]
    if lines != total or not whole:
        raise OSError(
            f"{lines} of {total} samples and {'their' if whole else 'no'} results were written to "
            f"{folder}: is the disk full?"
        )


def _own_scores(results: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a results file's group, or of its only task."""
    rows = results.get("groups") or results.get("results") or {}
    row: dict[str, Any] = next(iter(rows.values()), {})
    return {
        name.removesuffix(",none"): value
        for name, value in row.items()
        if isinstance(value, (int, float)) and "," in name and "_stderr," not in name
    }
