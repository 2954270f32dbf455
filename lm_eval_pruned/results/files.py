"""One results file of lm-evaluation-harness: scores, settings, and where its samples lie.

Everything that is read comes from a disk and is distrusted: a file that is cut off,
empty, from another program or from a later version gives one `ResultsError` that says so.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.settings import settings_of
from lm_eval_pruned.results.stopping_record import Stopping


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import TypeGuard

_DATE = re.compile(r"_(\d{4}-\d\d-\d\dT[\d.+-]+)$")
_STDERR = "_stderr"


class ResultsError(ValueError):
    """A file or folder that cannot be read as results; the message names it."""


@dataclass(frozen=True)
class Score:
    """One aggregated number.

    Attributes:
        value: The score; may be NaN or infinite, as the harness wrote it.
        stderr: Its standard error, or None where the harness gave none.
        higher_is_better: Direction, or None where the task does not say.
        documents: Documents it was computed from, or None.
    """

    value: float
    stderr: float | None
    higher_is_better: bool | None
    documents: int | None


@dataclass(frozen=True)
class Run:
    """The results of one model on some tasks.

    Attributes:
        name: Short name for tables.
        path: File or folder it was read from.
        scores: Scores by (task, metric), the metric as the harness writes it, such
            as ``acc,none``; tasks and metrics in the order of the file. Groups that
            aggregate their subtasks are among the tasks.
        versions: Version of each task, as the task's YAML gives it.
        subtasks: Direct members of each group.
        samples: File of logged samples by task.
        config: The harness's ``config`` section: model, arguments, limit, seeds and,
            for ``pruned-hf``, ``pruning``.
        energy: What was measured beside the scores, by task; empty where nothing was.
        settings: How each task was evaluated; see `settings.settings_of`.
        notes: What was left out of what `path` holds, one sentence each.
        stopping: How a comparison was ended before or with the last document, by task.
    """

    name: str
    path: Path
    scores: Mapping[tuple[str, str], Score]
    versions: Mapping[str, Any] = field(default_factory=dict)
    subtasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    samples: Mapping[str, Path] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    energy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stopping: Mapping[str, Stopping] = field(default_factory=dict)

    @property
    def pruning(self) -> Mapping[str, Any]:
        """What ``pruned-hf`` recorded; see `PruneRecord.as_dict`. Empty for other models."""
        record = self.config.get("pruning")
        return record if isinstance(record, dict) else {}

    @property
    def healing(self) -> Mapping[str, Any]:
        """On what the pruned model was trained again, as its adapter says; else empty."""
        record = self.config.get("healing")
        return record if isinstance(record, dict) else {}

    @property
    def expansion_ratio(self) -> float | None:
        """Intermediate size / hidden size of the model that was evaluated, or None."""
        ratio = self.pruning.get("expansion_ratio_after")
        return float(ratio) if isinstance(ratio, int | float) else None

    @property
    def is_baseline(self) -> bool:
        """Whether ``pruned-hf`` removed nothing."""
        pruning = self.pruning
        widths = (pruning.get(f"intermediate_size_{n}") for n in ("before", "after"))
        return bool(pruning) and not self.is_shallow and len({*widths}) == 1

    @property
    def is_shallow(self) -> bool:
        """Whether ``pruned-hf`` left out whole layers, so that the ratio is not its size."""
        return "layers_dropped" in self.pruning

    def tasks(self, *, subtasks: bool = True) -> list[str]:
        """Return the tasks that have scores.

        Args:
            subtasks: Whether to include the members of groups that have scores.
        """
        tasks = list(dict.fromkeys(task for task, _ in self.scores))
        if subtasks:
            return tasks
        hidden = {
            member for task in tasks for member in self.members(task) if member != task
        }
        return [task for task in tasks if task not in hidden]

    def members(self, task: str) -> list[str]:
        """Return `task` and all its subtasks, at any depth, each once."""
        found: dict[str, None] = {}
        waiting = [task]
        while waiting:
            name = waiting.pop(0)
            if name not in found:
                found[name] = None
                waiting.extend(self.subtasks.get(name, ()))
        return list(found)

    def leaves(self, task: str) -> list[str]:
        """Return the tasks without subtasks at or below `task`."""
        return [name for name in self.members(task) if not self.subtasks.get(name)]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ResultsError: The file cannot be read, or holds something else.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ResultsError(f"{file} is not a text file in UTF-8.") from None
    except OSError as error:
        raise ResultsError(f"{file} cannot be read: {error.strerror}.") from None
    if not text.strip():
        raise ResultsError(f"{file} is empty.")
    try:
        data = json.loads(text)
    except RecursionError:
        raise ResultsError(f"{file} is nested too deeply to be results.") from None
    except ValueError as error:
        raise ResultsError(f"{file} is not whole JSON ({error}).") from None
    if not isinstance(data, dict):
        raise ResultsError(
            f"{file} is no results file of lm-eval: it holds a {type(data).__name__}, not an object."
        )
    return data


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value read from JSON is a number or a truth value."""
    return isinstance(value, int | float)


