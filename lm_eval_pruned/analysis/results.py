"""Reading what lm-evaluation-harness wrote: results files, samples, sweep folders.

Everything here comes from a disk and is distrusted: a file that is cut off, empty,
from another program or from a later version gives one `ResultsError` that says so.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_pruned.analysis.settings import settings_of


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import TypeGuard


#: Highest version of ``sweep.json`` that this module understands.
SWEEP_SCHEMA = 1

#: Documents that share this field belong together: they ask about the same text.
CLUSTER_FIELDS = {
    re.compile(r"(^|_)musr(_|$)"): "narrative",
    re.compile(r"(^|_)boolq(_|$)"): "passage",
    re.compile(r"^race(_|$)"): "article",
    re.compile(r"(^|_)drop(_|$)"): "passage",
    re.compile(r"quad(v2|_|$)"): "context",
    re.compile(r"hellaswag(_|$)"): "source_id",
    re.compile(r"(^|_)multirc(_|$)"): "paragraph",
    re.compile(r"(^|_)record(_|$)"): "passage",
    re.compile(r"belebele(_|$)"): "flores_passage",
}

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
        environment: What else is needed to repeat the run: versions, number of
            few-shot examples, chat template hash, date.
        energy: What was measured beside the scores, by task; empty where nothing was.
        settings: How each task was evaluated; see `settings.settings_of`.
        notes: What was left out of what `path` holds, one sentence each.
    """

    name: str
    path: Path
    scores: Mapping[tuple[str, str], Score]
    versions: Mapping[str, Any] = field(default_factory=dict)
    subtasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    samples: Mapping[str, Path] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    energy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def pruning(self) -> Mapping[str, Any]:
        """What ``pruned-hf`` recorded; see `PruneRecord.as_dict`. Empty for other models."""
        record = self.config.get("pruning")
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
        return bool(pruning) and pruning.get("intermediate_size_after") == pruning.get(
            "intermediate_size_before"
        )

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
class Sweep:
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


@dataclass(frozen=True)
class Documents:
    """Scores of one (task, metric), document by document.

    The score is ``TRANSFORMS[transform](sum(weights * values) / sum(weights))``.

    Attributes:
        keys: What a document is matched by: its task, ``doc_hash`` and, where
            documents repeat, which repetition it is. Length n.
        values: Shape (n,), float64.
        weights: Shape (n,), float64; ones for a plain mean.
        clusters: Cluster of each document, length n, or None if documents are
            independent.
        transform: Name in `TRANSFORMS`.
        prompts: The harness's ``prompt_hash`` of each document, length n, None where
            none was logged; empty where they were not read.
    """

    keys: tuple[tuple[str, str, int], ...]
    values: np.ndarray
    weights: np.ndarray
    clusters: tuple[str, ...] | None
    transform: str
    prompts: tuple[str | None, ...] = ()

    def other_prompts(self, other: Documents) -> int:
        """Return how many documents of both were put into other prompts."""
        prompts = dict(zip(self.keys, self.prompts, strict=False))
        return sum(
            key in prompts and prompts[key] != prompt
            for key, prompt in zip(other.keys, other.prompts, strict=False)
        )

    @property
    def strata(self) -> tuple[str, ...] | None:
        """Task of each document, or None for a single one.

        The subtasks of a group, such as MMLU's subjects, are not drawn from others:
        another draw of documents would have the same.
        """
        tasks = tuple(task for task, _, _ in self.keys)
        return tasks if len(set(tasks)) > 1 else None


