"""From the options of a sweep to its units: which configurations, which tasks, and
what makes each unit the one it is.

A unit is one task on one configuration. Its fingerprint covers everything that
decides its scores, so that a finished unit is recognised and one whose definition
changed is not mistaken for it.
"""

from __future__ import annotations

import copy
import functools
import glob
import hashlib
import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS, plan_rows
from lm_eval_pruned.pruning.criteria import canonical_name
from lm_eval_pruned.pruning.plan import SIZE_ARGUMENTS
from lm_eval_pruned.sweeps.options import parse_number


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.tasks import TaskManager

MODEL = "pruned-hf"

#: Options that say how units are run. They decide no score, so a sweep may go on
#: under others of them: a smaller batch after running out of memory, another device.
_HOW = ("device", "batch_size", "max_batch_size", "use_cache", "cache_requests")

#: Arguments of the model that name files, and a file by which the Hub knows them.
_SOURCES = {
    "pretrained": "config.json",
    "delta": "config.json",
    "peft": "adapter_config.json",
    "tokenizer": "tokenizer_config.json",
}


@dataclass(frozen=True)
class Configuration:
    """One model of the sweep.

    Attributes:
        id: Readable and unique, such as ``ratio-2.4``.
        arguments: What prunes it, such as ``{"ratio": 2.4}``; empty for the baseline.
        kept_width: In neurons.
        expansion_ratio: Kept width / hidden size.
        parameters: Of the pruned model; tied ones count once.
        reduction: Share of the baseline's parameters that is removed, 0 to 1.
    """

    id: str
    arguments: dict[str, Any]
    kept_width: int
    expansion_ratio: float
    parameters: int
    reduction: float


@dataclass(frozen=True)
class SweepTask:
    """One task, or one group with a score of its own.

    Attributes:
        name: The harness's name of it.
        digest: Hash of its YAML, its Python files and its local data.
        spec: Its name, or a group of nothing else that holds its settings; see `load_task`.
    """

    name: str
    digest: str
    spec: Any = field(repr=False, compare=False)


