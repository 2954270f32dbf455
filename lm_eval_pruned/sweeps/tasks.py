"""From the names that a user gives to the tasks of a sweep, each with a digest of what defines it.

The harness's own factory expands groups and tags; ours only keeps it from loading data.
"""

from __future__ import annotations

import ast
import copy
import functools
import glob
import hashlib
import inspect
import json
import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.utils.sha import sha_fileobj
from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY
from lm_eval.tasks._factory import GROUP_FIELD_NAMES, TaskFactory

from lm_eval_pruned.util.options import nearest


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval.tasks import TaskManager

#: Settings of a task that may name files.
_DATA = ("dataset_path", "dataset_kwargs")


@dataclass(frozen=True)
class SweepTask:
    """One task, or one group that has a score; `build` makes it with a factory, and loads data.

    The `digest` is the hash of its settings, the code of its functions and its local data. The
    `metrics` are those that its YAML names; none for a task that is a Python class.
    """

    name: str
    digest: str
    build: Callable[[TaskFactory], Any] = field(repr=False, compare=False)
    metrics: tuple[str, ...] = field(default=(), compare=False)


def index_tasks(include_path: str | None) -> TaskManager:
    """Return the tasks of the harness, ours, and those of `include_path`."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={include_path} is not a folder: pass one.")
    hash_folder.cache_clear()
    _hash_code.cache_clear()
    return TaskManager(include_path=include_path)


def with_metadata(manager: TaskManager, metadata: dict[str, Any]) -> TaskManager:
    """Return a copy of `manager` that attaches `metadata` to the tasks it loads."""
    # A new one would read the harness's ten thousand YAML files again.
    manager = copy.copy(manager)
    manager.metadata = metadata
    manager._factory = TaskFactory(meta=metadata)
    return manager


def resolve_tasks(names: list[str], manager: TaskManager) -> list[SweepTask]:
    """Return the units' tasks for names, patterns, tags, groups and YAML files.

    A group that aggregates its members' scores stays whole. A group that only collects tasks, and
    a tag, become one unit per member, with the settings that the group gives its members.
    ValueError if a name matches nothing, or one task is asked for in two ways.
    """
    planned = with_metadata(manager, {})
    planned._factory = _Planning()
    tasks: dict[str, SweepTask] = {}
    known = {*manager.all_tasks}
    for name in names:
        is_file = name.endswith((".yaml", ".yml"))
        matches = glob.glob(name) if is_file else manager.match_tasks([name])
        if not is_file:
            # lm-eval 0.5 returns what matches nothing as it is.
            matches = [match for match in matches if match.partition("@")[0] in known]
        if not matches:
            advice = nearest(name, manager.all_tasks, "`lm_eval ls tasks` lists them.")
            raise ValueError(
                f"--tasks has {name}, but no task, group or tag has that name: {advice} "
                "--include_path adds a folder of your own."
            )
        built = [planned._load_spec(match) for match in sorted(matches)]
        for task in _flat(built):
            if tasks.setdefault(task.name, task) != task:
                raise ValueError(
                    f"the task {task.name} is requested twice, with different settings: "
                    f"leave one of them out of --tasks {' '.join(names)}."
                )
    return list(tasks.values())


class _Planning(TaskFactory):
    """Makes a `SweepTask`, or a nested list of them, where the harness makes a Task or a Group."""

    def _build_task(self, entry, overrides) -> Any:
        config = self._load_full_config(entry, overrides)
        build = operator.methodcaller("_build_task", entry, overrides)
        return _task(config, build)

    def _build_group(self, group_name, raw_cfg, overrides, registry, *more) -> Any:
        settings = {k: v for k, v in raw_cfg.items() if k not in GROUP_FIELD_NAMES}
        listed = raw_cfg["task"] if isinstance(raw_cfg.get("task"), list) else []
        shared = settings | (overrides or {})
        members = self._build_group_members(listed, group_name, shared, registry, *more)
        if not raw_cfg.get("aggregate_metric_list"):
            return members
        below = [(task.name, task.digest) for task in _flat(members)]
        arguments = group_name, raw_cfg, overrides, registry, *more
        build = operator.methodcaller("_build_group", *arguments)
        digest = fingerprint(_described([raw_cfg, shared, below]))
        listed = raw_cfg["aggregate_metric_list"]
        metrics = _metric_names(listed if isinstance(listed, list) else [listed])
        return SweepTask(group_name, digest, build, metrics)

    def _build_group_members(
        self, member_list, group_name, overrides, registry, *more
    ) -> list[Any]:
        members: list[Any] = []
        for item in member_list:
            settings = item if isinstance(item, dict) else {"task": item}
            task = None if "group" in settings else settings.get("task")
            if not isinstance(task, str) or task in registry:
                members += super()._build_group_members(
                    [item], group_name, overrides, registry, *more
                )
                continue
            name = f"{group_name}::{task}"
            config = {"metadata": {}, **(overrides or {}), **settings, "task": name}
            arguments = [item], group_name, overrides, registry, *more
            members.append(_task(config, functools.partial(_inline, arguments)))
        return members


def _inline(arguments: tuple[Any, ...], factory: TaskFactory) -> Any:
    """Make a task that a group defines in its own YAML."""
    (task,) = factory._build_group_members(*arguments)
    return task


def _task(config: dict[str, Any], build: Callable[[TaskFactory], Any]) -> SweepTask:
    kind = config.get("output_type", "generate_until")
    usual = [{"metric": name} for name in DEFAULT_METRIC_REGISTRY.get(kind, ())]
    listed = [] if "class" in config else config.get("metric_list") or usual
    digest = fingerprint(_described(config))
    return SweepTask(config["task"], digest, build, _metric_names(listed))


def _metric_names(listed: list[dict[str, Any]]) -> tuple[str, ...]:
    names = [metric["metric"] for metric in listed]
    return tuple(getattr(metric, "__name__", str(metric)) for metric in names)


def _flat(built: Any) -> list[SweepTask]:
    if isinstance(built, SweepTask):
        return [built]
    return [task for member in built for task in _flat(member)]


def _described(value: Any, key: str = "") -> Any:
    """Return settings with code and local data by content, so that folders may move."""
    if isinstance(value, dict):
        data = key in _DATA
        return {
            name: _described(below, key if data else name)
            for name, below in value.items()
            if name != "config_source"
        }
    if isinstance(value, (list, tuple)):
        return [_described(item, key) for item in value]
    if isinstance(value, functools.partial):
        return _described([value.func, value.args, value.keywords])
    if callable(value):
        file = getattr(inspect.getmodule(value), "__file__", None)
        code = file and _hash_code(Path(file))
        return [getattr(value, "__qualname__", type(value).__qualname__), code]
    if key in _DATA and isinstance(value, str):
        paths = map(Path, sorted(glob.glob(value)))
        hashes = (hash_folder(p) if p.is_dir() else hash_file(p) for p in paths)
        return [*hashes] or value
    return value


def fingerprint(definition: Any) -> str:
    """Return the hash of what JSON can hold, as 64 hexadecimal digits."""
    text = json.dumps(definition, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def _hash_code(file: Path) -> str:
    """Return the hash of a module, of those beside it that it imports, and of files there that these name.

    A file is named by a text that its name ends with, such as ``data.jsonl``, ``*.jsonl`` or ``.jsonl``.
    """
    beside = [path for path in sorted(file.parent.iterdir()) if path.is_file()]
    read = [file]
    # It grows meanwhile.
    for module in read:
        if module.suffix != ".py":
            continue
        imported, texts = set(), set()
        for node in ast.walk(ast.parse(module.read_bytes())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [name.name for name in node.names]
                names += [getattr(node, "module", None) or ""]
                imported |= {part for name in names for part in name.split(".")}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                end = node.value.rpartition("/")[2].rpartition("*")[2]
                texts |= {end} if "." in end else set()
        for path in beside:
            python = path.suffix == ".py" and path.stem in imported
            if path not in read and (python or path.name.endswith((*texts,))):
                read.append(path)
    content = [(path.name, hash_file(path)) for path in sorted(read)]
    return fingerprint(content)


@functools.cache
def hash_folder(folder: Path) -> str:
    """Return the hash of the files in `folder` and below it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith((".", "__pycache__")) for part in inner.parts)
        if path.is_file() and not hidden:
            digest.update(f"{inner}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()