#: From a weighted mean to the score: the harness's mean, perplexity and bits per byte.
TRANSFORMS = {
    "mean": lambda mean: mean,
    "perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}


def is_sweep(path: str | Path) -> bool:
    """Return whether `path` is a sweep folder."""
    return Path(path, "sweep.json").is_file()


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
            f"configurations, such as {path / 'units' / 'ID'}."
        )
    if path.is_dir():
        folders = sorted({file.parent for file in path.rglob("results_*.json")})
        if not folders:
            raise ResultsError(
                f"{path} holds no results_*.json: give the folder that `lm_eval --output_path` "
                "named, or a results file."
            )
        name = name or path.name
        if all(folder.parent == path for folder in folders) and path.parent.name == (
            "units"
        ):
            return _merge(name, path, [_read_newest(folder) for folder in folders])
        below = [str(folder.relative_to(path)) for folder in folders if folder != path]
        if path in folders:
            run = _read_folder(path)
            if below:
                note = (
                    f"The results in {', '.join(below)} below {path} were left out, which holds "
                    "results itself."
                )
                run = replace(run, notes=(*run.notes, note))
            return _renamed(run, name)
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
            return replace(_merge(name, path, runs), notes=notes)
        return _renamed(_read_folder(folders[0]), name)
    if not path.exists():
        raise ResultsError(
            f"{path} does not exist: give a results file or a folder with results."
        )
    return _renamed(_read_file(path), name or path.stem)


def read_runs(path: str | Path) -> list[Run]:
    """Read a results file, a folder of one run, or all runs of a sweep folder.

    Raises:
        ResultsError: Nothing there can be read.
    """
    return list(read_sweep(path).runs) if is_sweep(path) else [read_run(path)]


def read_sweep(path: str | Path) -> Sweep:
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
    schema = _schema(definition)
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
                done.append(_read_newest(unit))
            elif (unit / "error.json").is_file():
                failures.append(_read_failure(identifier, unit))
        if done:
            runs.append(_merge(identifier, path / "units" / identifier, done))
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
    return Sweep(path, definition, tuple(runs), tuple(failures))


def read_documents(run: Run, task: str, metric: str) -> Documents | None:
    """Read the scores of single documents from the logged samples.

    Args:
        run: A run.
        task: One of its tasks, or a group.
        metric: Metric with filter, such as ``acc,none``.

    Returns:
        None where samples are missing, or where no aggregation known here makes the
        reported score of them (the harness has some that are no function of a mean).

    Raises:
        ResultsError: A samples file cannot be read, or holds another number of
            documents than the results file says.
    """
    leaves = run.leaves(task)
    if any(leaf not in run.samples for leaf in leaves):
        return None
    reported = run.scores[task, metric].value
    parts = [(leaf, _read_samples(run, leaf, metric)) for leaf in leaves]
    if any(not samples for _, samples in parts):
        return None
    keys = tuple(
        chain.from_iterable(
            ((leaf, *sample.key) for sample in samples) for leaf, samples in parts
        )
    )
    clusters = _clusters(parts)
    sizes = np.concatenate([np.full(len(s), float(len(s))) for _, s in parts])
    raw = [sample.value for _, samples in parts for sample in samples]
    prompts = tuple(sample.prompt for _, samples in parts for sample in samples)
    for values, weights in _readings(raw):
        weightings = [weights]
        if len(parts) > 1:
            weightings.append(weights / sizes)
        for weighting in weightings:
            for transform, function in TRANSFORMS.items():
                with np.errstate(over="ignore"):
                    score = function(np.average(values, weights=weighting))
                if _same(float(score), reported):
                    return Documents(
                        keys, values, weighting, clusters, transform, prompts
                    )
    return None


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


@dataclass(frozen=True)
class _Sample:
    key: tuple[str, int]
    value: Any
    cluster: str | None
    prompt: str | None


