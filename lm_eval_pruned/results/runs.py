"""The results of one model, or of a sweep, whose folder `lm_eval_pruned.sweeps` writes.

``DIR/sweep.json`` says what the sweep is. ``DIR/units/CONFIGURATION/TASK/`` holds one unit:
the harness's ``results_*.json`` and ``samples_*.jsonl``, or ``error.json`` where it failed,
and ``unit.json``.
"""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.results.files import (
    Run,
    left_of,
    newest_first,
    read_results_file,
)
from lm_eval_pruned.results.parts import (
    ResultsError,
    finite_or_none,
    part,
    read_json,
    reading,
)


if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    #: The fingerprint of each unit, by configuration and task.
    UnitsOf = Mapping[str, Mapping[str, str]]

#: Version of ``sweep.json`` and ``unit.json``.
SCHEMA = 1
DEFINITION = "sweep.json"
UNIT = "unit.json"
ERROR = "error.json"
UNITS = "units"
#: What the ids of configurations that know nothing start with.
FLOOR = "floor-"
#: Curves of single layers, as ``lm-eval-pruned sensitivity`` writes them.
SENSITIVITY = "sensitivity.json"
_REPEAT = "delete it and repeat the command of the sweep, which writes"
#: What tells models apart beside the pruning: arguments of the harness and commits.
_MODEL = ("model", "model_args", "model_sha", "peft_sha", "delta_sha")


class UnitRecord(NamedTuple):
    """What the folder holds for one unit: the harness's `results` file, or an `error`.

    `fingerprint` is that of the `definition`; evaluating took `seconds`, without loading.
    """

    fingerprint: str
    seconds: float
    error: dict[str, str] | None
    results: Path | None
    definition: Mapping[str, Any]


def is_sweep(path: str | Path) -> bool:
    """Return whether `path` is a sweep folder."""
    return Path(path, DEFINITION).is_file()


def unit_folder(sweep: Path, configuration: str, task: str) -> Path:
    """Return where a unit belongs."""
    names = (re.sub(r"[^\w.+-]", "_", name) for name in (configuration, task))
    return Path(sweep, UNITS, *names)


def as_text(content: Mapping[str, Any]) -> str:
    """Return the text of a ``sweep.json`` or ``unit.json``."""
    return error_text({"schema_version": SCHEMA, **content})


def error_text(error: Mapping[str, Any]) -> str:
    """Return the text of an ``error.json``: ``type``, ``message`` and ``traceback``."""
    return json.dumps(error, indent=2, ensure_ascii=False) + "\n"


def read_unit(folder: Path) -> UnitRecord | None:
    """Return what is there for a unit; None for nothing, or nothing whole."""
    try:
        return _unit_in(folder)
    except (OSError, ResultsError):
        return None


def _unit_in(folder: Path) -> UnitRecord | None:
    """Return what is there for a unit, None for nothing; ResultsError for what is not whole."""
    file, results = folder / UNIT, next(iter(newest_first(folder)), None)
    if not file.is_file() or not (results or (folder / ERROR).is_file()):
        return None
    unit, error = read_json(file), None if results else read_json(folder / ERROR)
    with reading(f"{file} is damaged", f"{_REPEAT} this unit again."):
        if (schema := unit["schema_version"]) != SCHEMA:
            raise ValueError(f"schema_version is {schema!r}, not {SCHEMA}")
        made, seconds = unit["fingerprint"], finite_or_none(unit["seconds"])
        if not isinstance(made, str) or seconds is None or seconds < 0:
            raise ValueError(f"fingerprint is {made!r}, seconds {unit['seconds']!r}")
        return UnitRecord(made, seconds, error, results, part(unit, "definition"))


