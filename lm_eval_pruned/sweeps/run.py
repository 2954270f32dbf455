"""``lm-eval-pruned sweep``: many configurations by many tasks, each result kept at once.

`plan` says which units there are, `folder` keeps them, this module runs those that
are missing: here, or through `ray` on a cluster; `unit` runs one.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.runs import is_sweep, read_definition
from lm_eval_pruned.sweeps.folder import SweepFolder
from lm_eval_pruned.sweeps.options import refuse_ray
from lm_eval_pruned.sweeps.plan import Sweep, Unit, Waiting
from lm_eval_pruned.sweeps.ray import run_on_ray
from lm_eval_pruned.sweeps.tasks import fingerprint
from lm_eval_pruned.sweeps.unit import UnitRunner
from lm_eval_pruned.util.progress import Progress
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from pathlib import Path

    from lm_eval_pruned.results.runs import UnitRecord
    from lm_eval_pruned.sweeps.unit import Ended

    #: A unit, its state, and what the folder held of it when the sweep was planned.
    Entry = tuple[Unit, str, UnitRecord | None]

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
    if (size := os.environ.get("WORLD_SIZE") or "1") != "1":
        raise ValueError(
            f"WORLD_SIZE={size} announces several processes, but a sweep evaluates in one: start "
            "it without a launcher, and share its units out with --shard next or --ray."
        )
    sweep = sweep or Sweep(options)
    fixed = shard if isinstance(shard, tuple) else None
    shared, part = shard == "next", ""
    if fixed:
        part = f"_shard{fixed[0]}of{fixed[1]}"
    if shared:
        refuse_ray("--shard next", options)
        part = f"_shard_{os.environ.get('SLURM_ARRAY_TASK_ID') or uuid.uuid4().hex[:8]}"
    folder = SweepFolder(options["output_path"], fixed, shared)
    units = sweep.units(fixed)
    runner = UnitRunner(sweep, part, folder)
    if dry_run:
        print(_plan_table(sweep, _entries(sweep, folder, units), folder.path), end="")
        return 0
    with folder.held():
        entries = _entries(sweep, folder, units)
        folder.write_definition(sweep.as_dict())
        chosen = (TO_RUN, FAILED) if retry_failed else (TO_RUN,)
        to_run = [unit for unit, state, _ in entries if state in chosen]
        # Models that know nothing take no time, and tell nothing of that of the others.
        known = [
            (unit.task.name, record.seconds)
            for unit, _, record in entries
            if record and not record.error and not unit.configuration.floor
        ]
        timed = [unit.task.name for unit in to_run if not unit.configuration.floor]
        quick = [unit.names for unit in to_run if unit.configuration.floor]
        done = sum(state == DONE for _, state, _ in entries)
        failed = len(units) - len(to_run) - done
        progress = Progress(done, failed, timed, known, quick)
        waiting = Waiting(to_run, known)
        ended: Generator[Ended]
        if options.get("ray") and to_run:
            ended = run_on_ray(sweep, waiting, folder.new_unit, progress, part)
        elif shared:
            mine = _open_units(folder, entries, waiting, progress)
            ended = _run_here(runner, mine, folder, progress)
        else:
            ended = _run_here(runner, to_run, folder, progress)
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
    folder: SweepFolder, entries: list[Entry], waiting: Waiting, progress: Progress
) -> Generator[Unit]:
    """Yield units that no other process has, each held until the next one is asked for."""
    seen = {unit.names: record for unit, _, record in entries}
    while waiting.units:
        unit = waiting.take("here")
        with folder.claimed(unit.names) as free:
            if free and folder.read(*unit.names) == seen[unit.names]:
                waiting.held["here"] = unit.configuration.id
                yield unit
                continue
        if not free:
            waiting.held[unit.names] = unit.configuration.id
        progress.leave(*unit.names)


def _run_here(
    runner: UnitRunner, units: Iterable[Unit], folder: SweepFolder, progress: Progress
) -> Generator[Ended]:
    """Evaluate units in this process, as long as its device lets it, and yield how each ended."""
    for unit in units:
        progress.start(*unit.names)
        with folder.new_unit() as files:
            yield unit, files, *runner.attempt(unit, files)
        if runner.device_failed:
            return
    runner.release()


def _entries(sweep: Sweep, folder: SweepFolder, units: list[Unit]) -> list[Entry]:
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
        now, record, state = sweep.definition(*unit), folder.read(*unit.names), TO_RUN
        if record and record.fingerprint == fingerprint(now):
            state = FAILED if record.error else DONE
        elif record and not record.error:
            again, was = again + 1, record.definition
            changed |= {
                k for k in now if fingerprint(now[k]) != fingerprint(was.get(k))
            }
        entries.append((unit, state, record))
    if again:
        print(
            f"{again} finished units in {folder.path} have another definition "
            f"({', '.join(sorted(changed))}): they are evaluated again, and their results move to "
            f"{folder.path / 'superseded'}."
        )
    return entries


def _plan_table(sweep: Sweep, entries: list[Entry], folder: Path) -> str:
    counts = Counter((unit.configuration.id, state) for unit, state, _ in entries)
    total = Counter(state for _, state, _ in entries)
    columns = ("configuration", "kept width", "expansion ratio", "parameters")
    rows = []
    for each in (*sweep.floors, *sweep.configurations):
        size = [f"{each.kept_width:,}", f"{each.expansion_ratio:.4f}"]
        size += [f"{each.parameters:,}", f"{each.reduction:.2%}"]
        states = [counts[each.id, state] for state in STATES]
        rows.append([each.id, *("----" if each.floor else size), *states])
    return (
        f"{markdown_table([*columns, 'reduction', *STATES], rows)}\n\n"
        f"Tasks: {', '.join(task.name for task in sweep.tasks)}\n"
        f"Units: {len(entries)}, {', '.join(f'{total[s]} {s}' for s in STATES)}, in {folder}\n"
    )