def _read_samples(run: Run, task: str, metric: str) -> list[_Sample]:
    """Read one metric of the samples of one task; documents without it are left out."""
    file = run.samples[task]
    name, _, filter_name = metric.rpartition(",")
    cluster_field = next(
        (
            field
            for task_name, field in CLUSTER_FIELDS.items()
            if task_name.search(task)
        ),
        None,
    )
    rows = []
    hashes = 0
    for number, row in _read_lines(file):
        if row.get("filter") != filter_name:
            continue
        identity = row.get("doc_hash")
        if not isinstance(identity, str):
            raise ResultsError(
                f"{file}, line {number}: no doc_hash, so its document cannot be matched; these "
                "are not samples of lm-eval 0.4.3 or later."
            )
        hashes += 1
        if row.get(name) is None:
            continue
        document = row.get("doc")
        cluster = document.get(cluster_field) if isinstance(document, dict) else None
        order = row.get("doc_id")
        prompt = row.get("prompt_hash")
        rows.append(
            (
                order if isinstance(order, int) else number,
                identity,
                row[name],
                None if cluster is None else str(cluster),
                None if prompt is None else str(prompt),
            )
        )
    score = run.scores.get((task, metric))
    expected = None if score is None else score.documents
    if expected is not None and hashes != expected:
        raise ResultsError(
            f"{file} holds {hashes} documents of {task} (filter {filter_name!r}), and the results "
            f"file says {expected}: one of them is incomplete."
        )
    rows.sort(key=lambda row: row[0])
    repetitions: dict[str, int] = {}
    samples = []
    for _, identity, value, cluster, prompt in rows:
        repetition = repetitions.get(identity, 0)
        repetitions[identity] = repetition + 1
        samples.append(_Sample((identity, repetition), value, cluster, prompt))
    return samples


def _clusters(parts: list[tuple[str, list[_Sample]]]) -> tuple[str, ...] | None:
    names: list[str] = []
    for leaf, samples in parts:
        for number, sample in enumerate(samples):
            if sample.cluster is not None:
                names.append(f"{leaf}\0{sample.cluster}")
            else:
                names.append(f"{leaf}\0{number}")
    return tuple(names) if len(set(names)) < len(names) else None


