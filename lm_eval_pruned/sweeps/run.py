"""``lm-eval-pruned sweep``: many configurations by many tasks, each result kept at once.

`plan` says which units there are, `folder` keeps them, this module runs those that
are missing: here, or through `ray` on a cluster; `runner` runs one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import DECLARED
from lm_eval_pruned.results.folder import is_sweep, read_definition
from lm_eval_pruned.sweeps.fingerprints import changes, fingerprint
from lm_eval_pruned.sweeps.folder import SweepFolder
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.ranks import Ranks, device_failed
from lm_eval_pruned.sweeps.runner import (
    Outcome,
    Store,
    UnitRunner,
    describe_error,
    part_name,
    unit_key,
)
from lm_eval_pruned.util.progress import Progress
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable

    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.sweeps.runner import Unit
    from lm_eval_pruned.sweeps.tasks import SweepTask

logger = logging.getLogger("lm_eval.pruned.sweep")


def run_sweep(
    options: dict[str, Any],
    *,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> int:
    """Run the units of a sweep that its folder does not hold yet.

    Args:
        options: From `options.read_options`.
        shard: ``(I, N)`` to run part I of N.
        retry_failed: Whether units that failed before run again.
        dry_run: Print the plan; evaluate and write nothing.

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
    prints = {
        unit_key(unit): fingerprint(sweep.definition(*unit))  # type: ignore[arg-type]
        for unit in units
    }
    if dry_run:
        _kept(sweep, folder)
        print(_plan_table(sweep, units, folder, prints), end="")
        return 0
    ranks = Ranks()
    if not ranks.main:
        return _follow(sweep, units, ranks, shard)
    # What the Hub refuses, it refuses before the first model is loaded.
    sweep.tracking.hub_tracker()
    with folder.locked():
        folder.write_definition(sweep.as_dict(_kept(sweep, folder)))
        done, failed, waiting = _sort(units, folder, prints, retry_failed)
        _check_baselines(sweep, folder, waiting)
        store = Store(sweep, folder, prints)
        with contextlib.closing(
            Progress(
                len(done),
                len(failed),
                [task.name for _, task in waiting],
                [(task.name, seconds) for (_, task), seconds in done],
            )
        ) as progress:
            if options.get("ray"):
                from lm_eval_pruned.sweeps.ray import run_on_ray

                outcomes = run_on_ray(sweep, waiting, store, progress, shard)
            else:
                outcomes = _run_here(sweep, waiting, store, progress, shard, ranks)
            try:
                for outcome in outcomes:
                    configuration, task = outcome.unit
                    progress.finish(
                        configuration.id,
                        task.name,
                        outcome.seconds,
                        outcome.scores,
                        outcome.error,
                    )
            except KeyboardInterrupt:
                outcomes.close()
                print(
                    f"Stopped: {progress.done} of {len(units)} units are done. The same "
                    "command goes on from here."
                )
                return 130
    if progress.failed:
        print(
            f"{progress.failed} of {len(units)} units failed; error.json in their folders "
            f"below {folder.path / 'units'} says why, --retry_failed tries them again."
        )
    return 0 if progress.done == len(units) else 1


def _kept(sweep: Sweep, folder: SweepFolder) -> list[Any]:
    """Return the configurations of earlier sweeps that stay in the folder, and say what becomes of it.

    Raises:
        ValueError: Finished units would stay that cannot be compared with those of this sweep.
    """
    if not is_sweep(folder.path):
        return []
    listed = {
        each["id"]: each for each in read_definition(folder.path)[0]["configurations"]
    }
    own = [each.id for each in sweep.configurations]
    units = {unit_key(unit): unit for unit in sweep.units()}
    tasks = {task.name: task for task in sweep.tasks}
    again, kept = [], []
    differing: list[str] = []
    for name in dict.fromkeys([*own, *listed]):
        for record in folder.finished(name):
            before, task = record.definition, record.definition["task"]
            if (name, task) in units:
                found = [*changes(before, sweep.definition(*units[name, task]))]
                again += [found] if found else []
                continue
            now = sweep.model_definition(sweep.baseline)
            if task in tasks:
                now = sweep.definition(sweep.baseline, tasks[task])
            kept.append((name, task))
            differing += changes(
                _unpruned({key: before.get(key) for key in now}), _unpruned(now)
            )
    names = ", ".join(" / ".join(each) for each in sorted(kept))
    if differing:
        raise ValueError(
            f"--output_path {folder.path} holds finished units that this sweep does not have and "
            f"cannot be compared with ({names}): {_listed(differing)}. Ask for them as well, or pass "
            "another folder."
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
            f"move to {folder.path / 'superseded'}: {_listed(itertools.chain(*again))}."
        )
    if kept:
        print(f"Finished units of earlier sweeps stay in {folder.path}: {names}.")
    return [listed[name] for name in listed if name not in own and name in dict(kept)]


def _unpruned(definition: dict[str, Any]) -> dict[str, Any]:
    """Return what configurations of one sweep have in common."""
    arguments = definition["model_args"].items()
    return {
        **definition,
        "model_args": {k: v for k, v in arguments if k not in DECLARED},
    }


def _listed(found: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(found))


