"""``lm-eval-pruned sweep``: many configurations by many tasks, each result kept at once.

`plan` says which units there are, `folder` keeps them, this module runs those that
are missing: here, or through `ray` on a cluster; `unit` runs one.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import DECLARED
from lm_eval_pruned.results.folder import is_sweep, read_definition, unit_folder
from lm_eval_pruned.results.runs import read_newest
from lm_eval_pruned.sweeps.folder import SweepFolder
from lm_eval_pruned.sweeps.plan import Sweep, Unit
from lm_eval_pruned.sweeps.ray import run_on_ray
from lm_eval_pruned.sweeps.tasks import fingerprint
from lm_eval_pruned.sweeps.unit import UnitRunner
from lm_eval_pruned.util.progress import Progress
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.sweeps.tasks import SweepTask
    from lm_eval_pruned.sweeps.unit import Ended


def run_sweep(
    options: dict[str, Any],
    *,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> int:
    """Run the units of a sweep that its folder does not hold yet; see `options` for the arguments.

    Returns:
        Exit code: 0 where every unit of this sweep (or shard) is done, 1 where one
        failed or could not be run, 130 after Ctrl-C.

    Raises:
        ValueError: The sweep cannot be planned, or its folder is in use.
        OSError: The model's config or the folder cannot be read or written.
    """
    sweep = Sweep(options)
    folder = SweepFolder(options["output_path"], shard)
    units = sweep.units(shard)
    if dry_run:
        _kept(sweep, folder)
        print(_plan_table(sweep, units, folder), end="")
        return 0
    ranks = _Ranks()
    part = f"_shard{shard[0]}of{shard[1]}" if shard else ""
    runner = UnitRunner(sweep, part, functools.partial(_unpruned_run, sweep, folder))
    if not ranks.main:
        followed = _run_here(runner, units, ranks, tempfile.TemporaryDirectory)
        collections.deque(followed, maxlen=0)
        return int(runner.device_failed)
    # What the Hub refuses, it refuses before the first model is loaded.
    sweep.tracking.hub_tracker()
    with folder.held():
        folder.write_definition(sweep.as_dict(_kept(sweep, folder)))
        done, failed, waiting = _sort(sweep, units, folder)
        if retry_failed:
            failed, waiting = [], [unit for unit in units if unit in failed + waiting]
        names = [unit.task.name for unit in waiting]
        seconds = [(unit.task.name, spent) for unit, spent in done]
        progress = Progress(len(done), len(failed), names, seconds)
        new = folder.new_unit
        if options.get("ray"):
            ended = run_on_ray(sweep, waiting, new, progress, part)
        else:
            ended = _run_here(runner, waiting, ranks, new, progress.start)
        with contextlib.closing(progress), contextlib.closing(ended):
            try:
                for unit, files, spent, error in ended:
                    definition = sweep.definition(*unit)
                    scores = folder.keep(files, unit.names, spent, definition, error)
                    progress.finish(*unit.names, spent, scores, error)
            except KeyboardInterrupt:
                ended.close()
                print(
                    f"Stopped: {progress.done} of {len(units)} units are done. The same "
                    "command goes on from here."
                )
                return 130
    if runner.device_failed:
        print(
            "Stopped: after an error of its device this process can evaluate nothing else. The "
            "same command goes on with the other units."
        )
    if progress.failed:
        print(
            f"{progress.failed} of {len(units)} units failed; error.json in their folders "
            f"below {folder.path / 'units'} says why, --retry_failed tries them again."
        )
    return 0 if progress.done == len(units) else 1


def _run_here(
    runner: UnitRunner,
    units: list[Unit],
    ranks: _Ranks,
    new_folder: Callable[[], Any],
    starts: Callable[[str, str], None] = lambda *names: None,
) -> Generator[Ended]:
    """Evaluate the units that wait in the main process, and yield how each ended."""
    waiting = ranks.from_main([unit.names for unit in units])
    for unit in [unit for unit in units if unit.names in waiting]:
        starts(*unit.names)
        with new_folder() as files:
            seconds, error = runner.attempt(unit, Path(files))
            # Processes talk through their devices: without one, this process can only leave, and
            # the launcher ends the others.
            if not runner.device_failed:
                error = ranks.first_error(error)
            yield unit, files, seconds, error
        if runner.device_failed:
            return
    runner.release()


class _Ranks:
    """The processes that share each unit, as `accelerate launch` starts them; or one alone.

    The harness gathers the scores in the main one, which alone reads and writes the folder.
    """

    def __init__(self) -> None:
        self._several = int(os.environ.get("WORLD_SIZE") or 1) > 1
        self.main = True
        if self._several:
            from accelerate import Accelerator, InitProcessGroupKwargs

            # As HFLM has it: processes wait for the slowest, however long it takes.
            patience = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
            accelerator = Accelerator(kwargs_handlers=[patience])
            if accelerator.num_processes == 1:
                raise ValueError(
                    f"WORLD_SIZE={os.environ['WORLD_SIZE']} announces several processes, but "
                    "accelerate sees one: set ACCELERATE_USE_CPU=true for processes on CPUs."
                )
            self.main = accelerator.is_main_process

    def from_main(self, names: list[tuple[str, str]]) -> list[tuple[str, str]]:
        if self._several:
            from accelerate.utils import broadcast_object_list

            (names,) = broadcast_object_list([names])
        return names

    def first_error(self, error: dict[str, str] | None) -> dict[str, str] | None:
        """Return, in every process, the error of the first one that has any."""
        if self._several:
            from accelerate.utils import gather_object

            error = next((each for each in gather_object([error]) if each), None)
        return error


def _unpruned_run(sweep: Sweep, folder: SweepFolder, task: SweepTask) -> Run:
    """Return the unpruned model's results on a task."""
    done, *_ = _sort(sweep, [Unit(sweep.baseline, task)], folder)
    if not done:
        raise ValueError(
            f"{task.name} has no results of the unpruned model to compare with in {folder.path}: "
            "evaluate baseline first, and then use --retry_failed."
        )
    return read_newest(unit_folder(folder.path, "baseline", task.name))


