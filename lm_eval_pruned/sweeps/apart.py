"""Units in a separate process, which ends with a unit that takes too long: ``--unit_timeout``."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from lm_eval.utils import setup_logging
from tqdm import tqdm

from lm_eval_pruned.sweeps.plan import plan_sweep
from lm_eval_pruned.sweeps.unit import UnitRunner, check_tracking, describe_error


if TYPE_CHECKING:
    from lm_eval_pruned.sweeps.plan import Sweep, Unit


def runner_of(sweep: Sweep, part: str) -> UnitRunner | LimitedRunner:
    """Return what evaluates the units of a sweep one by one; see `UnitRunner`."""
    limited = sweep.options.get("unit_timeout")
    return LimitedRunner(sweep, part) if limited else UnitRunner(sweep, part)


class LimitedRunner:
    """Evaluates units as `UnitRunner` does, with a limit of seconds for each, loading the model included.

    What hangs may be a library or a device, which nothing but the end of the process stops. So a separate
    process has the model, and the next unit starts a new one where it was ended or has died. It plans the
    sweep anew from the options. A process that the kernel cannot end, such as one that waits for a network
    file system, still holds the sweep.
    """

    def __init__(self, sweep: Sweep, part: str) -> None:
        check_tracking(sweep.settings)
        self._options, self._part = sweep.options, part
        self._process: Any = None
        self.device_failed = False

    def attempt(self, unit: Unit, folder: Path) -> tuple[float, dict[str, str] | None]:
        """Evaluate a unit; see `UnitRunner.attempt`."""
        start, limit = time.perf_counter(), self._options["unit_timeout"]
        if self._process is None:
            self._start()
        try:
            self._channel.send((unit.names, str(folder)))
            if self._channel.poll(limit):
                seconds, failure, self.device_failed = self._channel.recv()
                if self.device_failed:
                    self.release()
                return seconds, failure
            error: Exception = TimeoutError(
                f"the unit took more than --unit_timeout {limit:g} seconds, and was ended."
            )
        except (EOFError, OSError):
            self._process.join()
            error = RuntimeError(
                f"the process of the unit ended with exit code {self._process.exitcode}."
            )
        except KeyboardInterrupt:
            self.release()
            raise
        self.release()
        return time.perf_counter() - start, describe_error(error)

    def release(self) -> None:
        """End the process, and with it the model."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            # Engines run in processes that would outlive it.
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.kill()
        self._process.join()
        self._channel.close()
        self._process = None

    def _start(self) -> None:
        # Neither CUDA nor the threads of a worker of Ray survive a fork.
        context = multiprocessing.get_context("spawn")
        self._channel, theirs = context.Pipe()
        arguments = theirs, self._options, self._part, torch.get_num_threads()
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        theirs.close()


def _serve(channel: Any, options: dict[str, Any], part: str, threads: int) -> None:
    """Evaluate the units that come through `channel`, until the process that started this one ends it."""
    # Ctrl-C reaches the whole group, and that process answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Else tqdm makes a semaphore, which Python warns of once the process was ended.
    tqdm.set_lock(threading.RLock())
    setup_logging()
    torch.set_num_threads(threads)
    sweep = plan_sweep(options)
    units = {unit.names: unit for unit in sweep.units()}
    runner = UnitRunner(sweep, part)
    while True:
        names, folder = channel.recv()
        ended = runner.attempt(units[names], Path(folder))
        channel.send((*ended, runner.device_failed))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