def _run_here(
    sweep: Sweep,
    waiting: list[Unit],
    store: Store,
    progress: Progress,
    shard: tuple[int, int] | None,
    ranks: Ranks,
) -> Generator[Outcome]:
    runner = UnitRunner(sweep, part_name(shard))
    ranks.from_main([unit_key(unit) for unit in waiting])
    for unit in waiting:
        configuration, task = unit
        progress.start(configuration.id, task.name)
        with store.new_unit() as files:
            base = store.base if sweep.may_stop(configuration) else None
            seconds, error, no_device = _attempt(runner, unit, files, ranks, base)
            outcome = store.keep(unit, files, seconds, error)
        yield outcome
        if no_device:
            print(
                "Stopped: after an error of its device this process can evaluate nothing else. The "
                "same command goes on with the other units."
            )
            return
    runner.release()


def _follow(
    sweep: Sweep, units: list[Unit], ranks: Ranks, shard: tuple[int, int] | None
) -> int:
    """Take part in the units of the main process; it keeps and reports them."""
    runner = UnitRunner(sweep, part_name(shard))
    by_key = {unit_key(unit): unit for unit in units}
    waiting: list[tuple[str, str]] = ranks.from_main([])
    for key in waiting:
        with tempfile.TemporaryDirectory() as nothing:
            *_, no_device = _attempt(runner, by_key[key], Path(nothing), ranks)
        if no_device:
            return 1
    return 0


def _attempt(
    runner: UnitRunner,
    unit: Unit,
    files: Path,
    ranks: Ranks,
    base: Callable[[SweepTask], Run] | None = None,
) -> tuple[float, dict[str, str] | None, bool]:
    """Return the seconds a unit took, None or what it failed with, and whether the device did."""
    error = None
    no_device = False
    start = time.perf_counter()
    seconds = None
    try:
        seconds = runner.run(*unit, files, base)
    except Exception as failure:
        logger.exception("%s / %s failed.", *unit_key(unit))
        error, no_device = describe_error(failure), device_failed(failure)
    # Processes talk through their devices: without one, this process can only leave, and the
    # launcher ends the others.
    if not no_device:
        error = ranks.first_error(error)
        if error is not None:
            from accelerate.utils import release_memory

            release_memory()
    if seconds is None:
        seconds = time.perf_counter() - start
    return seconds, error, no_device


def _sort(
    units: list[Unit],
    folder: SweepFolder,
    prints: dict[tuple[str, str], str],
    retry_failed: bool,
) -> tuple[list[tuple[Unit, float]], list[Unit], list[Unit]]:
    """Return units that are done (with their seconds), that failed, and that are to run."""
    done, failed, waiting = [], [], []
    for unit in units:
        record = folder.read(unit[0].id, unit[1].name)
        if record is None or record.fingerprint != prints[unit_key(unit)]:
            waiting.append(unit)
        elif record.error is None:
            done.append((unit, record.seconds))
        elif retry_failed:
            waiting.append(unit)
        else:
            failed.append(unit)
    return done, failed, waiting


def _check_baselines(sweep: Sweep, folder: SweepFolder, waiting: list[Unit]) -> None:
    """Refuse a part of a sweep that may stop early but does not hold the unpruned model.

    Raises:
        ValueError: No unit of it is there, and none will be.
    """
    here = {
        task.name for configuration, task in waiting if configuration is sweep.baseline
    }
    missing = {
        task.name
        for configuration, task in waiting
        if sweep.may_stop(configuration)
        and task.name not in here
        and folder.read(sweep.baseline.id, task.name) is None
    }
    if missing:
        raise ValueError(
            f"stop_when compares with the unpruned model, and --shard does not hold it for "
            f"{', '.join(sorted(missing))}: run the same command without sizes and --shard "
            "first."
        )


def _plan_table(
    sweep: Sweep,
    units: list[Unit],
    folder: SweepFolder,
    prints: dict[tuple[str, str], str],
) -> str:
    done, failed, waiting = _sort(units, folder, prints, retry_failed=False)
    counts = [
        Counter(configuration.id for configuration, _ in part)
        for part in ([unit for unit, _ in done], failed, waiting)
    ]
    columns = ["configuration", "kept width", "expansion ratio", "parameters"]
    columns += ["reduction", "done", "failed", "to run"]
    rows = []
    for each in sweep.configurations:
        size = f"{each.kept_width:,}", f"{each.expansion_ratio:.4f}"
        left = f"{each.parameters:,}", f"{each.reduction:.2%}"
        rows.append([each.id, *size, *left, *(count[each.id] for count in counts)])
    table = markdown_table(columns, rows)
    healing = ""
    if sweep.healing is not None:
        healed = [each for each in sweep.configurations if each.healed]
        trained = sum(sweep.adapter(each).is_dir() for each in healed)
        healing = (
            f"Healing: {trained} of {len(healed)} trained, {len(healed) - trained} to train, on "
            f"{sweep.healing.data}\n"
        )
    return (
        f"{table}\n\nTasks: {', '.join(task.name for task in sweep.tasks)}\n{healing}"
        f"Units: {len(units)}, {len(done)} done, {len(failed)} failed, "
        f"{len(waiting)} to run, in {folder.path}\n"
    )
