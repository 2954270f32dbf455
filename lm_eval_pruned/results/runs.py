"""The results of one model, or of a sweep, from files that several commands wrote."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.files import (
    ResultsError,
    Run,
    newest_first,
    read_json,
    read_results_file,
)
from lm_eval_pruned.results.folder import ERROR, UNITS, read_definition
from lm_eval_pruned.results.settings import SHARED, differing, label, listed


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
    """A folder of runs that share everything but their pruning.

    Attributes:
        path: The folder.
        definition: ``sweep.json``.
        runs: One run per configuration that has results, in the order of the definition.
        failures: Units that failed.
    """

    path: Path
    definition: Mapping[str, Any]
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...] = ()


def read_sweep(path: str | Path) -> SweepResults:
    """Read a sweep folder, which may be of a sweep that is still running.

    Raises:
        ResultsError: The folder is not a sweep of a schema known here, or holds no
            finished unit.
    """
    path = Path(path)
    definition, names = read_definition(path)
    runs, failures = [], []
    for name in names:
        folder = path / UNITS / name
        done = []
        for unit in sorted(folder.glob("*/")):
            if newest_first(unit):
                done.append(read_newest(unit))
            elif (unit / ERROR).is_file():
                message = str(read_json(unit / ERROR).get("message") or "no message")
                first_line = message.strip().partition("\n")[0]
                failures.append(Failure(name, unit.name, first_line))
        if done:
            runs.append(_merged(name, folder, done))
    if not runs:
        failed = f"; {len(failures)} failed" if failures else ""
        raise ResultsError(f"{path} holds no finished unit yet{failed}.")
    absent = [name for name in names if name not in {run.name for run in runs}]
    if absent:
        note = f"{path} holds no finished unit of {', '.join(absent)}."
        runs[0] = replace(runs[0], notes=(note,))
    return SweepResults(path, definition, tuple(runs), tuple(failures))


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Read one run.

    Args:
        path: A results file, or a folder as ``lm_eval --output_path`` fills it. Of
            several results of one model in a folder the newest of each task counts.
        name: Name for tables; default: made from `path`.

    Raises:
        ResultsError: There is no such path, or it cannot be read as one run.
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
    return _merged(name or path.name, path, runs)


def read_newest(folder: Path) -> Run:
    """Read the newest results file of a folder that holds at least one."""
    return read_results_file(newest_first(folder)[0])


def _model(run: Run) -> list[Any]:
    """Return what two results of one model have in common."""
    keys = ("model", "model_args", "model_sha", "peft_sha", "delta_sha")
    pruning = ("intermediate_size_after", "kept_digest")
    return [*map(run.config.get, keys), *map(run.pruning.get, pruning)]


def _merged(name: str, path: Path, parts: Sequence[Run]) -> Run:
    """Join results of one model, the oldest first; of each task the last counts."""
    last = {task: part for part in parts for task in part.tasks()}
    by_task = ("versions", "subtasks", "samples", "energy", "settings", "stopping")
    joined: dict[str, Any] = {
        each: {k: v for part in parts for k, v in getattr(part, each).items()}
        for each in by_task
    }
    scores = {
        key: score
        for part in parts
        for key, score in part.scores.items()
        # A group whose members were evaluated again has no score of what they are now.
        if all(last.get(task, part) is part for task in part.members(key[0]))
    }
    return Run(name=name, path=path, scores=scores, config=parts[-1].config, **joined)


def setting_of(run: Run, name: str) -> Any:
    """Return a setting of all tasks of a run; by task where they do not share it."""
    by_task = {task: each.get(name) for task, each in run.settings.items()}
    first, *others = by_task.values()
    return first if all(each == first for each in others) else by_task


def notes_on(runs: Iterable[Run]) -> list[str]:
    """Return the notes of runs, and in what the tasks of one were not evaluated alike.

    Those of a resumed sweep, or of a folder of several results, come from several commands.
    """
    notes: list[str] = []
    mixed: dict[str, list[str]] = {}
    for run in runs:
        notes += run.notes
        first, *others = [*run.settings.values()] or [{}]
        names = {name for each in others for name in differing(first, each, SHARED)}
        if names:
            text = ", ".join(label(name) for name in SHARED if name in names)
            mixed.setdefault(text, []).append(run.name)
    return notes + [
        f"The tasks of {listed(of)} were not all evaluated with the same {names}."
        for names, of in mixed.items()
    ]
