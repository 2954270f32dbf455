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
import uuid
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.folder import is_sweep, read_definition, unit_folder
from lm_eval_pruned.results.runs import read_newest
from lm_eval_pruned.sweeps.folder import SweepFolder
from lm_eval_pruned.sweeps.options import refuse_other_processes
from lm_eval_pruned.sweeps.plan import Sweep, Unit, choose_unit
from lm_eval_pruned.sweeps.ray import run_on_ray
from lm_eval_pruned.sweeps.tasks import fingerprint
from lm_eval_pruned.sweeps.unit import UnitRunner
from lm_eval_pruned.util.progress import Progress
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.folder import UnitRecord
    from lm_eval_pruned.sweeps.tasks import SweepTask
    from lm_eval_pruned.sweeps.unit import Ended

    #: A unit, its state, and the seconds that its evaluation took.
    Entry = tuple[Unit, str, float]
    #: What the folder held of each unit, by its names, when the sweep was planned.
    Records = dict[tuple[str, str], UnitRecord | None]

DONE, FAILED, TO_RUN = STATES = ("done", "failed", "to run")


def run_sweep(
    options: dict[str, Any],
    *,
    shard: tuple[int, int] | str | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
    sweep: Sweep | None = None,
) -> int:
    """Run the units of a sweep, or its shard, that its folder does not hold; see `options`.

    `sweep` is what was planned from the options already, if it was. The shard ``next`` is one
    unit after the other that no other process of such a shard has.

    Returns:
        Exit code: 0 where every unit is done, or another process has it; 1 where one failed or
        could not be run, 130 after Ctrl-C.

    Raises:
        ValueError: The sweep cannot be planned, or its folder is in use.
        OSError: The model's config or the folder cannot be read or written.
    """
    sweep = sweep or Sweep(options)
    fixed = shard if isinstance(shard, tuple) else None
    shared = shard is not None and fixed is None
    if shared:
        refuse_other_processes(f"--shard {shard}", options)
    folder = SweepFolder(options["output_path"], fixed, shared=shared)
    units = sweep.units(fixed)
    part = f"_shard{fixed[0]}of{fixed[1]}" if fixed else ""
    if shared:
        task = os.environ.get("SLURM_ARRAY_TASK_ID") or uuid.uuid4().hex[:8]
        part = f"_shard_{task}"
    runner = UnitRunner(sweep, part, functools.partial(_unpruned_run, sweep, folder))
    if dry_run:
        records = _records(folder, units)
        entries = _sort(sweep, folder, units, records)
        print(_plan_table(sweep, entries, folder.path), end="")
        return 0
    several = _other_processes()
    if several and not several.is_main_process:
        followed = _run_here(runner, units, several, tempfile.TemporaryDirectory)
        collections.deque(followed, maxlen=0)
        return int(runner.device_failed)
    with folder.held():
        seen = _records(folder, units)
        entries = _sort(sweep, folder, units, seen)
        folder.write_definition(sweep.as_dict())
        chosen = (TO_RUN, FAILED) if retry_failed else (TO_RUN,)
        waiting = [unit for unit, state, _ in entries if state in chosen]
        states = collections.Counter(state for _, state, _ in entries)
        # Models that know nothing take no time, and tell nothing of that of the others.
        seconds = [
            (unit.task.name, s)
            for unit, state, s in entries
            if state == DONE and unit.configuration not in sweep.floors
        ]
        quick = [u.names for u in waiting if u.configuration in sweep.floors]
        names = [u.task.name for u in waiting if u.names not in quick]
        known = [
            (unit.task.name, s)
            for unit, _, s in entries
            if s and unit.configuration not in sweep.floors
        ]
        failed = len(units) - len(waiting) - states[DONE]
        progress = Progress(states[DONE], failed, names, seconds, quick)
        new = folder.new_unit
        if options.get("ray") and waiting:
            ended = run_on_ray(sweep, waiting, new, progress, part, known)
        elif shared:
            mine = _open_units(folder, waiting, seen, known, progress)
            ended = _run_here(runner, mine, several, new, progress.start)
        else:
            ended = _run_here(runner, waiting, several, new, progress.start)
        with contextlib.closing(ended):
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
    if progress.elsewhere:
        print(f"Other processes have {progress.elsewhere} of {len(units)} units.")
    return 0 if progress.done + progress.elsewhere == len(units) else 1


def _open_units(
    folder: SweepFolder,
    units: list[Unit],
    seen: Records,
    known: list[tuple[str, float]],
    progress: Progress,
) -> Generator[Unit]:
    """Yield units that no other process has, each held until the next one is asked for."""
    left, holds = list(units), None
    elsewhere: set[str] = set()
    while left:
        unit = choose_unit(left, holds, elsewhere, known)
        left.remove(unit)
        with folder.claimed(unit.names) as free:
            if free and folder.read(*unit.names) == seen[unit.names]:
                holds = unit.configuration.id
                yield unit
                continue
        if not free:
            elsewhere.add(unit.configuration.id)
        progress.leave(*unit.names)


