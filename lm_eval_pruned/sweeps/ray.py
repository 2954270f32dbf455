"""Units of a sweep on a Ray cluster.

Workers are Ray actors that keep a model between units. They evaluate into a
folder of their own and send its files back; only the process that started the
sweep writes to the sweep's folder, so workers need not share a file system with it.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.ranks import device_failed
from lm_eval_pruned.sweeps.runner import (
    UnitRunner,
    describe_error,
    part_name,
    unit_key,
)


if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from lm_eval_pruned.sweeps.runner import Outcome, Store, Unit
    from lm_eval_pruned.util.progress import Progress

logger = logging.getLogger("lm_eval.pruned.sweep")

#: How often a unit starts again after its worker or node was lost.
RETRIES = 3
#: Seconds until the user hears that no worker could start yet.
PATIENCE = 60


def run_on_ray(
    sweep: Sweep,
    waiting: Sequence[Unit],
    store: Store,
    progress: Progress,
    shard: tuple[int, int] | None,
) -> Generator[Outcome]:
    """Evaluate units on a cluster, each on the resources asked for.

    Args:
        sweep: The plan; its options say which cluster and how much of it.
        waiting: Units to run.
        store: Where outcomes are kept.
        progress: Told when a unit starts.
        shard: ``(I, N)`` where this is one part of a sweep.

    Yields:
        Outcomes, as they come in.

    Raises:
        ValueError: Ray is not installed, the cluster cannot be reached, or none of
            its nodes has what a unit needs.
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
    if not waiting:
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
        yield from _Cluster(ray, sweep, waiting, store, progress, shard).run()
    finally:
        if ours:
            ray.shutdown()


def choose_unit(
    waiting: Sequence[Unit], holds: str | None, elsewhere: Sequence[str | None]
) -> int:
    """Return the position of the unit that a free worker should take.

    One of the configuration it holds; else of one that no other worker holds; else
    of the one with the most units left.

    Args:
        waiting: Units to choose from, at least one.
        holds: Id of the configuration whose model the worker has.
        elsewhere: Ids of those that other workers have.
    """
    left = Counter(configuration.id for configuration, _ in waiting)

    def rank(position: int) -> tuple[bool, bool, int, int]:
        name = waiting[position][0].id
        return name != holds, name in elsewhere, -left[name], position

    return min(range(len(waiting)), key=rank)


def workers_that_fit(nodes: Sequence[dict[str, Any]], cpus: float, gpus: float) -> int:
    """Return how many workers the nodes of a cluster hold, each worker on one node.

    Args:
        nodes: As `ray.nodes` lists them.
        cpus: CPUs of one worker.
        gpus: GPUs of one worker.
    """
    needs = [(name, need) for name, need in (("CPU", cpus), ("GPU", gpus)) if need]
    return sum(
        min(
            (int(node["Resources"].get(name, 0) / n + 1e-9) for name, n in needs),
            default=os.cpu_count() or 1,
        )
        for node in nodes
        if node["Alive"]
    )


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
        from lm_eval.utils import setup_logging

        setup_logging()
        self._sweep = Sweep(options)
        self._runner = UnitRunner(self._sweep, part)

    def ready(self) -> str:
        """Return the node's name, once the worker is there."""
        return socket.gethostname()

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
        start = time.perf_counter()
        try:
            here = {each.name: each for each in self._sweep.tasks}[task]
            if here.digest != digest:
                raise RuntimeError(
                    f"the task {task} on {socket.gethostname()} is not the one this sweep was "
                    "planned with: install the same lm_eval and task folders on every node."
                )
            model = {each.id: each for each in self._sweep.configurations}[
                configuration
            ]
            with tempfile.TemporaryDirectory() as folder:
                seconds = self._runner.run(model, here, Path(folder))
                files = {
                    path.name: path.read_bytes() for path in Path(folder).iterdir()
                }
        except Exception as error:  # noqa: BLE001
            spent = time.perf_counter() - start
            return spent, {}, describe_error(error), device_failed(error)
        return seconds, files, None, False