def as_mapping(value: Any) -> Mapping[str, Any]:
    """Return a value of a results file, or an empty mapping where it is none."""
    return value if isinstance(value, dict) else {}


def finite_or_none(value: Any) -> float | None:
    """Return a value of a results file as a number, or None where it is no finite one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def date_of(file: Path) -> str | None:
    """Return the date that the harness put into the name of a file, or None."""
    match = _DATE.search(file.stem)
    return match and match[1]


def newest_first(folder: Path) -> list[Path]:
    """Return the results files that lie in a folder."""
    files = folder.glob("results_*.json")
    return sorted(
        files, key=lambda file: (date_of(file) or "", file.name), reverse=True
    )


def read_results_file(file: Path) -> Run:
    """Read one results file; the run is called after it.

    Raises:
        ResultsError: It cannot be read, or is no results file.
    """
    data = read_json(file)
    results = data.get("results")
    if not isinstance(results, dict) or not results:
        raise ResultsError(
            f"{file} is no results file of lm-eval: it has no object 'results' with tasks in it."
        )
    better = _object(file, data, "higher_is_better")
    counts = _object(file, data, "n-samples")
    scores: dict[tuple[str, str], Score] = {}
    for task, metrics in results.items():
        if not isinstance(metrics, dict):
            raise ResultsError(
                f"{file} is not in the layout that this version reads: the entry of {task!r} in "
                "'results' is not an object."
            )
        count = counts.get(task, {})
        documents = count.get("effective") if isinstance(count, dict) else None
        for metric, value in metrics.items():
            name, comma, filter_name = metric.partition(",")
            if not comma or name.endswith(_STDERR) or isinstance(value, str):
                continue
            if not is_number(value):
                raise ResultsError(
                    f"{file}: the score {metric!r} of {task!r} is {value!r}, not a number."
                )
            stderr = metrics.get(f"{name}{_STDERR},{filter_name}")
            directions = better.get(task)
            direction = directions.get(name) if isinstance(directions, dict) else None
            scores[task, metric] = Score(
                float(value),
                float(stderr) if is_number(stderr) else None,
                direction if isinstance(direction, bool) else None,
                documents if isinstance(documents, int) else None,
            )
    if not scores:
        raise ResultsError(f"{file} holds no scores.")
    subtasks = {
        group: tuple(str(member) for member in members)
        for group, members in _object(file, data, "group_subtasks").items()
        if isinstance(members, list) and members
    }
    config = _object(file, data, "config")
    _object(file, data, "n-shot")
    leaves = set(results).union(*subtasks.values())
    run = Run(
        name=file.stem,
        path=file,
        scores=scores,
        versions=_object(file, data, "versions"),
        subtasks=subtasks,
        samples=_find_samples(file, leaves),
        config=config,
        energy=_energy(config, list(results)),
    )
    settings = {task: settings_of(data, task, run.leaves(task)) for task in run.tasks()}
    return replace(run, settings=settings, stopping=_stopping(file, data, run))


def _energy(config: Mapping[str, Any], tasks: list[str]) -> dict[str, Any]:
    """Return the energy section, which belongs to all tasks of one file together."""
    record = config.get("energy")
    return {", ".join(tasks): record} if isinstance(record, dict) and record else {}


def _stopping(file: Path, data: Mapping[str, Any], run: Run) -> dict[str, Stopping]:
    """Return the record of stopping, for the task it is of and the members of a group."""
    record = _object(file, data, "stopping")
    if not record:
        return {}
    try:
        stopping = Stopping.from_dict(record)
    except (KeyError, TypeError, ValueError):
        raise ResultsError(
            f"{file} says that it stopped early, in a way that this version cannot read."
        ) from None
    return dict.fromkeys(run.members(stopping.task), stopping)


def _find_samples(file: Path, tasks: set[str]) -> dict[str, Path]:
    date = date_of(file)
    found = {}
    for task in tasks:
        # The harness puts the task's name into the file's as it is.
        if date is not None:
            candidates = [file.parent / f"samples_{task}_{date}.jsonl"]
        else:
            candidates = [
                path
                for path in file.parent.glob("samples_*.jsonl")
                if path.name == f"samples_{task}.jsonl"
                or _DATE.sub("", path.stem) == f"samples_{task}"
            ]
        candidates = [path for path in candidates if path.is_file()]
        if len(candidates) == 1:
            found[task] = candidates[0]
    return found


def _object(file: Path, data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ResultsError(
            f"{file} is not in the layout that this version reads: {key!r} is not an object."
        )
    return value