def _run_here(
    runner: UnitRunner,
    units: Iterable[Unit],
    several: Any,
    new_folder: Callable[[], Any],
    starts: Callable[[str, str], None] = lambda *names: None,
) -> Generator[Ended]:
    """Evaluate the units that wait in the main process, and yield how each ended."""
    from accelerate.utils import broadcast_object_list, gather_object

    if several:
        units = list(units)
        (names,) = broadcast_object_list([[unit.names for unit in units]])
        units = [unit for unit in units if unit.names in names]
    attempt = runner.attempt if several else runner.attempt_patiently
    for unit in units:
        starts(*unit.names)
        with new_folder() as files:
            seconds, error = attempt(unit, Path(files))
            # Processes talk through their devices: without one, this process can only leave, and
            # the launcher ends the others.
            if several and not runner.device_failed:
                error = next(filter(None, gather_object([error])), None)
            yield unit, files, seconds, error
        if runner.device_failed:
            return
    runner.release()


def _other_processes() -> Any:
    """Return the Accelerator of processes that share each unit, or None for a process alone."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    # As HFLM has it: processes wait for the slowest, however long it takes.
    patience = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
    accelerator = Accelerator(kwargs_handlers=[patience])
    if accelerator.num_processes == 1:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} announces several processes, but "
            "accelerate sees one: set ACCELERATE_USE_CPU=true for processes on CPUs."
        )
    return accelerator


def _unpruned_run(sweep: Sweep, folder: SweepFolder, task: SweepTask) -> Run:
    """Return the unpruned model's results on a task."""
    names = sweep.baseline.id, task.name
    record, now = folder.read(*names), sweep.definition(sweep.baseline, task)
    if record is None or record.error or record.fingerprint != fingerprint(now):
        raise ValueError(
            f"{task.name} has no results of the unpruned model to compare with in {folder.path}: "
            "evaluate baseline first, and then use --retry_failed."
        )
    return read_newest(unit_folder(folder.path, *names))


def _records(folder: SweepFolder, units: list[Unit]) -> Records:
    return {unit.names: folder.read(*unit.names) for unit in units}


def _sort(
    sweep: Sweep, folder: SweepFolder, units: list[Unit], records: Records
) -> list[Entry]:
    """Return which units are done, and say what becomes of other results in the folder."""
    listed = read_definition(folder.path)[1] if is_sweep(folder.path) else []
    own = [each.id for each in (*sweep.floors, *sweep.configurations)]
    if left_out := [name for name in listed if name not in own]:
        print(
            f"{folder.path} also holds {', '.join(left_out)}, which this sweep does not name: "
            "compare and report leave them out until a sweep into this folder names them again."
        )
    entries: list[Entry] = []
    again, changed = 0, set()
    for unit in units:
        now, record = sweep.definition(*unit), records[unit.names]
        if record is not None and record.fingerprint == fingerprint(now):
            entries.append((unit, FAILED if record.error else DONE, record.seconds))
            continue
        spent = record.seconds if record is not None and not record.error else 0.0
        entries.append((unit, TO_RUN, spent))
        if record is not None and record.error is None:
            again, was = again + 1, record.definition
            changed |= {
                k for k in now if fingerprint(now[k]) != fingerprint(was.get(k))
            }
    if again:
        print(
            f"{again} finished units in {folder.path} have another definition "
            f"({', '.join(sorted(changed))}): they are evaluated again, and their results move to "
            f"{folder.path / 'superseded'}."
        )
    return entries


def _plan_table(sweep: Sweep, entries: list[Entry], folder: Path) -> str:
    counts = collections.Counter((unit.configuration.id, s) for unit, s, _ in entries)
    total = collections.Counter(state for _, state, _ in entries)
    columns = ("configuration", "kept width", "expansion ratio", "parameters")
    rows = [
        [each.id, *"----", *(counts[each.id, s] for s in STATES)]
        for each in sweep.floors
    ]
    for each in sweep.configurations:
        size = f"{each.kept_width:,}", f"{each.expansion_ratio:.4f}"
        left = f"{each.parameters:,}", f"{each.reduction:.2%}"
        rows.append([each.id, *size, *left, *(counts[each.id, s] for s in STATES)])
    return (
        f"{markdown_table([*columns, 'reduction', *STATES], rows)}\n\n"
        f"Tasks: {', '.join(task.name for task in sweep.tasks)}\n"
        f"Units: {len(entries)}, {', '.join(f'{total[s]} {s}' for s in STATES)}, in {folder}\n"
    )
