"""Units of a sweep on a Ray cluster.

Workers are Ray actors that keep a model between units. Ray places them where resources are
free, and starts them and their unit again where a process or a node is lost. They send the files
of a unit back, so they need not share a file system with the process that started the sweep.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.sweeps.plan import Sweep, choose_unit
from lm_eval_pruned.sweeps.unit import UnitRunner, describe_error


if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from lm_eval_pruned.sweeps.plan import Unit
    from lm_eval_pruned.sweeps.unit import Ended
    from lm_eval_pruned.util.progress import Progress

logger = logging.getLogger("lm_eval.pruned.sweep")

#: How often a unit starts again after its worker or node was lost.
RETRIES = 3


def run_on_ray(
    sweep: Sweep,
    units: list[Unit],
    new_folder: Callable[[], Any],
    progress: Progress,
    part: str,
    known: list[tuple[str, float]],
) -> Generator[Ended]:
    """Evaluate units on the cluster that the sweep asks for, and yield them as they end.

    `known` has tasks and seconds of earlier units, by which the longest start first.

    Raises:
        ValueError: Ray is not installed, the cluster cannot be reached, or no node of it has
            what a unit needs.
    """
    options = sweep.options
    with _cluster(options) as ray, contextlib.ExitStack() as stack:
        total = ray.cluster_resources()
        cpus = options.get("cpus_per_unit", 1)
        gpus = options.get("gpus_per_unit", 1 if total.get("GPU") else 0)
        asked = {"CPU": cpus, "GPU": gpus}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = min(len(units), sum(_places(each, asked, len(units)) for each in nodes))
        needs = f"cpus_per_unit={cpus:g} and gpus_per_unit={gpus:g}"
        if units and not most:
            raise ValueError(f"{needs} are more than any node has: ask for less.")
        logger.info("The sweep waits for workers, each of which needs %s.", needs)
        restarts = {"max_restarts": -1, "max_task_retries": RETRIES}
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, **restarts)(Worker)
        free = ray.available_resources()
        # A worker without a number shares the free CPUs with the others.
        share = free.get("CPU", 1) / max(1, min(most, _places(free, asked, most)))
        threads = max(1, int(options.get("cpus_per_unit") or share))
        limit = 60 * (options.get("minutes_per_unit") or math.inf)
        waiting, started, moved = list(units), itertools.count(), set()
        # The configuration whose model each worker that has started holds.
        held: dict[Any, str] = {}
        running: dict[Any, tuple[Any, Unit | None, float]] = {}
        # A worker that still waits for a place is not waited for.
        while waiting or any(unit for _, unit, _ in running.values()):
            # One worker may wait for a place; others start where there is one.
            room = max(1, _places(ray.available_resources(), asked, most))
            room -= sum(unit is None for _, unit, _ in running.values())
            for _ in range(min(room, min(most, len(waiting)) - len(running))):
                name = f"{part}_worker{next(started)}"
                worker = remote.remote(options, os.getcwd(), name, threads)
                stack.callback(ray.kill, worker)
                running[worker.ready.remote()] = worker, None, math.inf
            first = min(running, key=lambda each: running[each][2])
            end = running[first][2]
            left = None if end == math.inf else max(0.0, end - time.monotonic())
            ended, _ = ray.wait(list(running), timeout=left)
            future = ended[0] if ended else first
            worker, unit, _ = running.pop(future)
            seconds, files, failure, usable, lost = 0.0, {}, None, False, False
            try:
                if not ended:
                    seconds = limit
                    raise TimeoutError(
                        f"it took longer than minutes_per_unit={limit / 60:g}."
                    )
                seconds, files, failure, usable = ray.get(future)
                lost = not usable
            except (TimeoutError, ray.exceptions.RayError) as error:
                if unit is None:
                    raise ValueError(
                        f"--ray: a worker cannot start ({error})."
                    ) from None
                failure = describe_error(error)
            if unit and lost and unit.names not in moved:
                # The device may be to blame, or the unit: another worker will tell.
                moved.add(unit.names)
                waiting.append(unit)
            elif unit:
                with new_folder() as folder:
                    for name, content in files.items():
                        (folder / name).write_bytes(content)
                    yield unit, folder, seconds, failure
                if failure is None:
                    known.append((unit.task.name, seconds))
            if waiting and usable:
                unit = choose_unit(waiting, held.get(worker), held.values(), known)
                waiting.remove(unit)
                held[worker] = unit.configuration.id
                progress.workers = len(held)
                progress.start(*unit.names)
                future = worker.run.remote(*unit.names, unit.task.digest)
                running[future] = worker, unit, time.monotonic() + limit
            else:
                # Its resources go to whoever waits for them, another worker among them.
                held.pop(worker, None)
                ray.kill(worker)


@contextlib.contextmanager
def _cluster(options: dict[str, Any]) -> Iterator[Any]:
    """Yield the module of Ray, connected to the cluster."""
    # Ray reports its use over the network unless told otherwise before it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ValueError(
            "--ray needs the package ray, which is not installed: "
            "run `pip install 'lm-eval-pruned[ray]'`."
        ) from None
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            asked = options["ray"]
            address = asked if isinstance(asked, str) else None
            try:
                ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError) as error:
                raise ValueError(
                    f"--ray {asked}: the cluster cannot be reached ({error}); pass the address "
                    "of its head, or --ray alone to start one here."
                ) from None
            stack.callback(ray.shutdown)
        yield ray


def _places(
    resources: Mapping[str, float], asked: Mapping[str, float], most: int
) -> int:
    """Return how many workers that ask for so much find a place, `most` if they ask for nothing."""
    shares = [resources.get(name, 0) / n for name, n in asked.items() if n]
    return int(min(shares, default=most) + 1e-9)


class Worker:
    """Evaluates units in a process of the cluster."""

    def __init__(
        self, options: dict[str, Any], folder: str, part: str, threads: int
    ) -> None:
        # Relative paths in the options start from where the sweep was started.
        if Path(folder).is_dir():
            os.chdir(folder)
        import torch
        from lm_eval.utils import setup_logging

        setup_logging()
        torch.set_num_threads(threads)
        sweep = Sweep(options)
        self._units = {unit.names: unit for unit in sweep.units()}
        self._runner = UnitRunner(sweep, part)

    def ready(self) -> tuple[float, dict[str, bytes], None, bool]:
        """Return, once the worker is there, what `run` returns of a unit."""
        return 0.0, {}, None, True

    def run(
        self, configuration: str, task: str, digest: str
    ) -> tuple[float, dict[str, bytes], dict[str, str] | None, bool]:
        """Evaluate the unit of these names, whose task has this digest where it was planned.

        Returns:
            Seconds, the harness's files by name, None or what the unit failed with, and
            whether this process can run another, which it cannot after its device failed.
        """
        unit = self._units.get((configuration, task))
        if unit is None or unit.task.digest != digest:
            stranger = RuntimeError(
                f"the task {task} on {socket.gethostname()} is not the one this sweep was "
                "planned with: install the same lm_eval and task folders on every node."
            )
            return 0.0, {}, describe_error(stranger), True
        with tempfile.TemporaryDirectory() as folder:
            seconds, error = self._runner.attempt_patiently(unit, Path(folder))
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return seconds, files, error, not self._runner.device_failed
