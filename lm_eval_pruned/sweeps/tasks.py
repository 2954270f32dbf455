"""From the names that a user gives to the tasks of a sweep, each a unit of its own."""

from __future__ import annotations

import copy
import glob
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.sweeps.fingerprints import describe, entry_config


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
        elif entry.kind.name == "GROUP" and not entry_config(entry).get(
            "aggregate_metric_list"
        ):
            yield from self._of_group(entry.name, entry_config(entry), overrides)
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
        described = describe([item, self._tree(name)])
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
        config = entry_config(entry, resolve=False)
        if entry.kind.name != "GROUP" or not isinstance(config.get("task"), list):
            return config
        members = []
        for member in config["task"]:
            below = member if isinstance(member, str) else member.get("task")
            if isinstance(member, dict) and "group" in member:
                below = member["group"]
            members.append([member, self._tree(below) if below != name else None])
        return [config, members]
