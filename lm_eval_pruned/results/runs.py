"""The results of one model, or of a sweep, from one or several results files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.files import (
    ResultsError,
    Run,
    left_of,
    newest_first,
    read_json,
    read_results_file,
)
from lm_eval_pruned.results.folder import ERROR, FLOOR, UNITS, read_definition


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


@dataclass(frozen=True)
class Failure:
    """A configuration and task of a sweep that failed, and the error in one line."""

    run: str
    task: str
    message: str


@dataclass(frozen=True)
class SweepResults:
    """What a sweep found: a run for each configuration with results, and ``sweep.json``.

    `floors` are the runs of models that know nothing. They are not sizes of the model, and what compares
    `runs` does not count them.
    """

    path: Path
    definition: Mapping[str, Any]
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...] = ()
    floors: tuple[Run, ...] = ()


def read_sweep(path: str | Path) -> SweepResults:
    """Read a sweep folder; ResultsError if it is none that is known here, or no unit is finished."""
    path = Path(path)
    definition, names = read_definition(path)
    runs: list[Run] = []
    floors: list[Run] = []
    failures = []
    for name in names:
        folder = path / UNITS / name
        done = []
        for unit in sorted(folder.glob("*/")):
            if newest_first(unit):
                done.append(read_newest(unit))
            elif (unit / ERROR).is_file() and not name.startswith(FLOOR):
                message = str(read_json(unit / ERROR).get("message") or "no message")
                first_line = message.strip().partition("\n")[0]
                failures.append(Failure(name, unit.name, first_line))
        if done:
            run = _joined(name, folder, done)
            (floors if run.is_floor else runs).append(run)
    if not runs:
        failed = f"; {len(failures)} failed" if failures else ""
        raise ResultsError(f"{path} holds no finished unit yet{failed}.")
    known = {run.name for run in (*runs, *floors)}
    absent = [n for n in names if n not in known and not n.startswith(FLOOR)]
    if absent:
        note = f"{path} holds no finished unit of {', '.join(absent)}."
        runs[0] = replace(runs[0], notes=(note,))
    return SweepResults(path, definition, tuple(runs), tuple(failures), tuple(floors))


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Read a results file, or a folder as ``lm_eval --output_path`` fills it, as one run.

    Of several results of one model in a folder the newest of each task counts. `name` is for tables.
    ResultsError if there is no such path, or it cannot be read as one run.
    """
    path = Path(path)
    if path.is_file():
        return replace(read_results_file(path), name=name or path.stem)
    runs = [read_results_file(file) for file in reversed(newest_first(path))]
    if not runs:
        raise ResultsError(
            f"{path} does not exist or holds no results_*.json: give the folder that "
            "`lm_eval --output_path` named, or a results file."
        )
    is_configuration = path.parent.name == UNITS
    if not is_configuration and any(_model(run) != _model(runs[0]) for run in runs):
        files = ", ".join(str(run.path.relative_to(path)) for run in runs)
        raise ResultsError(
            f"{path} holds the results of several models ({files}): name one of them."
        )
    return _joined(name or path.name, path, runs)


def read_newest(folder: Path) -> Run:
    """Read the newest results file of a folder that holds at least one."""
    return read_results_file(newest_first(folder)[0])


def _model(run: Run) -> list[Any]:
    keys = ("model", "model_args", "model_sha", "peft_sha", "delta_sha")
    width = run.pruning.get("intermediate_size_after")
    return [*map(run.config.get, keys), width, *left_of(run.pruning)]


def _joined(name: str, path: Path, parts: Sequence[Run]) -> Run:
    """Join results of one model, the oldest first; of each task the last counts."""
    by_task = ("versions", "subtasks", "samples", "energy", "settings", "stopping")
    joined: dict[str, Any] = {
        each: {k: v for part in parts for k, v in getattr(part, each).items()}
        for each in ("scores", *by_task)
    }
    return replace(parts[-1], name=name, path=path, **joined)


def setting_of(run: Run, name: str) -> Any:
    """Return a setting of all tasks of a run; by task where they do not share it."""
    by_task = {task: each.get(name) for task, each in run.settings.items()}
    first, *others = by_task.values()
    return first if all(each == first for each in others) else by_task


def notes_on(runs: Iterable[Run]) -> list[str]:
    """Return what is missing from the folders of runs, one sentence each."""
    return [note for run in runs for note in run.notes]
