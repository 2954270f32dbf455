"""What a sweep folder holds so far: its runs, and what failed.

What its files are and say, `results.folder` knows; how a sweep is planned and written is a
matter of `lm_eval_pruned.sweeps`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.files import (
    ResultsError,
    Run,
    newest_first,
    read_json,
)
from lm_eval_pruned.results.folder import ERROR, UNITS, read_definition
from lm_eval_pruned.results.runs import merged_runs, read_newest


if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Failure:
    """One unit of a sweep that failed.

    Attributes:
        run: Name of the configuration.
        task: The task.
        message: The recorded error, in one line.
    """

    run: str
    task: str
    message: str


@dataclass(frozen=True)
class SweepResults:
    """A folder of runs that share everything but their pruning.

    Attributes:
        path: The folder.
        definition: ``sweep.json``.
        runs: One run per configuration that has results, in the order of the
            definition.
        failures: Units that failed.
    """

    path: Path
    definition: Mapping[str, Any]
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...] = ()


def read_sweep(path: str | Path) -> SweepResults:
    """Read a sweep folder: ``sweep.json`` and ``units/CONFIGURATION/TASK/``.

    Units that are neither done nor failed are left out, so the folder of a running
    sweep can be read.

    Raises:
        ResultsError: The folder is not a sweep of a schema known here, or holds no
            finished unit.
    """
    path = Path(path)
    definition, identifiers = read_definition(path)
    runs, failures, absent = [], [], []
    for identifier in identifiers:
        done = []
        for unit in sorted(path.glob(f"{UNITS}/{identifier}/*/")):
            if newest_first(unit):
                done.append(read_newest(unit))
            elif (unit / ERROR).is_file():
                failures.append(_read_failure(identifier, unit))
        if done:
            runs.append(merged_runs(identifier, path / UNITS / identifier, done))
        else:
            absent.append(identifier)
    if not runs:
        raise ResultsError(
            f"{path} holds no finished unit yet"
            + (f"; {len(failures)} failed." if failures else ".")
        )
    if absent:
        note = f"{path} holds no finished unit of {', '.join(absent)}."
        runs[0] = replace(runs[0], notes=(note,))
    return SweepResults(path, definition, tuple(runs), tuple(failures))


def _read_failure(run: str, unit: Path) -> Failure:
    message = str(read_json(unit / ERROR).get("message") or "").strip()
    return Failure(run, unit.name, message.splitlines()[0] if message else "no message")
