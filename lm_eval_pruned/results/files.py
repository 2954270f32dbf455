"""One results file of lm-evaluation-harness: scores, where its samples lie, and the settings of its tasks."""

from __future__ import annotations

import glob
import hashlib
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.results.parts import (
    ResultsError,
    as_mapping,
    direction,
    finite_or_none,
    part,
    read_json,
    reading,
    version,
)


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

_SECTIONS = (
    "results", "config", "configs", "group_subtasks", "higher_is_better", "n-samples", "n-shot",
    "task_hashes", "versions",
)  # fmt: skip
#: The key of a task's metadata that names the metric which decides.
PRIMARY = "primary_metric"
#: Key of a results file's configuration: tokenizer, chat template and other settings of a model that wrote.
SERVED_WITH = "served_with"
#: The parts of it that change what a model generates.
CHANGES_ANSWERS = (
    "tokenizer", "chat template", "ends of an answer", "generation config",
)  # fmt: skip
#: What the configuration of a run has whose answers were scored after other questions.
MISMATCHED = "mismatched_questions"
#: Model types that know nothing.
_FLOORS = ("constant", "echo")
#: Scores of BBQ, which the harness wants low; but below 0 a model is biased the other way.
_BIAS_OF_BBQ = ("amb_bias_score", "disamb_bias_score")
#: What was asked. Scores under different ones are the scores of different tests.
ASKED = (
    "documents", "num_fewshot", "fewshot_seed", "fewshot_as_multiturn", "chat_template",
    "system_instruction", "gen_kwargs",
)  # fmt: skip
#: Without few-shot examples these change nothing.
OF_FEWSHOT = ("fewshot_seed", "fewshot_as_multiturn")
#: What else may move a score. ``task_hash`` is the harness's, over documents, prompts and
#: targets in the order of evaluation; some chat templates put the date into each prompt.
CIRCUMSTANCES = (
    "task_hash", "lm_eval_version", "transformers_version", "dtype", "random_seed", "numpy_seed",
    "torch_seed",
)  # fmt: skip
#: What is compared. Two ways to answer differ by rounding.
COMPARED = (*ASKED, *CIRCUMSTANCES, "answer_paths")
#: Where the model comes from; paths are among them.
MODEL = ("model_args", "model_sha")
#: Which weights a pruning left.
WEIGHTS = ("kept_digest", "repair", "repair_text", "repair_tokens")
_DATE = re.compile(r"_(\d{4}-\d\d-\d\dT[\d.+-]+)$")


class Score(NamedTuple):
    """One aggregated number, which may be NaN or infinite; None for what the harness does not say.

    `documents` counts those that it was computed from.
    """

    value: float
    stderr: float | None
    higher_is_better: bool | None
    documents: int | None


class Evaluated(NamedTuple):
    """How many documents of a task were evaluated, of how many, and in how many seconds.

    Tasks of one file share its time by their documents; it is None where no file says it.
    """

    documents: int
    available: int
    seconds: float | None


