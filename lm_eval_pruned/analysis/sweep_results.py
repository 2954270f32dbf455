"""What a sweep folder holds so far: its runs, and what failed.

How a sweep is planned and written is a matter of `lm_eval_pruned.sweeps`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.analysis.results_file import ResultsError, Run, read_json
from lm_eval_pruned.analysis.runs import merged_runs, read_newest


if TYPE_CHECKING:
    from collections.abc import Mapping


#: Version of a sweep's folder, its ``sweep.json`` and ``unit.json``.
SWEEP_SCHEMA = 1


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
    file = path / "sweep.json"
    if not file.is_file():
        raise ResultsError(
            f"{path} is not a sweep folder: it has no sweep.json. `lm-eval-pruned sweep` "
            "makes one."
        )
    definition = read_json(file)
    schema = definition.get("schema_version")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ResultsError(f"{file} gives no schema version: it is not a sweep's.")
    if schema > SWEEP_SCHEMA:
        raise ResultsError(
            f"{file} has schema version {schema}, and this version of lm-eval-pruned reads up "
            f"to {SWEEP_SCHEMA}: upgrade lm-eval-pruned."
        )
    runs, failures, absent = [], [], []
    for identifier in _configuration_ids(file, definition):
        done = []
        for unit in sorted(path.glob(f"units/{identifier}/*/")):
            if any(unit.glob("results_*.json")):
                done.append(read_newest(unit))
            elif (unit / "error.json").is_file():
                failures.append(_read_failure(identifier, unit))
        if done:
            runs.append(merged_runs(identifier, path / "units" / identifier, done))
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


def _configuration_ids(file: Path, definition: Mapping[str, Any]) -> list[str]:
    configurations = definition.get("configurations")
    identifiers: list[Any] = [
        entry.get("id") if isinstance(entry, dict) else None
        for entry in (configurations if isinstance(configurations, list) else [])
    ]
    if not identifiers or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.=+-]+", name) and ".." not in name
        for name in identifiers
    ):
        raise ResultsError(
            f"{file} does not list its configurations, each with an id that can be a folder's name."
        )
    return identifiers


def _read_failure(run: str, unit: Path) -> Failure:
    message = str(read_json(unit / "error.json").get("message") or "").strip()
    return Failure(run, unit.name, message.splitlines()[0] if message else "no message")