def _sort(
    sweep: Sweep, units: list[Unit], folder: SweepFolder
) -> tuple[list[tuple[Unit, float]], list[Unit], list[Unit]]:
    """Return units that are done (with their seconds), that failed, and that are to run."""
    done: list[tuple[Unit, float]] = []
    failed, waiting = [], []
    for unit in units:
        record = folder.read(*unit.names)
        definition = fingerprint(sweep.definition(*unit))
        if record is None or record.fingerprint != definition:
            waiting.append(unit)
        elif record.error is None:
            done.append((unit, record.seconds))
        else:
            failed.append(unit)
    return done, failed, waiting


def _kept(sweep: Sweep, folder: SweepFolder) -> list[Any]:
    """Return the configurations of earlier sweeps that stay in the folder, and say what becomes of it.

    Raises:
        ValueError: Finished units would stay that cannot be compared with those of this sweep.
    """
    if not is_sweep(folder.path):
        return []
    before, _ = read_definition(folder.path)
    listed = {each["id"]: each for each in before["configurations"]}
    units = {unit.names: unit for unit in sweep.units()}
    tasks = {task.name: task for task in sweep.tasks}
    own = [each.id for each in sweep.configurations]
    again, kept = [], []
    # Sentences, once each.
    changed: dict[str, None] = {}
    differing: dict[str, None] = {}
    for name in dict.fromkeys([*own, *listed]):
        for was in folder.finished(name):
            task = was["task"]
            if (name, task) in units:
                now = sweep.definition(*units[name, task])
                found = dict.fromkeys(_changes(was, now))
                changed |= found
                again += [task] if found else []
                continue
            kept.append((name, task))
            now = sweep.model_definition(sweep.baseline)
            if task in tasks:
                now = sweep.definition(sweep.baseline, tasks[task])
            was = {key: was.get(key) for key in now}
            differing |= dict.fromkeys(_changes(_shared(was), _shared(now)))
    names = ", ".join(" / ".join(each) for each in sorted(kept))
    if differing:
        raise ValueError(
            f"--output_path {folder.path} holds finished units that this sweep does not have and "
            f"cannot be compared with ({names}): {'; '.join(differing)}. Ask for them as well, or "
            "pass another folder."
        )
    if sweep.stop_when is not None and any(name not in own for name, _ in kept):
        raise ValueError(
            f"stop_when={sweep.stop_when} shares one error among all sizes, but --output_path "
            f"{folder.path} holds units of others ({names}): ask for those sizes as well, or pass "
            "another folder."
        )
    if again:
        print(
            f"{len(again)} finished units in {folder.path} are evaluated again, and their results "
            f"move to {folder.path / 'superseded'}: {'; '.join(changed)}."
        )
    if kept:
        print(f"Finished units of earlier sweeps stay in {folder.path}: {names}.")
    return [listed[name] for name in listed if name not in own and name in dict(kept)]


def _changes(
    before: Mapping[str, Any], now: Mapping[str, Any], of: str = "task"
) -> Iterator[str]:
    """Say in which ways a definition differs, such as ``dtype=None, now bfloat16``."""
    for name in {**now, **before}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, name)
        elif fingerprint(old) != fingerprint(new):
            yield f"another {of}" if "sha256" in name else f"{name}={old}, now {new}"


def _shared(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return what configurations of one sweep have in common."""
    arguments = definition["model_args"].items()
    common = {k: v for k, v in arguments if k not in DECLARED}
    return {**definition, "model_args": common}


def _plan_table(sweep: Sweep, units: list[Unit], folder: SweepFolder) -> str:
    finished, *others = _sort(sweep, units, folder)
    parts = [unit for unit, _ in finished], *others
    done, failed, waiting = map(len, parts)
    ids = ([unit.configuration.id for unit in part] for part in parts)
    counts = [*map(collections.Counter, ids)]
    columns = ["configuration", "kept width", "expansion ratio", "parameters"]
    columns += ["reduction", "done", "failed", "to run"]
    rows = []
    for each in sweep.configurations:
        size = f"{each.kept_width:,}", f"{each.expansion_ratio:.4f}"
        left = f"{each.parameters:,}", f"{each.reduction:.2%}"
        rows.append([each.id, *size, *left, *(count[each.id] for count in counts)])
    healing = ""
    if sweep.healing is not None:
        there = [sweep.adapter(e).is_dir() for e in sweep.configurations if e.healed]
        healing = (
            f"Healing: {sum(there)} of {len(there)} trained, {len(there) - sum(there)} to train, "
            f"on {sweep.healing.data}\n"
        )
    return (
        f"{markdown_table(columns, rows)}\n\n"
        f"Tasks: {', '.join(task.name for task in sweep.tasks)}\n{healing}"
        f"Units: {len(units)}, {done} done, {failed} failed, {waiting} to run, in {folder.path}\n"
    )
