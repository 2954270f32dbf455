"""From the names that a user gives to the tasks of a sweep, each with a digest of all that defines it."""

from __future__ import annotations

import copy
import functools
import glob
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.tasks import TaskManager


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


def index_tasks(include_path: str | None) -> TaskManager:
    """Return the tasks of the harness, ours, and those of `include_path`."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={include_path} is not a folder: pass one.")
    hash_folder.cache_clear()
    return TaskManager(include_path=include_path)


def with_metadata(manager: TaskManager, metadata: dict[str, Any]) -> TaskManager:
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
    for name in names:
        if name.endswith((".yaml", ".yml")):
            matches = [str(Path(path).resolve()) for path in sorted(glob.glob(name))]
        else:
            matches = sorted(manager.match_tasks([name]))
        if not matches:
            raise ValueError(
                f"--tasks has {name}, which no task, group or tag is called: "
                "`lm_eval ls tasks` lists them; --include_path adds a folder of your own."
            )
        for match in matches:
            for task in _members(manager.task_index, match, {}, None):
                if tasks.setdefault(task.name, task) != task:
                    raise ValueError(
                        f"the task {task.name} is asked for twice, with different settings: "
                        f"leave one of them out of --tasks {' '.join(names)}."
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


def _members(
    index: dict[str, Any], name: str, overrides: dict[str, Any], parent: str | None
) -> Iterator[SweepTask]:
    """Expand a group or a tag on the level of its YAML, without loading data."""
    entry = _entry(index, name)
    if entry is None:
        raise ValueError(
            f"the group {parent} has the member {name}, which no task is called."
        )
    config = _config(entry, resolve=True)
    if entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _members(index, member, overrides, parent)
    elif entry.kind.name != "GROUP":
        yield _unit(index, name, entry.name, {**overrides, "task": name}, parent)
    elif config.get("aggregate_metric_list"):
        yield _unit(index, name, entry.name, {**overrides, "group": name}, parent)
    else:
        yield from _members_of_group(index, entry.name, config, overrides)


def _members_of_group(
    index: dict[str, Any], group: str, config: dict[str, Any], overrides: dict[str, Any]
) -> Iterator[SweepTask]:
    from lm_eval.tasks._factory import GROUP_FIELD_NAMES

    shared = {k: v for k, v in config.items() if k not in GROUP_FIELD_NAMES} | overrides
    for member in config["task"] if isinstance(config.get("task"), list) else []:
        if isinstance(member, str):
            yield from _members(index, member, shared, group)
            continue
        name, is_group = _name(member), "group" in member
        label = f"{group}::{name}"
        if name in index:
            own = {k: v for k, v in member.items() if k not in ("group", "task")}
            yield from _members(index, name, {**shared, **own}, group)
        elif not is_group:
            yield _unit(index, name, label, {**shared, **member}, group)
        elif member.get("aggregate_metric_list"):
            yield _unit(index, name, label, {**member, **shared}, group)
        else:
            yield from _members_of_group(index, label, member, shared)


def _name(member: dict[str, Any]) -> str:
    return member["group" if "group" in member else "task"]


def _unit(
    index: dict[str, Any],
    name: str,
    label: str,
    item: dict[str, Any],
    parent: str | None,
) -> SweepTask:
    plain = len(item) == 1 and _entry(index, name) is not None
    spec = name if plain else {"group": parent or "sweep", "task": [item]}
    return SweepTask(label, fingerprint(_described([item, _tree(index, name)])), spec)


def _tree(index: dict[str, Any], name: str) -> Any:
    """Return the YAML of a task, or of a group and everything below it."""
    entry = _entry(index, name)
    if entry is None:
        return None
    if entry.kind.name == "TAG":
        return [_tree(index, member) for member in sorted(entry.tags)]
    config = _config(entry)
    if entry.kind.name != "GROUP" or not isinstance(config.get("task"), list):
        return config
    members = []
    for member in config["task"]:
        below = member if isinstance(member, str) else _name(member)
        members.append([member, _tree(index, below) if below != name else None])
    return [config, members]


def _entry(index: dict[str, Any], name: str) -> Any:
    from lm_eval.tasks._index import TaskIndex

    return index.get(name) or TaskIndex.entry_from_path(Path(name))


def _config(entry: Any, resolve: bool = False) -> dict[str, Any]:
    """Return the config of an entry of the harness's index, with its functions if `resolve`."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if entry.yaml_path is None or (entry.cfg is not None and not resolve):
        return entry.cfg or {}
    return load_yaml(entry.yaml_path, resolve_func=resolve)


def _described(value: Any, data: bool = False) -> Any:
    """Return settings with code and local data as hashes, so that a task's folder may move."""
    if isinstance(value, dict):
        own = ("dataset_path", "dataset_kwargs")
        return {k: _described(each, data or k in own) for k, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(each, data) for each in value]
    if callable(value):
        code = getattr(value, "__code__", None)
        beside = _hash_code(Path(code.co_filename).parent) if code else None
        return [getattr(value, "__qualname__", str(value)), beside]
    if not isinstance(value, str) or "\n" in value or len(value) >= 4096:
        return value
    if data and Path(value).is_file():
        return hash_file(Path(value))
    if data and Path(value).is_dir():
        return hash_folder(Path(value), deep=True)
    if data and glob.has_magic(value):
        return [hash_file(Path(each)) for each in sorted(glob.glob(value))]
    # The loader leaves `!function module.name` as FOLDER/module.name.
    folder, _, function = value.rpartition("/")
    module = Path(folder, function.rpartition(".")[0].replace(".", "/") + ".py")
    if value.startswith("/") and module.is_file():
        return [function, _hash_code(module.parent)]
    return value


def _hash_code(folder: Path) -> str:
    """Return the hash of the files that a task's Python file may import or read."""
    return hash_folder(folder, without=(".yaml", ".yml", ".md"))


def fingerprint(definition: Any) -> str:
    """Return the hash of what JSON can hold, as 64 hexadecimal digits."""
    text = json.dumps(definition, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=4096)
def hash_folder(folder: Path, deep: bool = False, without: tuple[str, ...] = ()) -> str:
    """Return the hash of the files in `folder`, and below it if `deep`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
        place = path.relative_to(folder)
        hidden = any(part.startswith((".", "__pycache__")) for part in place.parts)
        if path.is_file() and not hidden and path.suffix not in without:
            digest.update(f"{place}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
