"""Units of a sweep on a Ray cluster.

Workers are Ray actors that keep a model between units. Ray places them where resources are
free, starts them again when they or their node are lost, and runs the unit that was lost
again. They send the files of a unit back; only the process that started the sweep writes to
its folder, so workers need not share a file system with it.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.unit import UnitRunner, describe_error


if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from lm_eval_pruned.sweeps.plan import Unit
    from lm_eval_pruned.util.progress import Progress

logger = logging.getLogger("lm_eval.pruned.sweep")

#: How often a unit starts again after its worker or node was lost.
RETRIES = 3
#: Seconds until the user hears that no worker could start yet.
PATIENCE = 60


def run_on_ray(
    sweep: Sweep,
    units: list[Unit],
    new_folder: Callable[[], Any],
    progress: Progress,
    part: str,
) -> Generator[tuple[Unit, Path, float, dict[str, str] | None]]:
    """Evaluate units on a cluster, each on the resources asked for.

    Args:
        sweep: The plan; its options say which cluster and how much of it.
        units: Units to run.
        new_folder: Makes a folder for the files of a unit.
        progress: Told when a unit starts.
        part: Distinguishes the cache files of this part of a sweep.

    Yields:
        Each unit as it ends, the folder of its files, seconds, and None or what it failed with.

    Raises:
        ValueError: Ray is not installed, the cluster cannot be reached, or it has not got what
            a unit needs.
    """
    # Ray reports its use over the network unless told otherwise before it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ValueError(
            "--ray needs the package ray, which is not installed: "
            "run `pip install 'lm-eval-pruned[ray]'`."
        ) from None
    if not units:
        return
    ours = not ray.is_initialized()
    if ours:
        address = sweep.options["ray"]
        try:
            ray.init(
                address=address if isinstance(address, str) else None,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except (ConnectionError, RuntimeError) as error:
            raise ValueError(
                f"--ray {address}: the cluster cannot be reached ({error}); pass the address "
                "of its head, or --ray alone to start one here."
            ) from None
    try:
        for unit, seconds, files, failure in _evaluated(
            ray, sweep, units, progress, part
        ):
            with new_folder() as folder:
                for name, content in files.items():
                    (folder / name).write_bytes(content)
                yield unit, folder, seconds, failure
    finally:
        if ours:
            ray.shutdown()


def _evaluated(
    ray: Any, sweep: Sweep, units: list[Unit], progress: Progress, part: str
) -> Generator[tuple[Unit, float, dict[str, bytes], dict[str, str] | None]]:
    options, total = sweep.options, ray.cluster_resources()
    cpus = options.get("cpus_per_unit", 1)
    gpus = options.get("gpus_per_unit", 1 if total.get("GPU") else 0)
    shares = [total.get(k, 0) / n for k, n in (("CPU", cpus), ("GPU", gpus)) if n]
    places = int(min(shares, default=len(units)) + 1e-9)
    needs = f"cpus_per_unit={cpus:g} and gpus_per_unit={gpus:g}"
    if not places:
        raise ValueError(f"{needs} are more than the cluster has: ask for less.")
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1)(Worker)
    waiting, suspects = list(units), set()
    # By worker, the configuration whose model it holds.
    held: dict[Any, str] = {}
    running: dict[Any, tuple[Any, Unit | None]] = {}

    def start() -> None:
        worker = remote.remote(options, os.getcwd(), f"{part}_worker{len(started)}")
        started.append(worker)
        running[worker.ready.remote()] = worker, None

    started: list[Any] = []
    try:
        for _ in range(min(places, len(units))):
            start()
        while running:
            ended, _ = ray.wait(list(running), timeout=None if held else PATIENCE)
            if not ended:
                logger.warning("The sweep waits for a worker, which needs %s.", needs)
                ended, _ = ray.wait(list(running))
            worker, unit = running.pop(ended[0])
            failed = False
            try:
                answer = ray.get(ended[0])
            except ray.exceptions.RayError as error:
                # Lost too often, or it could not start.
                failed = unit is None
                answer = 0.0, {}, describe_error(error), failed
                if failed:
                    logger.error("A worker could not start: %s", error)
            if unit is not None:
                *result, failed = answer
                # Two devices that fail with one unit are enough.
                if failed and unit.names not in suspects:
                    suspects.add(unit.names)
                    waiting.append(unit)
                else:
                    yield unit, *result
            places -= failed
            if waiting and not failed:
                following = choose_unit(waiting, held.get(worker), [*held.values()])
                waiting.remove(following)
                names = following.names
                held[worker] = names[0]
                progress.workers = len(held)
                progress.start(*names)
                call = worker.run.options(max_task_retries=RETRIES)
                running[call.remote(*names, following.task.digest)] = worker, following
                continue
            # Its resources go to whoever waits for them.
            held.pop(worker, None)
            ray.kill(worker)
            if len(running) < min(places, len(waiting)):
                start()
        if waiting:
            print(
                f"Stopped: no worker is left for {len(waiting)} units. The same command goes on "
                "with them."
            )
    finally:
        for worker in started:
            with suppress(Exception):
                ray.kill(worker)


def choose_unit(waiting: list[Unit], holds: str | None, elsewhere: list[str]) -> Unit:
    """Return the unit that a free worker should take.

    One of the configuration it holds; else of one that no other worker holds; else
    of the one with the most units left.
    """
    left = Counter(unit.configuration.id for unit in waiting)

    def rank(unit: Unit) -> tuple[bool, bool, int]:
        name = unit.configuration.id
        return name != holds, name in elsewhere, -left[name]

    return min(waiting, key=rank)


class Worker:
    """Evaluates units in a process of the cluster.

    Args:
        options: Of the sweep.
        folder: Working folder of the process that started the sweep; used where it
            exists, since relative paths in the options start from it.
        part: Distinguishes this worker's cache files.
    """

    def __init__(self, options: dict[str, Any], folder: str, part: str) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)
        import torch
        from lm_eval.utils import setup_logging

        setup_logging()
        torch.set_num_threads(max(1, int(options.get("cpus_per_unit", 1))))
        self._sweep = Sweep(options)
        self._runner = UnitRunner(self._sweep, part)

    def ready(self) -> None:
        """Return once the worker is there."""

    def run(
        self, configuration: str, task: str, digest: str
    ) -> tuple[float, dict[str, bytes], dict[str, str] | None, bool]:
        """Evaluate one unit.

        Args:
            configuration: Id of its configuration.
            task: Name of its task.
            digest: Of the task as the sweep planned it.

        Returns:
            Seconds, the harness's files by name, None or what the unit failed with, and
            whether the device failed, after which this process can run no other unit.
        """
        units = {unit.names: unit for unit in self._sweep.units()}
        unit = units.get((configuration, task))
        if unit is None or unit.task.digest != digest:
            stranger = RuntimeError(
                f"the task {task} on {socket.gethostname()} is not the one this sweep was "
                "planned with: install the same lm_eval and task folders on every node."
            )
            return 0.0, {}, describe_error(stranger), False
        with tempfile.TemporaryDirectory() as folder:
            seconds, error = self._runner.attempt(unit, Path(folder))
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return seconds, files, error, self._runner.device_failed