class Sweep:
    """A sweep that has been planned: nothing is loaded, nothing is evaluated.

    Args:
        options: From `sweep_options.read_options`.

    Attributes:
        options: As given.
        settings: The harness's own reading of them.
        configurations: Baseline first, then in the order asked for.
        tasks: In the order asked for.

    Raises:
        ValueError: An option, a size or a task does not exist or fit the model.
        OSError: The model's config cannot be read.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.settings = _settings(options)
        self._base = self.settings.model_args
        self.configurations = _configurations(options, self._base)
        for cached in (_hash_tree, _hash_beside):
            cached.cache_clear()
        self._manager = _index_tasks(self.settings.include_path)
        self.tasks = resolve_tasks(options["tasks"], self._manager)

    def units(
        self, shard: tuple[int, int] | None = None
    ) -> list[tuple[Configuration, SweepTask]]:
        """Return the units, those of one configuration together.

        Args:
            shard: ``(I, N)`` to return part I of N. Units are dealt out task by
                task, so that N parts of N configurations get one model each.
        """
        numbers = {
            (configuration.id, task.name): number
            for number, (task, configuration) in enumerate(
                (task, configuration)
                for task in self.tasks
                for configuration in self.configurations
            )
        }
        part, parts = shard or (0, 1)
        return [
            (configuration, task)
            for configuration in self.configurations
            for task in self.tasks
            if numbers[configuration.id, task.name] % parts == part
        ]

    def model_args(self, configuration: Configuration) -> dict[str, Any]:
        """Return the arguments that ``lm_eval --model_args`` would take."""
        base = dict(self._base)
        if not configuration.arguments:
            base.pop("multiple_of", None)
        return {**base, **configuration.arguments}

    def metadata(self, configuration: Configuration) -> dict[str, Any]:
        """Return what the harness hands to tasks: model arguments, then --metadata."""
        own = self.options.get("metadata") or {}
        return {**self.model_args(configuration), **own}

    def task_manager(self, configuration: Configuration) -> TaskManager:
        """Return the harness's task manager as `lm_eval run` would make it."""
        return _with_metadata(self._manager, self.metadata(configuration))

    @functools.cached_property
    def sources(self) -> dict[str, dict[str, str | None]]:
        """What the model is made from: content hashes of folders, commits on the Hub."""
        revision = self._base.get("revision") or "main"
        named = {
            argument: str(self._base[argument])
            for argument in _SOURCES
            if self._base.get(argument)
        }
        named.setdefault("pretrained", str(_model_source(self._base)["pretrained"]))
        return {
            argument: _source(
                name, revision, str(self._base.get("subfolder") or ""), argument
            )
            for argument, name in named.items()
        }

    def model_definition(self, configuration: Configuration) -> dict[str, Any]:
        """Return everything that decides which model a configuration is."""
        arguments = {
            name: value
            for name, value in self.model_args(configuration).items()
            if name not in _HOW and "sha256" not in self.sources.get(name, {})
        }
        return {"model": MODEL, "model_args": arguments, "sources": self.sources}

    def definition(
        self, configuration: Configuration, task: SweepTask
    ) -> dict[str, Any]:
        """Return everything that decides a unit's scores."""
        settings = self.settings
        return {
            **self.model_definition(configuration),
            "task": task.name,
            "task_sha256": task.digest,
            "settings": {
                name: getattr(settings, name)
                for name in (
                    "num_fewshot",
                    "limit",
                    "samples",
                    "apply_chat_template",
                    "fewshot_as_multiturn",
                    "system_instruction",
                    "gen_kwargs",
                    "log_samples",
                    "predict_only",
                    "seed",
                )
            },
            "metadata": self.options.get("metadata") or {},
            "versions": {
                package: version(package) for package in ("lm-eval", "lm-eval-pruned")
            },
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``sweep.json``: the same for every shard and every start."""
        return {
            "definition": {
                name: value
                for name, value in self.options.items()
                if name
                not in (*_HOW, "output_path", "ray", "gpus_per_unit", "cpus_per_unit")
            },
            "sources": self.sources,
            "configurations": [asdict(each) for each in self.configurations],
            "tasks": [each.name for each in self.tasks],
        }


def fingerprint(definition: dict[str, Any]) -> str:
    """Return the hash of a definition, as 64 hexadecimal digits."""
    text = json.dumps(definition, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _settings(options: dict[str, Any]) -> EvaluatorConfig:
    from lm_eval.config.evaluate_config import EvaluatorConfig

    own = ("ratios", "prune_percents", "criteria", "seeds", "ray")
    known = {
        name: value
        for name, value in options.items()
        if name not in own and not name.endswith("_per_unit")
    }
    arguments = dict(options.get("model_args") or {})
    for name in (*SIZE_ARGUMENTS, "criterion", "seed"):
        if name in arguments:
            instead = {
                "ratio": "--ratios",
                "prune_percent": "--prune_percents",
                "criterion": "--criteria",
                "seed": "--seeds",
            }.get(name, "--ratios")
            raise ValueError(
                f"model_args has {name}={arguments[name]}, but a sweep sets it for each of its "
                f"configurations: use {instead}."
            )
    known["model_args"] = arguments
    if "seed" in known:
        known["seed"] = _seeds(known["seed"])
    known["log_samples"] = options.get("log_samples", True)
    # from_cli takes what is true or zero, as lm_eval run has it.
    return EvaluatorConfig.from_cli(Namespace(model=MODEL, **known))


def _seeds(text: str) -> list[int | None]:
    try:
        return [
            None if part.strip().lower() == "none" else int(part)
            for part in text.split(",")
        ]
    except ValueError:
        raise ValueError(
            f"seed={text} is not a whole number or four of them: pass one such as 42 or "
            "0,1234,1234,1234."
        ) from None


def _model_source(base: dict[str, Any]) -> dict[str, Any]:
    if not base.get("pretrained"):
        from lm_eval_pruned.checkpoints.default_model import find_default_model

        base = {**base, **find_default_model().model_args()}
    names = ("pretrained", *SOURCE_ARGUMENTS)
    return {name: base[name] for name in names if base.get(name)}


def _configurations(
    options: dict[str, Any], base: dict[str, Any]
) -> list[Configuration]:
    criteria = list(
        dict.fromkeys(canonical_name(name) for name in options.get("criteria", ["maw"]))
    )
    seeds = list(
        dict.fromkeys(_whole("seeds", text) for text in options.get("seeds", []))
    )
    if seeds and "random" not in criteria:
        raise ValueError(
            f"seeds={' '.join(map(str, seeds))} were given, but only the criterion random has "
            "any: add --criteria random, or leave --seeds out."
        )
    plan = functools.partial(plan_rows, **_model_source(base))
    baseline = plan(argument="prune_percent", values=["0"])[0]
    found = [
        Configuration(
            "baseline",
            {},
            baseline.intermediate_size,
            baseline.expansion_ratio,
            baseline.parameters,
            0.0,
        )
    ]
    for option, argument in (("ratios", "ratio"), ("prune_percents", "prune_percent")):
        values = [_canonical(text) for text in options.get(option, [])]
        rows = plan(
            argument=argument,
            values=values,
            multiple_of=base.get("multiple_of") or 1,
        )
        for value, row in zip(values, rows, strict=True):
            if row.intermediate_size == baseline.intermediate_size:
                continue
            for criterion in criteria:
                for seed in (seeds or [0]) if criterion == "random" else [0]:
                    arguments: dict[str, Any] = {argument: parse_number(value)}
                    if criterion != "maw":
                        arguments["criterion"] = criterion
                    if criterion == "random" and seeds:
                        arguments["seed"] = seed
                    found.append(
                        Configuration(
                            _id(arguments),
                            arguments,
                            row.intermediate_size,
                            row.expansion_ratio,
                            row.parameters,
                            row.reduction,
                        )
                    )
    return list({each.id: each for each in found}.values())


def _id(arguments: dict[str, Any]) -> str:
    return "_".join(f"{name}-{value}" for name, value in arguments.items()).replace(
        "/", "over"
    )


def _canonical(text: str) -> str:
    """Return one notation for one number, so that 2.40 is the same configuration as 2.4."""
    try:
        number = Decimal(text)
        return f"{number.normalize():f}" if number.is_finite() else text
    except InvalidOperation:
        return text


def _whole(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(
            f"{name} has {text}, which is not a whole number of 0 or more: pass some such as "
            "0 1 2."
        )
    return number


# Tasks


def _index_tasks(include_path: str | None) -> TaskManager:
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={include_path} is not a folder: pass one.")
    return TaskManager(include_path=include_path)


def _with_metadata(manager: TaskManager, metadata: dict[str, Any]) -> TaskManager:
    """Return a copy of `manager` that attaches `metadata` to the tasks it loads.

    A new one would read the harness's ten thousand YAML files again.
    """
    from lm_eval.tasks._factory import TaskFactory

    manager = copy.copy(manager)
    manager.metadata = metadata
    manager._factory = TaskFactory(meta=metadata)
    return manager


def resolve_tasks(names: list[str], manager: TaskManager) -> list[SweepTask]:
    """Return the units' tasks for names, patterns, tags, groups and YAML files.

    A group that aggregates its members' scores stays whole, since its score is
    made from all of them. A group that only collects tasks, and a tag, become one
    unit per member, with the settings that the group gives its members.

    Raises:
        ValueError: A name matches nothing, or one task is asked for in two ways.
    """
    tasks: dict[str, SweepTask] = {}
    missing = []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            matches = [str(Path(path).resolve()) for path in sorted(glob.glob(name))]
        else:
            matches = sorted(manager.match_tasks([name]))
        if not matches:
            missing.append(name)
        for match in matches:
            for task in _Members(manager).of(match, {}, None):
                other = tasks.setdefault(task.name, task)
                if other.digest != task.digest:
                    raise ValueError(
                        f"the task {task.name} is asked for twice, with different settings: "
                        f"leave one of them out of --tasks {' '.join(names)}."
                    )
    if missing:
        raise ValueError(
            f"--tasks has {', '.join(missing)}, which no task, group or tag is called: "
            "`lm_eval ls tasks` lists them; --include_path adds a folder of your own."
        )
    return list(tasks.values())


def load_task(manager: TaskManager, task: SweepTask) -> list[Any]:
    """Return the harness's Task or Group objects of a unit; this loads its data."""
    if isinstance(task.spec, str):
        return [task.spec]
    from lm_eval.tasks._factory import TaskFactory
    from lm_eval.tasks._index import TaskIndex

    # `TaskManager.load` would hand a dict's own key `task` down to the members of
    # groups in it, in place of their names.
    wrapper = TaskFactory(meta=manager.metadata).build(
        TaskIndex.entry_from_config(task.spec), registry=manager.task_index
    )
    return list(wrapper)


class _Members:
    """Expands groups and tags on the level of their YAML, without loading data."""

    def __init__(self, manager: TaskManager) -> None:
        self._index = manager.task_index

    def of(
        self, name: str, overrides: dict[str, Any], parent: str | None
    ) -> Iterator[SweepTask]:
        from lm_eval.tasks._index import TaskIndex

        entry = self._index.get(name) or TaskIndex.entry_from_path(Path(name))
        if entry is None:
            raise ValueError(
                f"the group {parent} has the member {name}, which no task is called."
            )
        if entry.kind.name == "TAG":
            for member in sorted(entry.tags):
                yield from self.of(member, overrides, parent)
        elif entry.kind.name == "GROUP" and not _config(entry).get(
            "aggregate_metric_list"
        ):
            yield from self._of_group(entry.name, _config(entry), overrides)
        else:
            key = "group" if entry.kind.name == "GROUP" else "task"
            yield self._unit(name, entry.name, {**overrides, key: name}, parent)

    def _of_group(
        self, group: str, config: dict[str, Any], overrides: dict[str, Any]
    ) -> Iterator[SweepTask]:
        from lm_eval.tasks._factory import GROUP_FIELD_NAMES

        members = config.get("task")
        shared = {k: v for k, v in config.items() if k not in GROUP_FIELD_NAMES}
        shared.update(overrides)
        for member in members if isinstance(members, list) else []:
            if isinstance(member, str):
                yield from self.of(member, shared, group)
                continue
            is_group = "group" in member
            name = member["group" if is_group else "task"]
            if name in self._index:
                own = {k: v for k, v in member.items() if k not in ("group", "task")}
                yield from self.of(name, {**shared, **own}, group)
            elif is_group and not member.get("aggregate_metric_list"):
                yield from self._of_group(f"{group}::{name}", member, shared)
            else:
                yield self._unit(
                    name,
                    f"{group}::{name}",
                    {**member, **shared} if is_group else {**shared, **member},
                    group,
                )

    def _unit(
        self, name: str, label: str, item: dict[str, Any], parent: str | None
    ) -> SweepTask:
        described = _describe([item, self._tree(name)])
        digest = hashlib.sha256(
            json.dumps(described, sort_keys=True, default=str).encode()
        ).hexdigest()
        plain = len(item) == 1 and (name in self._index or Path(name).is_file())
        spec = name if plain else {"group": parent or "sweep", "task": [item]}
        return SweepTask(label, digest, spec)

    def _tree(self, name: str) -> Any:
        """Return the YAML of a task, or of a group and everything below it."""
        from lm_eval.tasks._index import TaskIndex

        entry = self._index.get(name) or TaskIndex.entry_from_path(Path(name))
        if entry is None:
            return None
        if entry.kind.name == "TAG":
            return [self._tree(member) for member in sorted(entry.tags)]
        config = _config(entry, resolve=False)
        if entry.kind.name != "GROUP" or not isinstance(config.get("task"), list):
            return config
        members = []
        for member in config["task"]:
            below = member if isinstance(member, str) else member.get("task")
            if isinstance(member, dict) and "group" in member:
                below = member["group"]
            members.append([member, self._tree(below) if below != name else None])
        return [config, members]


def _config(entry: Any, resolve: bool = True) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    if entry.yaml_path is None:
        return entry.cfg or {}
    if not resolve and entry.cfg is not None:
        return entry.cfg
    return load_yaml(entry.yaml_path, resolve_func=resolve)


def _describe(value: Any) -> Any:
    """Return `value` with functions and local data replaced by hashes of their files.

    Paths go, so that a task folder may move; contents stay.
    """
    if isinstance(value, dict):
        described = {key: _describe(item) for key, item in value.items()}
        data = value.get("dataset_path")
        if isinstance(data, str) and Path(data).is_dir():
            described["dataset_path"] = _hash_tree(Path(data))
        files = value.get("dataset_kwargs")
        if isinstance(files, dict):
            described["dataset_kwargs"] = _describe_data(files)
        return described
    if isinstance(value, (list, tuple)):
        return [_describe(item) for item in value]
    if isinstance(value, Callable):  # type: ignore[arg-type]
        code = getattr(value, "__code__", None)
        return [
            getattr(value, "__qualname__", str(value)),
            _hash_beside(Path(code.co_filename).parent) if code else None,
        ]
    if isinstance(value, str) and value.startswith("/") and "\n" not in value:
        # The loader leaves `!function module.name` as FOLDER/module.name.
        folder, _, function = value.rpartition("/")
        module = function.rpartition(".")[0].replace(".", "/")
        if module and Path(folder, f"{module}.py").is_file():
            return [function, _hash_beside(Path(folder, f"{module}.py").parent)]
    return value


def _describe_data(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _describe_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe_data(item) for item in value]
    if isinstance(value, str) and len(value) < 4096 and "\n" not in value:
        path = Path(value)
        if path.is_file():
            return _hash_file(path)
        if path.is_dir():
            return _hash_tree(path)
        if glob.has_magic(value):
            return [_hash_file(Path(each)) for each in sorted(glob.glob(value))]
    return _describe(value)


# Files


def _source(
    name: str, revision: str, subfolder: str, argument: str
) -> dict[str, str | None]:
    """Return what identifies a checkpoint: of a folder its content, on the Hub the commit.

    Other folders in it, such as the checkpoints of a training, do not count.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / subfolder).is_dir():
            folder /= subfolder
        return {"sha256": _hash_tree(folder, deep=False)}
    from transformers.utils import cached_file

    try:
        path = Path(
            cached_file(name, _SOURCES[argument], revision=revision) or ""
        ).parts
        return {"name": name, "commit": path[path.index("snapshots") + 1]}
    except (OSError, ValueError, IndexError):
        return {"name": name, "commit": None}


@functools.lru_cache(maxsize=64)
def _hash_tree(folder: Path, deep: bool = True) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
        hidden = any(
            part.startswith(".") or part == "__pycache__"
            for part in path.relative_to(folder).parts
        )
        if path.is_file() and not hidden:
            digest.update(f"{path.relative_to(folder)}\0{_hash_file(path)}\n".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)
def _hash_beside(folder: Path) -> str:
    """Return the hash of the files that a task's Python file may import or read."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix not in (".yaml", ".yml", ".md", ".pyc"):
            digest.update(f"{path.name}\0{_hash_file(path)}\n".encode())
    return digest.hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