class _Cluster:
    """Deals units to workers and collects what they send back.

    Ray starts a worker once its resources are free, so fewer may run than there are places
    for. A worker that has no unit left to run ends, and others get what it held.
    """

    def __init__(self, ray, sweep, waiting, store, progress, shard) -> None:
        self._ray = ray
        self._waiting: list[Unit] = list(waiting)
        self._store = store
        self._progress = progress
        self._part = part_name(shard)
        options = sweep.options
        cpus = options.get("cpus_per_unit", 1)
        gpus = options.get(
            "gpus_per_unit", 1 if ray.cluster_resources().get("GPU") else 0
        )
        self._needs = f"cpus_per_unit={cpus:g} and gpus_per_unit={gpus:g}"
        self._places = workers_that_fit(ray.nodes(), cpus, gpus)
        if not self._places:
            raise ValueError(
                f"{self._needs} are more than any node of the cluster has (in all: "
                f"{_written(ray.cluster_resources())}): ask for less."
            )
        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(Worker)
        # Options that are paths must mean the same on a node.
        self._options = ray.put(options)
        self._workers: dict[int, Any] = {}
        # Of the workers that have started.
        self._holds: dict[int, str | None] = {}
        # None while the worker starts.
        self._running: dict[Any, tuple[int, Unit | None]] = {}
        self._losses: Counter[tuple[str, str]] = Counter()

    def run(self) -> Iterator[Outcome]:
        told = False
        try:
            while units := [*self._waiting, *filter(None, self._assigned())]:
                while len(self._workers) < min(self._places, len(units)):
                    self._start()
                if not self._workers:
                    print(
                        f"Stopped: no worker is left for {len(units)} units. The same command "
                        "goes on with them."
                    )
                    return
                done, _ = self._ray.wait(list(self._running), timeout=PATIENCE)
                if not (done or self._holds or told):
                    told = True
                    logger.warning(
                        "The sweep waits for its first worker, which needs %s; the cluster has "
                        "%s free.",
                        self._needs,
                        _written(self._ray.available_resources()),
                    )
                for future in done:
                    yield from self._collect(future, *self._running.pop(future))
        finally:
            for number in list(self._workers):
                self._end(number)

    def _assigned(self) -> list[Unit | None]:
        return [unit for _, unit in self._running.values()]

    def _start(self) -> None:
        number = next(n for n in itertools.count() if n not in self._workers)
        worker = self._remote.remote(
            self._options, os.getcwd(), f"{self._part}_worker{number}"
        )
        self._workers[number] = worker
        self._running[worker.ready.remote()] = (number, None)

    def _end(self, number: int) -> None:
        self._holds.pop(number, None)
        with suppress(Exception):
            self._ray.kill(self._workers.pop(number))

    def _assign(self, number: int) -> None:
        if not self._waiting:
            self._end(number)
            return
        holds = self._holds.pop(number, None)
        position = choose_unit(self._waiting, holds, list(self._holds.values()))
        unit = self._waiting.pop(position)
        configuration, task = unit
        self._holds[number] = configuration.id
        self._progress.workers = len(self._holds)
        self._progress.start(configuration.id, task.name)
        future = self._workers[number].run.remote(
            configuration.id, task.name, task.digest
        )
        self._running[future] = (number, unit)

    def _collect(self, future, number: int, unit: Unit | None) -> Iterator[Outcome]:
        try:
            answer = self._ray.get(future)
        except self._ray.exceptions.RayError as error:
            failure = describe_error(error)
            yield from self._lose(number, unit, 0.0, failure, place=unit is None)
            return
        if unit is not None:
            seconds, files, failure, no_device = answer
            if no_device:
                yield from self._lose(number, unit, seconds, failure, place=True)
                return
            yield self._keep(unit, seconds, files, failure)
        self._assign(number)

    def _lose(
        self, number: int, unit: Unit | None, seconds, failure, place: bool
    ) -> Iterator[Outcome]:
        """Give up a worker, and its place where the next one would fail there as well."""
        self._end(number)
        self._places -= place
        if unit is None:
            logger.error("A worker could not start: %s", failure["message"])
            return
        self._losses[unit_key(unit)] += 1
        # Two devices that fail with one unit are enough.
        if self._places and self._losses[unit_key(unit)] <= (1 if place else RETRIES):
            self._waiting.append(unit)
        else:
            yield self._keep(unit, seconds, {}, failure)

    def _keep(self, unit, seconds, files, failure) -> Outcome:
        with self._store.new_unit() as folder:
            for name, content in files.items():
                (folder / name).write_bytes(content)
            return self._store.keep(unit, folder, seconds, failure)


def _written(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