def _readings(raw: list[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield what per-document values can mean, as (values, weights).

    A number is a score. A list is several scores (IFEval's instructions) or, if each
    is a pair, a sum with its weight (log-likelihood and words).
    """
    if all(_is_number(value) for value in raw):
        yield np.array(raw, dtype=float), np.ones(len(raw))
        return
    if not all(
        isinstance(value, list) and value and all(map(_is_number, value))
        for value in raw
    ):
        return
    lengths = np.array([len(value) for value in raw], dtype=float)
    yield np.array([np.mean(np.array(value, float)) for value in raw]), lengths
    if (lengths == 2).all():
        sums, weights = np.array(raw, dtype=float).T
        if (weights > 0).all():
            yield sums / weights, weights


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float)


def _same(score: float, reported: float) -> bool:
    return math.isclose(score, reported, rel_tol=1e-6, abs_tol=1e-9) or (
        math.isnan(score) and math.isnan(reported)
    )


def _newest_first(folder: Path) -> list[Path]:
    files = folder.glob("results_*.json")
    return sorted(files, key=lambda file: (_date(file) or "", file.name), reverse=True)


def _read_newest(folder: Path) -> Run:
    return _read_file(_newest_first(folder)[0])


def _read_folder(folder: Path) -> Run:
    """Read what several commands left in one folder: of each task the newest.

    The harness names the folder after the checkpoint alone, so results of another
    size or of other arguments may lie beside: those belong to another model.
    """
    newest_file, *older = _newest_first(folder)
    newest = _read_file(newest_file)
    parts, notes = [newest], []
    taken = {leaf for task in newest.tasks() for leaf in newest.members(task)}
    for file in older:
        try:
            run = _read_file(file)
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
    # The newest last: what holds for the whole run, such as the date, is then its.
    return replace(_merge(folder.name, folder, parts[::-1]), notes=tuple(notes))


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
    )


def _date(file: Path) -> str | None:
    match = _DATE.search(file.stem)
    return match and match[1]


def _read_file(file: Path) -> Run:
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
            if not _is_number(value):
                raise ResultsError(
                    f"{file}: the score {metric!r} of {task!r} is {value!r}, not a number."
                )
            stderr = metrics.get(f"{name}{_STDERR},{filter_name}")
            directions = better.get(task)
            direction = directions.get(name) if isinstance(directions, dict) else None
            scores[task, metric] = Score(
                float(value),
                float(stderr) if _is_number(stderr) else None,
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
        environment={
            key: data[key]
            for key in (
                "n-shot",
                "chat_template_sha",
                "fewshot_as_multiturn",
                "system_instruction_sha",
                "lm_eval_version",
                "transformers_version",
                "git_hash",
                "date",
                "total_evaluation_time_seconds",
            )
            if data.get(key) is not None
        },
        energy=_energy(config, list(results)),
    )
    settings = {task: settings_of(data, task, run.leaves(task)) for task in run.tasks()}
    return replace(run, settings=settings)


def _energy(config: Mapping[str, Any], tasks: list[str]) -> dict[str, Any]:
    """Return the energy section, which belongs to all tasks of one file together."""
    record = config.get("energy")
    return {", ".join(tasks): record} if isinstance(record, dict) and record else {}


def _find_samples(file: Path, tasks: set[str]) -> dict[str, Path]:
    date = _date(file)
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


def _read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ResultsError(
                        f"{file}, line {number}: not whole JSON ({error}); the file was cut off or "
                        "damaged."
                    ) from None
                if not isinstance(row, dict):
                    raise ResultsError(f"{file}, line {number}: not an object.")
                yield number, row
    except UnicodeDecodeError:
        raise ResultsError(f"{file} is not a text file in UTF-8.") from None
    except OSError as error:
        raise ResultsError(f"{file} cannot be read: {error.strerror}.") from None


def _schema(definition: Mapping[str, Any]) -> Any:
    for key in ("schema_version", "schema", "version"):
        if key in definition:
            return definition[key]
    return None


def _configuration_ids(file: Path, definition: Mapping[str, Any]) -> list[str]:
    configurations = definition.get("configurations")
    if isinstance(configurations, dict):
        identifiers = list(configurations)
    elif isinstance(configurations, list):
        identifiers = [
            entry.get("id") if isinstance(entry, dict) else None
            for entry in configurations
        ]
    else:
        identifiers = []
    if not identifiers or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.=+-]+", name) and ".." not in name
        for name in identifiers
    ):
        raise ResultsError(
            f"{file} does not list its configurations, each with an id that can be a folder's name."
        )
    return identifiers


def _read_failure(run: str, unit: Path) -> Failure:
    data = read_json(unit / "error.json")
    message = next(
        (data[key] for key in ("message", "error") if isinstance(data.get(key), str)),
        "no message",
    )
    return Failure(
        run,
        unit.name,
        message.strip().splitlines()[0] if message.strip() else "no message",
    )


def _renamed(run: Run, name: str) -> Run:
    return replace(run, name=name)


def _merge(name: str, path: Path, parts: list[Run]) -> Run:
    """Join the units of one configuration, or several results of one model."""

    def joined(attribute: str) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        for part in parts:
            merged.update(getattr(part, attribute))
        return merged

    environment = joined("environment")
    for key in ("lm_eval_version", "transformers_version"):
        values = {str(part.environment.get(key, "unknown")) for part in parts}
        if len(values) > 1:
            environment[key] = ", ".join(sorted(values))
    shots: dict[str, Any] = {}
    for part in parts:
        of_part = part.environment.get("n-shot")
        if isinstance(of_part, dict):
            shots.update(of_part)
    if shots:
        environment["n-shot"] = shots
    return Run(
        name=name,
        path=path,
        scores=joined("scores"),
        versions=joined("versions"),
        subtasks=joined("subtasks"),
        samples=joined("samples"),
        config=parts[-1].config,
        environment=environment,
        energy=joined("energy"),
        settings=joined("settings"),
    )
