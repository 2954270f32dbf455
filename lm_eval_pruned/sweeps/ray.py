"""Units of a sweep on a Ray cluster.

Workers are Ray actors that keep a model between units. Ray places them where resources are
free, and starts them and their unit again where a process or a node is lost. They send the files
of a unit back, so they need not share a file system with the process that started the sweep.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lm_eval.utils import setup_logging

from lm_eval_pruned.sweeps.apart import runner_of
from lm_eval_pruned.sweeps.plan import plan_sweep
from lm_eval_pruned.sweeps.unit import describe_error


if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from lm_eval_pruned.sweeps.plan import Sweep, Unit
    from lm_eval_pruned.sweeps.progress import Progress
    from lm_eval_pruned.sweeps.unit import Ended

logger = logging.getLogger("lm_eval.pruned.sweep")


class Answer(NamedTuple):
    """What a worker sends back of a unit; it can take another unless its device has failed."""

    seconds: float = 0.0
    files: Mapping[str, bytes] = {}
    failure: dict[str, str] | None = None
    usable: bool = True


def run_on_ray(
    sweep: Sweep,
    new_folder: Callable[[], Any],
    progress: Progress,
    part: str,
) -> Generator[Ended]:
    """Evaluate units on the cluster that the sweep asks for, and yield them as they end.

    ValueError where it cannot be reached, or no node of it has what a unit needs.
    """
    options, count = sweep.options, len(progress.waiting)
    with _cluster(options["ray"]) as ray, contextlib.ExitStack() as stack:
        cpus = options.get("cpus_per_unit", 1)
        has_gpus = ray.cluster_resources().get("GPU")
        gpus = options.get("gpus_per_unit", 1 if has_gpus else 0)
        free, nodes = ray.available_resources(), [n for n in ray.nodes() if n["Alive"]]

        def places(resources: Mapping[str, float]) -> int:
            needed = {"CPU": cpus, "GPU": gpus}.items()
            shares = [resources.get(name, 0) / n for name, n in needed if n]
            return int(min([*shares, count]) + 1e-9)

        most = min(count, sum(places(node["Resources"]) for node in nodes))
        needs = f"cpus_per_unit={cpus:g} and gpus_per_unit={gpus:g}"
        if not most:
            raise ValueError(f"{needs} are more than any node has: pass lower values.")
        logger.info("The sweep waits for workers, each of which needs %s.", needs)
        # A worker without a number shares the free CPUs with the others.
        share = free.get("CPU", 1) / max(1, min(most, places(free)))
        threads = max(1, int(options.get("cpus_per_unit") or share))
        # A unit starts again three times after its worker or node was lost.
        restarts = {"max_restarts": -1, "max_task_retries": 3}
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, **restarts)(Worker)
        started, moved = 0, set()
        #: A worker with its unit, or without one until the worker has a place.
        running: dict[Any, tuple[Any, Unit | None]] = {}
        while progress.waiting or any(unit for _, unit in running.values()):
            for _ in range(min(most, len(progress.waiting)) - len(running)):
                name = f"{part}_worker{started}"
                worker = remote.remote(options, os.getcwd(), name, threads)
                stack.callback(ray.kill, worker)
                running[worker.ready.remote()] = worker, None
                started += 1
            (future, *_), _ = ray.wait(list(running))
            worker, unit = running.pop(future)
            try:
                answer = ray.get(future)
            except ray.exceptions.RayError as error:
                if unit is None:
                    message = f"--ray: a worker cannot start ({error})."
                    raise ValueError(message) from None
                answer = Answer(failure=describe_error(error), usable=False)
                moved.add(unit.names)
            # The device may be to blame, or the unit: another worker will tell.
            if unit and not answer.usable and unit.names not in moved:
                moved.add(unit.names)
                progress.waiting.append(unit)
            elif unit:
                with new_folder() as folder:
                    for name, content in answer.files.items():
                        Path(folder, name).write_bytes(content)
                    yield unit, folder, answer.seconds, answer.failure
            if progress.waiting and answer.usable:
                unit = progress.take(worker)
                progress.held[worker] = unit.configuration.id
                progress.start(unit)
                future = worker.run.remote(*unit.names, unit.task.digest)
                running[future] = worker, unit
            else:
                # Its resources go to whoever waits for them, another worker among them.
                progress.held.pop(worker, None)
                ray.kill(worker)


@contextlib.contextmanager
def _cluster(address: bool | str) -> Iterator[Any]:
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
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(
            address if isinstance(address, str) else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    # Where a node is slow to start, Ray raises an Exception of no kind.
    except Exception as error:  # noqa: BLE001
        where = f"--ray {address}" if isinstance(address, str) else "--ray"
        raise ValueError(
            f"{where}: the cluster cannot be reached or started ({error}); pass the address of its "
            "head node, or repeat the command once the machine is less busy."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


class Worker:
    """Evaluates units in a process of the cluster."""

    def __init__(
        self, options: dict[str, Any], folder: str, part: str, threads: int
    ) -> None:
        # Relative paths in the options start from where the sweep was started.
        if Path(folder).is_dir():
            os.chdir(folder)
        setup_logging()
        torch.set_num_threads(threads)
        sweep = plan_sweep(options)
        self._units = {unit.names: unit for unit in sweep.units()}
        self._runner = runner_of(sweep, part)

    def ready(self) -> Answer:
        """Return once the worker is there."""
        return Answer()

    def run(self, configuration: str, task: str, digest: str) -> Answer:
        """Evaluate the unit of these names, whose task has this digest where it was planned."""
        unit = self._units.get((configuration, task))
        if unit is None or unit.task.digest != digest:
            stranger = RuntimeError(
                f"the task {task} on {socket.gethostname()} is not the one this sweep was "
                "planned with: install the same lm_eval and task folders on every node."
            )
            return Answer(failure=describe_error(stranger))
        with tempfile.TemporaryDirectory() as folder:
            seconds, error = self._runner.attempt(unit, Path(folder))
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return Answer(seconds, files, error, not self._runner.device_failed)