def read_definition(sweep: Path) -> tuple[Mapping[str, Any], UnitsOf]:
    """Read ``sweep.json``, and apart from it the units that it lists.

    ResultsError if there is none, or it is not known here.
    """
    file = sweep / DEFINITION
    if not is_sweep(sweep):
        why = "is not a sweep folder: it has no sweep.json"
        raise ResultsError(
            f"{sweep} {why if sweep.exists() else 'does not exist'}. `lm-eval-pruned sweep` makes "
            "a sweep folder."
        )
    definition = read_json(file)
    if (schema := definition.get("schema_version")) != SCHEMA:
        raise ResultsError(
            f"{file} has schema version {schema}, and this version of lm-eval-pruned reads "
            f"{SCHEMA}: use the version that wrote it, or upgrade lm-eval-pruned."
        )
    units: dict[str, dict[str, str]] = {}
    with reading(
        f"{file} does not list the sweep's configurations and units",
        f"{_REPEAT} it again and keeps what is finished.",
    ):
        for configuration in definition["configurations"]:
            name, listed = configuration["id"], dict(configuration.pop("units"))
            if not all(isinstance(text, str) for text in (name, *listed.values())):
                raise ValueError(f"{name!r} has the units {listed!r}")
            units[name] = listed
    return definition, units


def results_files(path: Path) -> list[Path]:
    """Return the results files that count of a file, or of a folder, the newest last.

    Of a configuration of a sweep, these are the files of the units that ``sweep.json`` lists, by task.
    """
    if path.is_file():
        return [path]
    if (sweep := _sweep_of(path)) is None:
        return newest_first(path)[::-1]
    name, (_, units) = path.resolve().name, read_definition(sweep)
    records = _records(sweep, {name: units.get(name, {})})
    return [unit.results for _, _, unit in records if unit.results]


def left_out(sweep: Path, counted: Collection[Path], name: str = "*") -> str:
    """Name the finished units in a sweep's folder that are not among the `counted` folders of units.

    Only those of the configuration `name` if there is one; see `units_text`.
    """
    others: dict[str, list[str]] = {}
    for unit in sorted(Path(sweep, UNITS).glob(f"{name}/*/")):
        known = unit in counted or unit.parent.name.startswith(FLOOR)
        if not known and newest_first(unit):
            others.setdefault(unit.parent.name, []).append(unit.name)
    return units_text(others)


def units_text(units: Mapping[str, Sequence[str]]) -> str:
    """Return tasks by configuration as text, such as ``baseline (boolq, gsm8k)``."""
    return ", ".join(f"{name} ({', '.join(tasks)})" for name, tasks in units.items())


def _sweep_of(path: Path) -> Path | None:
    """Return the folder of the sweep that a folder is a configuration of, if it is one."""
    parent = path.resolve().parent
    return parent.parent if parent.name == UNITS and is_sweep(parent.parent) else None


def _records(sweep: Path, units: UnitsOf) -> Iterator[tuple[str, Path, UnitRecord]]:
    """Yield the units that have the listed fingerprints, with their configurations and folders."""
    for name, listed in units.items():
        for task in sorted(listed):
            folder = unit_folder(sweep, name, task)
            record = _unit_in(folder)
            if record is not None and record.fingerprint == listed[task]:
                yield name, folder, record


def _notes(sweep: Path, counted: Collection[Path], name: str = "*") -> tuple[str, ...]:
    others = left_out(sweep, counted, name)
    why = "it does not list these units, or lists another definition of them"
    return (f"{sweep / DEFINITION}: left out, because {why}: {others}.",) * bool(others)


class Failure(NamedTuple):
    """A configuration and task of a sweep that failed, and the error in one line."""

    run: str
    task: str
    message: str


class SweepResults(NamedTuple):
    """What a sweep found: a run for each configuration with results, and ``sweep.json``.

    The runs of models that know nothing are `floors`, and not among the `runs`.
    """

    path: Path
    definition: Mapping[str, Any]
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...] = ()
    floors: tuple[Run, ...] = ()

    def split(self) -> tuple[Run, list[Run]]:
        """Return the run of the unpruned model, and the others; ResultsError if it is not finished."""
        baseline = next((run for run in self.runs if run.is_baseline), None)
        if baseline is None:
            raise ResultsError(
                f"{self.path} has no finished run of the unpruned model to compare with: add "
                "prune_percent 0 to the sweep, or name a base: `compare BASE RUN`."
            )
        return baseline, [run for run in self.runs if run is not baseline]


