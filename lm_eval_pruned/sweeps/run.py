"""``lm-eval-pruned sweep``: many configurations by many tasks, each result kept at once.

`plan` says which units there are, `folder` keeps them, this module runs those that
are missing: here, or through `ray` on a cluster; `unit` runs one.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results import runs as layout
from lm_eval_pruned.sweeps.apart import runner_of
from lm_eval_pruned.sweeps.checks import check_files, check_installed
from lm_eval_pruned.sweeps.folder import SweepFolder, with_earlier
from lm_eval_pruned.sweeps.plan import Sweep, Unit, model_source
from lm_eval_pruned.sweeps.progress import Progress
from lm_eval_pruned.sweeps.ray import run_on_ray
from lm_eval_pruned.sweeps.tasks import fingerprint
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.tables import Column, Table


if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from lm_eval_pruned.sweeps.apart import LimitedRunner
    from lm_eval_pruned.sweeps.plan import Configuration
    from lm_eval_pruned.sweeps.unit import Ended, UnitRunner

    #: A unit, its state, and what the folder held of it when the sweep was planned.
    Entry = tuple[Unit, str, layout.UnitRecord | None]

DONE, FAILED, TO_RUN = STATES = ("done", "failed", "to run")


def run_sweep(
    sweep: Sweep,
    *,
    shard: tuple[int, int] | str | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> int:
    """Run the units of a sweep, or of its shard, that its folder does not hold; see `options`.

    The shard ``next`` takes units one by one that no other process of this kind has taken.

    Returns:
        Exit code: 0 where every unit is done, or another process has it; 1 where one failed or
        could not be run, as when the disk is full, 130 after Ctrl-C.

    Raises:
        ValueError: The sweep cannot run, or its folder is in use; OSError likewise. No unit was run.
    """
    if (size := os.environ.get("WORLD_SIZE") or "1") != "1":
        raise ValueError(
            f"WORLD_SIZE={size} announces several processes, but a sweep evaluates in one: start "
            "it without a launcher, and split it with --shard next or --ray."
        )
    options, model = sweep.options, sweep.settings.model
    fixed = shard if isinstance(shard, tuple) else None
    shared = shard == "next"
    name = f"shard{fixed[0]}of{fixed[1]}" if fixed else ""
    if shared:
        if options.get("ray"):
            raise ValueError(
                "--shard next needs the sweep's folder in the one process that evaluates: leave out "
                "--ray or --shard next, or split the sweep with --shard I/N."
            )
        name = f"shard_{os.environ.get('SLURM_ARRAY_TASK_ID') or uuid.uuid4().hex[:8]}"
    part = f"_{name}" if name else ""
    folder = SweepFolder(options["output_path"])
    units = sweep.units(fixed)
    runner = runner_of(sweep, part)
    if dry_run:
        _definition(sweep, folder.path)
        print(_plan_table(sweep, _entries(sweep, folder, units), folder.path), end="")
        return 0
    if not options.get("ray"):
        check_installed(model, f"model={model}")
    arguments = sweep.settings.model_args
    check_files(model, {**model_source(arguments), **arguments}, "model_args")
    with contextlib.nullcontext() if shared else folder.held(name or "sweep"):
        entries = _entries(sweep, folder, units)
        definition = layout.as_text(_definition(sweep, folder.path))
        write_atomically(folder.path / layout.DEFINITION, definition)
        states = Counter(state for _, state, _ in entries)
        chosen = (TO_RUN, FAILED) if retry_failed else (TO_RUN,)
        to_run = [unit for unit, state, _ in entries if state in chosen]
        known = [
            (unit.task.name, record.seconds)
            for unit, _, record in entries
            if record and not record.error and not unit.configuration.floor
        ]
        failed = len(units) - len(to_run) - states[DONE]
        progress = Progress(to_run, states[DONE], failed, known)
        mine = _open_units(folder, entries, progress) if shared else to_run
        ended = _run_here(runner, mine, folder, progress)
        if options.get("ray") and to_run:
            ended = run_on_ray(sweep, folder.new_unit, progress, part)
        with contextlib.closing(ended):
            try:
                for unit, files, spent, error in ended:
                    made_by = sweep.definition(*unit)
                    scores = folder.keep(files, unit.names, spent, made_by, error)
                    progress.finish(unit, spent, scores, error)
            except (KeyboardInterrupt, OSError) as error:
                ended.close()
                done = f"{progress.done} of {len(units)} units are done"
                if isinstance(error, KeyboardInterrupt):
                    print(f"Stopped: {done}. Repeat the command to continue.")
                    return 130
                print(
                    f"Stopped: {folder.path} cannot be written ({error}). {done} and stay: make room, or "
                    "see what is wrong with the disk, and repeat the command to continue."
                )
                return 1
    if runner.device_failed:
        print(
            "Stopped: after a device error, this process cannot evaluate anything else. Repeat the "
            "command to continue with the other units."
        )
    if progress.failed:
        again = "by repeating the command" if retry_failed else "with --retry_failed"
        print(
            f"{progress.failed} of {len(units)} units failed: see error.json in their folders "
            f"below {folder.path / 'units'}, and try again {again}."
        )
    if progress.elsewhere:
        print(f"Other processes have taken {progress.elsewhere} of {len(units)} units.")
    return 0 if progress.done + progress.elsewhere == len(units) else 1


def _definition(sweep: Sweep, path: Path) -> dict[str, Any]:
    """Return the content of ``sweep.json``, and say what becomes of earlier units in the folder."""
    present = sweep.as_dict()
    if not sweep.keeps_earlier or not layout.is_sweep(path):
        return present
    definition = with_earlier(present, *layout.read_definition(path), sweep.baseline.id)
    requested = {
        configuration["id"]: configuration["units"]
        for configuration in present["configurations"]
    }
    added, listed = {}, []
    for configuration in definition["configurations"]:
        name, units = configuration["id"], configuration["units"]
        listed += [layout.unit_folder(path, name, task) for task in units]
        if others := [task for task in units if task not in requested.get(name, ())]:
            added[name] = others
    if added:
        names = layout.units_text(added)
        print(f"Units of earlier sweeps in {path} stay part of the sweep: {names}.")
    if left_out := layout.left_out(path, listed):
        print(
            f"Finished units in {path} that are defined differently are left out: {left_out}."
        )
    return definition


def _open_units(
    folder: SweepFolder, entries: list[Entry], progress: Progress
) -> Generator[Unit]:
    """Yield units that no other process has, each held until the next one is asked for."""
    seen = {unit.names: record for unit, _, record in entries}
    while progress.waiting:
        unit = progress.take("here")
        try:
            with folder.held(layout.unit_folder(Path(), *unit.names)):
                if folder.read(*unit.names) == seen[unit.names]:
                    progress.held["here"] = unit.configuration.id
                    yield unit
                    continue
        except ValueError:
            progress.held[unit.names] = unit.configuration.id
        progress.elsewhere += 1


def _run_here(
    runner: UnitRunner | LimitedRunner,
    units: Iterable[Unit],
    folder: SweepFolder,
    progress: Progress,
) -> Generator[Ended]:
    """Evaluate units in this process, as long as its device lets it, and yield how each ended."""
    try:
        for unit in units:
            progress.start(unit)
            with folder.new_unit() as files:
                yield unit, files, *runner.attempt(unit, files)
            if runner.device_failed:
                return
    finally:
        if not runner.device_failed:
            runner.release()


def _entries(sweep: Sweep, folder: SweepFolder, units: list[Unit]) -> list[Entry]:
    """Return which units are done, and say which were defined differently."""
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
            f"{again} finished units in {folder.path} were defined differently "
            f"({', '.join(sorted(changed))}): they are evaluated again, and their results move to "
            f"{folder.path / 'superseded'}."
        )
    return entries


def _plan_table(sweep: Sweep, entries: list[Entry], folder: Path) -> str:
    counts = Counter((unit.configuration.id, state) for unit, state, _ in entries)
    total = Counter(state for _, state, _ in entries)

    def size(name: str) -> Callable[[Configuration], Any]:
        # What knows nothing has no size.
        return lambda row: None if row.floor else getattr(row, name)

    def in_state(state: str) -> Callable[[Configuration], int]:
        return lambda row: counts[row.id, state]

    columns = [
        Column("configuration", lambda row: row.id),
        Column("kept width", size("kept_width"), ","),
        Column("expansion ratio", size("expansion_ratio"), ".4f"),
        Column("parameters", size("parameters"), ","),
        Column("reduction", size("reduction"), ".2%"),
    ]
    columns += [Column(state, in_state(state), "d") for state in STATES]
    table = Table("Plan", columns, [*sweep.floors, *sweep.configurations])
    return (
        f"{table.markdown()}\n\n"
        f"Tasks: {', '.join(task.name for task in sweep.tasks)}\n"
        f"Units: {len(entries)}, {', '.join(f'{total[s]} {s}' for s in STATES)}, in {folder}\n"
    )
