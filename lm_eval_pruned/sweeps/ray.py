"""Units of a sweep on a Ray cluster.

Workers are Ray actors that keep a model between units. Ray places them where resources are
free, and starts them and their unit again where a process or a node is lost. They send the files
of a unit back, so they need not share a file system with the process that started the sweep.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.unit import UnitRunner, describe_error


if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterator

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
) -> Generator[Ended]:
    """Evaluate units on the cluster that the sweep asks for, and yield them as they end.

    Raises:
        ValueError: Ray is not installed, the cluster cannot be reached, or it has not got what
            a unit needs.
    """
    options = sweep.options
    with _cluster(options) as ray, contextlib.ExitStack() as stack:
        total = ray.cluster_resources()
        cpus = options.get("cpus_per_unit", 1)
        gpus = options.get("gpus_per_unit", 1 if total.get("GPU") else 0)
        needs = f"cpus_per_unit={cpus:g} and gpus_per_unit={gpus:g}"
        shares = [total.get(k, 0) / n for k, n in (("CPU", cpus), ("GPU", gpus)) if n]
        places = int(min(shares, default=len(units)) + 1e-9)
        if not places:
            raise ValueError(f"{needs} are more than the cluster has: ask for less.")
        logger.info("The sweep waits for workers, each of which needs %s.", needs)
        restarts = {"max_restarts": -1, "max_task_retries": RETRIES}
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, **restarts)(Worker)
        waiting, started = list(units), itertools.count()
        # The configuration whose model each worker that has started holds.
        held: dict[Any, str] = {}
        running: dict[Any, tuple[Any, Unit | None]] = {}
        # A worker that still waits for a place is not waited for.
        while waiting or any(unit for _, unit in running.values()):
            while len(running) < min(places, len(waiting)):
                name = f"{part}_worker{next(started)}"
                worker = remote.remote(options, os.getcwd(), name)
                stack.callback(ray.kill, worker)
                running[worker.ready.remote()] = worker, None
            (future, *_), _ = ray.wait(list(running))
            worker, unit = running.pop(future)
            try:
                seconds, files, failure, usable = ray.get(future)
            except ray.exceptions.RayError as error:
                if unit is None:
                    raise ValueError(
                        f"--ray: a worker cannot start ({error})."
                    ) from None
                seconds, files, failure, usable = 0.0, {}, describe_error(error), False
            if unit is not None:
                with new_folder() as folder:
                    for name, content in files.items():
                        (folder / name).write_bytes(content)
                    yield unit, folder, seconds, failure
            if waiting and usable:
                unit = choose_unit(waiting, held.get(worker), held.values())
                waiting.remove(unit)
                held[worker] = unit.configuration.id
                progress.workers = len(held)
                progress.start(*unit.names)
                future = worker.run.remote(*unit.names, unit.task.digest)
                running[future] = worker, unit
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


def choose_unit(
    waiting: list[Unit], holds: str | None, elsewhere: Collection[str]
) -> Unit:
    """Return a unit of the model it holds; else of one that nobody holds; else of the most left."""
    names = [unit.configuration.id for unit in waiting]
    ranks = [(n != holds, n in elsewhere, -names.count(n)) for n in names]
    return waiting[ranks.index(min(ranks))]


class Worker:
    """Evaluates units in a process of the cluster."""

    def __init__(self, options: dict[str, Any], folder: str, part: str) -> None:
        # Relative paths in the options start from where the sweep was started.
        if Path(folder).is_dir():
            os.chdir(folder)
        import torch
        from lm_eval.utils import setup_logging

        setup_logging()
        torch.set_num_threads(max(1, int(options.get("cpus_per_unit", 1))))
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
            seconds, error = self._runner.attempt(unit, Path(folder))
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return seconds, files, error, not self._runner.device_failed
