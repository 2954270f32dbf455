"""The folder of a sweep: how a unit gets there whole or not at all.

A unit is written below ``DIR/.unfinished``, flushed to the disk and renamed into place,
so a process that dies at any moment leaves either the whole unit or none of it. What the
files are called and say is `lm_eval_pruned.results.folder`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
from lm_eval_pruned.results.folder import (
    DEFINITION,
    UNIT,
    as_text,
    read_unit,
    unit_folder,
)
from lm_eval_pruned.util.atomic import sync, umask, write_atomically


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval_pruned.results.folder import UnitRecord

logger = logging.getLogger("lm_eval.pruned.sweep")


def own_scores(results: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a results file's group, or of its only task.

    A filter's name is kept where it is not ``none``: ``exact_match,strict-match``.
    """
    rows = results.get("groups") or results.get("results") or {}
    row: dict[str, Any] = next(iter(rows.values()), {})
    return {
        name.removesuffix(",none"): value
        for name, value in row.items()
        if isinstance(value, (int, float)) and "," in name and "_stderr," not in name
    }


class SweepFolder:
    """Reads and writes the folder of one sweep.

    Args:
        path: The folder; made when the first thing is written.
        shard: ``(I, N)`` where this process runs one part of the sweep.
    """

    def __init__(self, path: str | Path, shard: tuple[int, int] | None = None) -> None:
        self.path = Path(path)
        self._part = f"shard-{shard[0]}-of-{shard[1]}" if shard else "sweep"
        self._is_shard = shard is not None

    def unit(self, configuration: str, task: str) -> Path:
        """Return where a unit belongs."""
        return unit_folder(self.path, configuration, task)

    def read(self, configuration: str, task: str) -> UnitRecord | None:
        """Return what is there for a unit; None for nothing, or nothing whole."""
        return read_unit(self.unit(configuration, task))

    def finished(self, configuration: str) -> Iterator[UnitRecord]:
        """Yield what is there of a configuration's finished units, whatever their task."""
        for place in sorted(self.unit(configuration, "any").parent.glob("*")):
            record = read_unit(place)
            if record is not None and record.error is None:
                yield record

    def write_definition(self, definition: dict[str, Any]) -> None:
        """Write ``sweep.json``, the same bytes for the same definition."""
        write_atomically(self.path / DEFINITION, as_text(definition))

    @contextlib.contextmanager
    def new_unit(self) -> Iterator[Path]:
        """Give an empty folder on the sweep's file system; what is left of it goes."""
        parent = self.path / ".unfinished" / self._part
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent))
        folder.chmod(0o777 & ~umask())
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(
        self, folder: Path, configuration: str, task: str, unit: dict[str, Any]
    ) -> None:
        """Make `folder` the unit's folder.

        What was there before moves to ``DIR/superseded``, so that results made
        under another definition are never lost to a mistyped command.

        Args:
            folder: From `new_unit`, with the unit's files.
            configuration: Id of the configuration.
            task: Name of the task.
            unit: Content of ``unit.json`` without the schema version.
        """
        (folder / UNIT).write_text(as_text(unit), encoding="utf-8")
        for file in folder.iterdir():
            sync(file)
        sync(folder)
        target = self.unit(configuration, task)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            self._set_aside(target)
        os.rename(folder, target)
        for parent in (target.parent, target.parent.parent, self.path):
            sync(parent)

    def _set_aside(self, target: Path) -> None:
        record = self.read(target.parent.name, target.name)
        if record is not None and record.error is not None:
            shutil.rmtree(target)
            return
        name = record.fingerprint[:12] if record else "unreadable"
        parent = self.path / "superseded" / target.parent.name / target.name
        parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):
            place = parent / (f"{name}-{attempt}" if attempt else name)
            if not place.exists():
                break
        os.rename(target, place)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second sweep, a shard against its double.

        Shards of one sweep run side by side; a whole sweep runs alone.

        Raises:
            ValueError: Another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock(self.path / "sweep.lock", shared=self._is_shard))
            if self._is_shard:
                stack.enter_context(lock(self.path / f"{self._part}.lock"))
            self._sweep_up()
            yield

    def _sweep_up(self) -> None:
        """Remove what processes that died left unfinished, but no running shard's."""
        unfinished = self.path / ".unfinished"
        if self._is_shard:
            unfinished = unfinished / self._part
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def lock(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a file against other processes, where the file system has locks.

    Args:
        path: The file; made if it is missing.
        shared: Against those alone that do not share it.
        wait: Until the others are gone.

    Raises:
        ValueError: Another process holds it.
    """
    if fcntl is None:
        logger.warning("This system has no flock: nothing guards %s.", path.parent)
        yield
        return
    with open(path, "a+", encoding="utf-8") as file:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
                logger.warning(
                    "The file system of %s has no locks (%s): make sure that only one "
                    "sweep writes there.",
                    path.parent,
                    error.strerror,
                )
            else:
                file.seek(0)
                holder = file.read().strip()
                raise ValueError(
                    f"--output_path {path.parent} is in use by another sweep"
                    f"{f' ({holder})' if holder else ''}: wait until it has ended, stop it, "
                    "or pass another folder."
                ) from None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