def read_sweep(path: str | Path) -> SweepResults:
    """Read the units of a sweep folder that ``sweep.json`` lists; others are named in a note.

    ResultsError if it is none that is known here, or no unit is finished.
    """
    path = Path(path)
    definition, units = read_definition(path)
    records = [*_records(path, units)]
    parts: dict[str, list[Run]] = {}
    for name, _, unit in records:
        if unit.results:
            run = read_results_file(unit.results, unit.seconds)
            parts.setdefault(name, []).append(run)
    read = {name: _joined(name, path / UNITS / name, parts[name]) for name in parts}
    failures = _failures(records)
    notes = _notes(path, [folder for _, folder, _ in records])
    runs = [run for run in read.values() if not run.is_floor]
    floors = [run for run in read.values() if run.is_floor]
    if not runs:
        failed = "".join(
            f"; {len(failures)} failed, such as {first.task} of {first.run} ({first.message})"
            for first in failures[:1]
        )
        raise ResultsError(
            " ".join([f"{path} holds no finished unit yet{failed}.", *notes])
        )
    if absent := [n for n in units if n not in read and not n.startswith(FLOOR)]:
        notes = (f"{path} holds no finished unit of {', '.join(absent)}.", *notes)
    runs[0] = replace(runs[0], notes=notes)
    return SweepResults(path, definition, tuple(runs), failures, tuple(floors))


def read_failures(sweep: str | Path) -> tuple[Failure, ...]:
    """Return what failed of a sweep folder, apart from models that know nothing."""
    sweep = Path(sweep)
    return _failures(_records(sweep, read_definition(sweep)[1]))


def _failures(
    records: Iterable[tuple[str, Path, UnitRecord]],
) -> tuple[Failure, ...]:
    failures = []
    for _, folder, record in records:
        if record.error and not folder.parent.name.startswith(FLOOR):
            # The first line of transformers' messages may only introduce the others.
            message = str(record.error.get("message"))
            line = textwrap.shorten(message, 400, placeholder=" ...")
            failures.append(Failure(folder.parent.name, folder.name, line))
    return tuple(failures)


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Read a results file, or a folder as ``lm_eval --output_path`` fills it, as one run.

    Of several results of one model in a folder the newest of each task counts. `name` is for tables.
    ResultsError if there is no such path, or it cannot be read as one run.
    """
    path = Path(path)
    files = results_files(path)
    sweep, counted = _sweep_of(path), [file.parent for file in files]
    notes = _notes(sweep, counted, path.resolve().name) if sweep else ()
    if not files:
        missing = (
            f"{path} does not exist or holds no results_*.json: pass the folder given to "
            "`lm_eval --output_path`, or a results file."
        )
        raise ResultsError(notes[0] if notes else missing)
    units = [_unit_in(file.parent) for file in files]
    runs = [
        read_results_file(file, unit and unit.seconds)
        for file, unit in zip(files, units, strict=True)
    ]
    models = [
        [
            *map(run.config.get, _MODEL),
            run.pruning.get("intermediate_size_after"),
            *left_of(run.pruning),
        ]
        for run in runs
    ]
    # The units of a configuration are of one model, whatever its arguments say.
    if sweep is None and any(model != models[0] for model in models):
        listed = ", ".join(str(file.relative_to(path)) for file in files)
        raise ResultsError(
            f"{path} holds the results of several models ({listed}): name one of them."
        )
    joined = _joined(name or (path.stem if path.is_file() else path.name), path, runs)
    return replace(joined, notes=notes)


def _joined(name: str, path: Path, parts: Sequence[Run]) -> Run:
    """Join results of one model, the oldest first; of each task the last counts."""
    by_task = (
        "scores", "versions", "subtasks", "samples", "energy", "evaluated", "settings", "metadata",
    )  # fmt: skip
    joined: dict[str, Any] = {
        name: {k: v for part in parts for k, v in getattr(part, name).items()}
        for name in by_task
    }
    return replace(parts[-1], name=name, path=path, documents={}, **joined)


def setting_of(run: Run, name: str) -> Any:
    """Return a setting of all tasks of a run; by task where they do not share it."""
    by_task = {task: settings.get(name) for task, settings in run.settings.items()}
    first, *others = by_task.values()
    return first if all(value == first for value in others) else by_task