@dataclass(frozen=True)
class Run:
    """The results of one model on some tasks.

    Attributes:
        name: Short name for tables.
        path: File or folder it was read from.
        scores: By task or group and metric as the harness writes it, such as ``acc,none``.
        versions, subtasks, samples: The version of each task, the direct members of each group, and
            the file of logged samples by task.
        config: The harness's ``config`` section: model, arguments, limit, seeds and,
            for ``pruned-hf``, ``pruning``.
        energy: What was measured beside the scores, by task.
        evaluated: The size of each task without subtasks, and what evaluating it took.
        settings: How each task was evaluated; see `settings_of`.
        notes: What was left out of what `path` holds, one sentence each.
        metadata: What the YAML file of each task declares under ``metadata``, such as
            ``primary_metric`` and ``floors``; of a group what all its tasks declare alike.
        documents: The `Documents` that `documents_of` has read, by task and metric.
    """

    name: str
    path: Path
    scores: Mapping[tuple[str, str], Score]
    versions: Mapping[str, Any] = field(default_factory=dict)
    subtasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    samples: Mapping[str, Path] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    energy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluated: Mapping[str, Evaluated] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    documents: dict[str, dict[str, Any]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def pruning(self) -> Mapping[str, Any]:
        """What ``pruned-hf`` recorded; see `PruneRecord.as_dict`. Empty for other models."""
        return as_mapping(self.config.get("pruning"))

    @property
    def healing(self) -> Mapping[str, Any]:
        """How the pruned model was trained again, as its adapter says; else empty."""
        return as_mapping(self.config.get("healing"))

    @property
    def expansion_ratio(self) -> float | None:
        """Intermediate size / hidden size of the model that was evaluated, or None."""
        return finite_or_none(self.pruning.get("expansion_ratio_after"))

    @property
    def is_baseline(self) -> bool:
        """Whether ``pruned-hf`` removed nothing."""
        before, after = map(self.pruning.get, ("parameters_before", "parameters_after"))
        return bool(self.pruning) and before == after

    @property
    def is_floor(self) -> bool:
        """Whether the model knew nothing, or not the question: its score is a floor of the task."""
        blind = self.config.get(MISMATCHED)
        return bool(blind) or self.config.get("model") in _FLOORS

    def exact_floor(self, task: str, metric: str) -> float | None:
        """Return the score without knowledge that a task declares for a metric, or None."""
        floors = as_mapping(self.metadata.get(task, {}).get("floors"))
        return finite_or_none(floors.get(metric.partition(",")[0]))

    def seconds_per_document(self, tasks: Iterable[str]) -> float | None:
        """Return the wall time of evaluating tasks, over their documents; None where it is not known.

        That of a sweep's unit leaves out loading the model, that of the harness includes it.
        """
        timed = [sizes for task in tasks if (sizes := self.evaluated[task]).seconds]
        documents = sum(sizes.documents for sizes in timed)
        return sum(sizes.seconds or 0 for sizes in timed) / documents if timed else None

    def tasks(self, *, subtasks: bool = True) -> list[str]:
        """Return the tasks that have scores, with or without the members of groups."""
        tasks = dict.fromkeys(task for task, _ in self.scores)
        below = {member for task in tasks for member in self.members(task)[1:]}
        return [task for task in tasks if subtasks or task not in below]

    def members(self, task: str) -> list[str]:
        """Return `task` and all its subtasks, at any depth, each once."""
        names = [task]
        for name in names:
            names += [sub for sub in self.subtasks.get(name, ()) if sub not in names]
        return names

    def leaves(self, task: str) -> list[str]:
        """Return the tasks without subtasks at or below `task`."""
        return [name for name in self.members(task) if not self.subtasks.get(name)]


def newest_first(folder: Path) -> list[Path]:
    """Return the results files of a folder, or of those below it where it has none."""
    files = [*folder.glob("results_*.json")] or [*folder.rglob("results_*.json")]
    return sorted(files, key=lambda file: (_date_of(file), str(file)), reverse=True)


def read_results_file(file: Path, seconds: float | None = None) -> Run:
    """Read one results file, after which the run is called; ResultsError if it is none.

    `seconds` are those of the evaluation, by default what the harness says.
    """
    data = read_json(file)
    with reading(f"{file} is damaged", "evaluate again."):
        return _run_of(data, file, seconds)


def _run_of(data: dict[str, Any], file: Path, seconds: float | None) -> Run:
    data |= {key: part(data, key) for key in _SECTIONS}
    config, scores = data["config"], dict(_scores(data))
    if not scores:
        raise ResultsError(
            f"{file} is not a results file of lm-eval: its object 'results' is missing or has no scores."
        )
    groups = data["group_subtasks"].items()
    subtasks = {group: _members(group, names) for group, names in groups if names}
    samples = _find_samples(file, {*data["results"]}.union(*subtasks.values()))
    # Measured over all tasks of the file together.
    energy = {", ".join(data["results"]): as_mapping(config.get("energy"))}
    sizes = {task: _size(data, task) for task in data["n-samples"]}
    counted = sum(documents for documents, _ in sizes.values())
    share = (seconds or _seconds(data)) / counted if counted else 0
    run = Run(
        name=file.stem,
        path=file,
        scores=scores,
        versions={task: version(value) for task, value in data["versions"].items()},
        subtasks=subtasks,
        samples=samples,
        config=config,
        energy=energy if all(energy.values()) else {},
        evaluated={
            task: Evaluated(documents, available, share * documents or None)
            for task, (documents, available) in sizes.items()
        },
    )
    counted_only = sizes.keys() - data["results"].keys()
    leaves = {task for task in run.tasks() if task not in subtasks}
    if unlike := sorted(counted_only | leaves - sizes.keys()) if sizes else []:
        raise ValueError(f"results and n-samples do not both hold {listed(unlike)}")
    for group in subtasks:
        if any(group in subtasks.get(name, ()) for name in run.members(group)):
            raise ValueError(f"the group {group} holds itself")
    settings = {task: settings_of(data, task, run.leaves(task)) for task in run.tasks()}
    return replace(run, settings=settings, metadata=_metadata(data, run, file))


def _members(group: str, names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the group {group} holds {names!r}, not names of tasks")
    return tuple(names)


def _size(data: Mapping[str, Any], task: str) -> tuple[int, int]:
    """Return how many documents of a task were evaluated, and of how many."""
    size = part(data["n-samples"], task)
    documents = size["effective"]
    sizes = documents, size.get("original", documents)
    if not all(type(number) is int and number >= 0 for number in sizes):
        raise ValueError(f"n-samples of {task} are {dict(size)!r}, not numbers")
    return sizes


def _seconds(data: Mapping[str, Any]) -> float:
    """Return the wall time, which the harness writes as a text; 0 where it is not known."""
    try:
        seconds = float(data["total_evaluation_time_seconds"])
    except (LookupError, TypeError, ValueError):
        return 0
    return seconds if 0 < seconds < math.inf else 0


def _metadata(
    data: Mapping[str, Any], run: Run, file: Path
) -> dict[str, dict[str, Any]]:
    """Return what tasks declare; ResultsError for something of a metric that a task does not report."""
    metadata = {}
    for task in run.tasks():
        configs = [part(data["configs"], leaf) for leaf in run.leaves(task)]
        first, *others = (part(config, "metadata") for config in configs)
        # A group has no section of its own.
        declared = metadata[task] = {
            key: value
            for key, value in first.items()
            if all(key in other and other[key] == value for other in others)
        }
        for key in ("cluster", "level"):
            if not isinstance(declared.get(key) or "", str):
                raise ResultsError(
                    f"{file}: {task} declares the {key} {declared[key]!r}: name a field of its documents."
                )
        if run.subtasks.get(task):
            continue
        names = (name for key, name in run.scores if key == task)
        metrics = [*dict.fromkeys(name.partition(",")[0] for name in names)]
        primary, floors = declared.get(PRIMARY), part(declared, "floors")
        named = {f"{PRIMARY}: {primary}": primary} if primary is not None else {}
        named |= {f"a floor of {metric}": metric for metric in floors}
        for what, metric in named.items():
            if metric not in metrics:
                raise ResultsError(
                    f"{file}: {task} declares {what}, which it does not report: name one of {listed(metrics)}."
                )
        for metric, floor in floors.items():
            if finite_or_none(floor) is None:
                raise ResultsError(
                    f"{file}: {task} declares the floor {floor!r} of {metric}: pass a number."
                )
    return metadata


def _scores(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Score]]:
    for task, metrics in data["results"].items():
        if not isinstance(metrics, dict):
            raise TypeError(f"the results of {task} are {metrics!r}, not an object")
        better = part(data["higher_is_better"], task)
        documents = part(data["n-samples"], task).get("effective")
        for metric, value in metrics.items():
            name, comma, filter_name = metric.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            up = None if name.startswith(_BIAS_OF_BBQ) else direction(better.get(name))
            if isinstance(value, int | float):
                error = finite_or_none(metrics.get(f"{name}_stderr,{filter_name}"))
                yield (task, metric), Score(float(value), error, up, documents)
            elif up is not None and not _is_numpys(value):
                raise ValueError(f"{metric} of {task} is {value!r}, not a number")


def _is_numpys(value: Any) -> bool:
    """Whether a value is a number that numpy counted, which the harness writes as a text."""
    with suppress(ValueError):
        return isinstance(value, str) and bool([float(value)])
    return False


def _find_samples(file: Path, tasks: Iterable[str]) -> dict[str, Path]:
    # A results file that was renamed may lie beside samples of one date alone.
    date = _date_of(file) or "????-??-??T*"
    names = {task: f"samples_{glob.escape(task)}_{date}.jsonl" for task in tasks}
    files = {task: list(file.parent.glob(name)) for task, name in names.items()}
    return {task: paths[0] for task, paths in files.items() if len(paths) == 1}


def _date_of(file: Path) -> str:
    match = _DATE.search(file.stem)
    return match[1] if match else ""


def settings_of(
    data: Mapping[str, Any], task: str, leaves: Sequence[str]
) -> dict[str, Any]:
    """Return the settings of a task of a results file, or of a group that is made of `leaves`.

    None for what was off or is not recorded.
    """
    config, every_hash = data["config"], data["task_hashes"]
    pruning, paths = part(config, "pruning"), part(config, "answer_paths")
    counts: list[Any] = [
        part(data["n-samples"], leaf).get("effective") for leaf in leaves
    ]
    # The harness gives a group a number only if all its members have the same.
    shots = {leaf: data["n-shot"].get(leaf) for leaf in leaves}
    common = shots if len({*map(str, shots.values())}) > 1 else shots[leaves[0]]
    task_hash = every_hash.get(leaves[0])
    if len(leaves) > 1:
        hashes = "".join(f"{leaf} {every_hash.get(leaf)}\n" for leaf in sorted(leaves))
        whole = every_hash.keys() >= {*leaves}
        task_hash = hashlib.sha256(hashes.encode()).hexdigest() * whole
    width = pruning.get("intermediate_size_after")
    alike = [{"mlps": pruning.get("layers"), "width_after": width}] * bool(width)
    groups = pruning.get("groups") or alike
    of_run = ("fewshot_as_multiturn", "lm_eval_version", "transformers_version")
    seeds = [f"{kind}_seed" for kind in ("fewshot", "random", "numpy", "torch")]
    settings = {
        **{name: data.get(name) for name in of_run},
        **{name: config.get(name) for name in (*seeds, "gen_kwargs", *MODEL)},
        "documents": None if None in counts else sum(counts),
        "num_fewshot": data["n-shot"].get(task, common),
        "task_hash": task_hash,
        "chat_template": data.get("chat_template_sha"),
        "system_instruction": data.get("system_instruction_sha"),
        "dtype": config.get("model_dtype"),
        "answer_paths": {
            name: sorted(path["requests"]) if isinstance(path, dict) else path
            for name, path in paths.items()
        },
        SERVED_WITH: part(config, SERVED_WITH),
        "widths": ", ".join(f"{g['mlps']} x {g['width_after']}" for g in groups),
        **dict(zip(WEIGHTS, left_of(pruning), strict=True)),
    }
    return {k: v if v or type(v) is int else None for k, v in settings.items()}


def left_of(pruning: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what decides the weights that a pruning left, in the order of `WEIGHTS`.

    `pruning` is the record in a results file; the text is given by its SHA-256 and its tokens.
    """
    repair, text = pruning.get("repair"), pruning.get("calibration")
    if not repair or not isinstance(text, dict):
        text = {}
    return pruning.get("kept_digest"), repair, text.get("sha256"), text.get("tokens")


def asked_differently(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    where: str,
    more: Iterable[str] = (),
) -> str:
    """Say which of `ASKED` and `more` the settings of a task differ in from those `where` says.

    Empty where they make the same test.
    """
    no_shots = before.get("num_fewshot") == after.get("num_fewshot") == 0
    names = [name for name in ASKED if not (no_shots and name in OF_FEWSHOT)]
    return ", ".join(
        f"{name} is {_shown(after.get(name))}, but {_shown(before.get(name))} {where}"
        for name in (*names, *more)
        if before.get(name) != after.get(name)
    )


def _shown(value: Any) -> str:
    """Return a setting for a message; hashes are cut."""
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 and text.isalnum() else text


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return names for a message, no more than `most`."""
    text = ", ".join(names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
