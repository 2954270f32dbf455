"""The results of one model, from a file or from a folder that several commands filled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.files import (
    ResultsError,
    Run,
    newest_first,
    read_results_file,
)
from lm_eval_pruned.results.folder import UNITS, is_sweep
from lm_eval_pruned.results.settings import LABELS, SHARED, listed, shown


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Read one run.

    Args:
        path: A results file, or a folder as ``lm_eval --output_path`` fills it. Of
            several results of one model in a folder the newest of each task counts;
            what is not read is named in `Run.notes`.
        name: Name for tables; default: made from `path`.

    Raises:
        ResultsError: There is no such path, or it cannot be read as one run.
    """
    path = Path(path)
    if is_sweep(path):
        raise ResultsError(
            f"{path} is a sweep folder, which holds several runs: name one of its "
            f"configurations, such as {path / UNITS / 'ID'}."
        )
    if path.is_dir():
        folders = sorted({file.parent for file in path.rglob("results_*.json")})
        if not folders:
            raise ResultsError(
                f"{path} holds no results_*.json: give the folder that `lm_eval --output_path` "
                "named, or a results file."
            )
        name = name or path.name
        if (
            all(folder.parent == path for folder in folders)
            and path.parent.name == UNITS
        ):
            return merged_runs(name, path, [read_newest(folder) for folder in folders])
        below = [str(folder.relative_to(path)) for folder in folders if folder != path]
        if path in folders:
            run = _read_folder(path)
            if below:
                note = (
                    f"The results in {', '.join(below)} below {path} were left out, which holds "
                    "results itself."
                )
                run = replace(run, notes=(*run.notes, note))
            return replace(run, name=name)
        if len(below) > 1:
            # Without `pretrained` the harness makes a new folder for each command.
            runs = [_read_folder(folder) for folder in folders]
            tasks = [task for run in runs for task in run.tasks()]
            if len(set(tasks)) < len(tasks) or any(
                _model(run) != _model(runs[0]) for run in runs
            ):
                raise ResultsError(
                    f"{path} holds the results of several models ({', '.join(below)}): name one "
                    "of them."
                )
            notes = tuple(note for run in runs for note in run.notes)
            return replace(merged_runs(name, path, runs), notes=notes)
        return replace(_read_folder(folders[0]), name=name)
    if not path.exists():
        raise ResultsError(
            f"{path} does not exist: give a results file or a folder with results."
        )
    return replace(read_results_file(path), name=name or path.stem)


def read_newest(folder: Path) -> Run:
    """Read the newest results file of a folder that holds at least one."""
    return read_results_file(newest_first(folder)[0])


def _read_folder(folder: Path) -> Run:
    """Read what several commands left in one folder: of each task the newest.

    The harness names the folder after the checkpoint alone, so results of another
    size or of other arguments may lie beside: those belong to another model.
    """
    newest_file, *older = newest_first(folder)
    newest = read_results_file(newest_file)
    parts, notes = [newest], []
    taken = {leaf for task in newest.tasks() for leaf in newest.members(task)}
    for file in older:
        try:
            run = read_results_file(file)
        except ResultsError as error:
            notes.append(f"Left out: {error}")
            continue
        fresh = [task for task in run.tasks() if task not in taken]
        if not fresh:
            continue
        where = f"{run.path.name}: {', '.join(fresh)}"
        if _model(run) != _model(newest):
            notes.append(
                f"Left out, since {newest.path.name} is of another model or other model "
                f"arguments: {where}."
            )
            continue
        whole = [task for task in fresh if taken.isdisjoint(run.members(task))]
        if whole != fresh:
            split = [task for task in fresh if task not in whole]
            notes.append(
                f"Left out, since some of their subtasks were evaluated again: "
                f"{', '.join(split)} of {run.path.name}."
            )
        if whole:
            parts.append(_only(run, whole))
            taken.update(leaf for task in whole for leaf in run.members(task))
    if len(parts) == 1:
        return replace(newest, notes=tuple(notes))
    # The newest last: what holds for the whole run, such as the config, is then its.
    return replace(merged_runs(folder.name, folder, parts[::-1]), notes=tuple(notes))


def _model(run: Run) -> list[Any]:
    """Return what two results of one model have in common."""
    keys = ("model", "model_args", "model_sha", "peft_sha", "delta_sha")
    pruning = run.pruning
    return [run.config.get(key) for key in keys] + [
        pruning.get(key) for key in ("intermediate_size_after", "kept_digest")
    ]


def _only(run: Run, tasks: list[str]) -> Run:
    """Return `run` with the scores of `tasks` alone."""
    members = {leaf for task in tasks for leaf in run.members(task)}

    def kept(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in mapping.items() if name in members}

    return replace(
        run,
        scores={key: score for key, score in run.scores.items() if key[0] in tasks},
        versions=kept(run.versions),
        subtasks=kept(run.subtasks),
        samples=kept(run.samples),
        settings=kept(run.settings),
        stopping=kept(run.stopping),
    )


def merged_runs(name: str, path: Path, parts: list[Run]) -> Run:
    """Join the units of one configuration, or several results of one model."""

    def joined(attribute: str) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        for part in parts:
            merged.update(getattr(part, attribute))
        return merged

    return Run(
        name=name,
        path=path,
        scores=joined("scores"),
        versions=joined("versions"),
        subtasks=joined("subtasks"),
        samples=joined("samples"),
        config=parts[-1].config,
        energy=joined("energy"),
        settings=joined("settings"),
        stopping=joined("stopping"),
    )


def setting_of(run: Run, name: str) -> Any:
    """Return a setting of all tasks of a run; by task where they do not share it."""
    by_task = {task: of_task.get(name) for task, of_task in run.settings.items()}
    values = list(by_task.values())
    return values[0] if values.count(values[0]) == len(values) else by_task


def notes_on(runs: Iterable[Run]) -> list[str]:
    """Return what was left out of runs, and which hold results of several commands.

    The tasks of a resumed sweep, or of a folder of several results, may have been
    evaluated under several values of what one command gives all its tasks.
    """
    notes: list[str] = []
    mixed: dict[str, list[str]] = {}
    for run in runs:
        notes += run.notes
        for name in SHARED:
            by_value: dict[str, list[str]] = {}
            for task, of_task in run.settings.items():
                by_value.setdefault(shown(of_task.get(name)), []).append(task)
            if len(by_value) > 1:
                parts = [f"{value}: {listed(on)}" for value, on in by_value.items()]
                clause = f"{LABELS.get(name, name)} ({'; '.join(parts)})"
                mixed.setdefault(clause, []).append(run.name)
    return notes + [
        f"The tasks of {listed(names)} were not all evaluated with the same {clause}."
        for clause, names in mixed.items()
    ]
