"""One unit of a sweep: evaluating it with the model at hand, and what a failure leaves."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import re
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import lm_eval
import torch
from accelerate.utils import release_memory
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import get_model
from lm_eval.loggers import EvaluationTracker

from lm_eval_pruned.sweeps.floors import Floor
from lm_eval_pruned.sweeps.folder import write_results
from lm_eval_pruned.sweeps.options import deciding
from lm_eval_pruned.sweeps.plan import MODELS, Configuration
from lm_eval_pruned.sweeps.stopping import check_tasks, evaluate_until_decided
from lm_eval_pruned.sweeps.tasks import fingerprint, load_task
from lm_eval_pruned.sweeps.tracking import check_tracking, report


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval_pruned.pruning.measuring import KnownScores
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.sweeps.plan import Sweep, Unit
    from lm_eval_pruned.sweeps.tasks import SweepTask

    #: A unit, the folder of its files, its seconds, and None or what it failed with.
    Ended = tuple[Unit, Path, float, dict[str, str] | None]


logger = logging.getLogger("lm_eval.pruned.sweep")


#: Seconds of waiting before a unit that the Hub answered with 429 starts again; the Hub counts
#: requests over five minutes.
PAUSES = (30, 60, 120, 240)


class UnitRunner:
    """Evaluates units, holding one model at a time, and the scores of all neurons.

    Args:
        sweep: The plan.
        part: Distinguishes the cache files of processes that run side by side.
        base: Reads the unpruned model's results on a task, for units that may stop early.

    Attributes:
        device_failed: Whether the accelerator failed, after which this process cannot use it.
    """

    def __init__(
        self, sweep: Sweep, part: str, base: Callable[[SweepTask], Run] | None = None
    ) -> None:
        self._sweep, self._part, self._base = sweep, part, base
        check_tracking(sweep.settings)
        self._holds: Configuration | Floor | None = None
        # The model, or what loading it raised.
        self._lm: Any = None
        self._known_scores: KnownScores = {}
        self.device_failed = False

    def attempt(self, unit: Unit, folder: Path) -> tuple[float, dict[str, str] | None]:
        """Evaluate one unit and write the harness's files of it to `folder`, an empty one.

        Returns:
            Seconds the evaluation took, without loading the model; and None, or ``type``,
            ``message`` and ``traceback`` of what the unit failed with.
        """
        start = time.perf_counter()
        try:
            return self._run(unit, folder), None
        except Exception as error:
            logger.exception("%s / %s failed.", *unit.names)
            self.device_failed = _is_of_device(error)
            told = describe_error(error)
        if getattr(self._lm, "engine_died", False):
            # It answers nobody: the next unit starts another.
            self.release()
        elif not self.device_failed:
            release_memory()
        return time.perf_counter() - start, told

    def release(self) -> None:
        """Free the model's memory."""
        getattr(self._lm, "close", lambda: None)()
        self._lm = self._holds = None
        release_memory()

    def attempt_patiently(
        self, unit: Unit, folder: Path
    ) -> tuple[float, dict[str, str] | None]:
        """Attempt a unit, and again after a while where the Hub says 429."""
        for pause in PAUSES:
            seconds, error = self.attempt(unit, folder)
            refused = r"\b429 (Client Error|Too Many Requests)"
            if error is None or not re.search(refused, error["traceback"]):
                return seconds, error
            # Those that were refused together do not come back together.
            wait = pause * random.uniform(0.75, 1.25)
            logger.warning("The Hub says 429: %s / %s waits %.0f s.", *unit.names, wait)
            # It holds what loading has raised.
            self.release()
            time.sleep(wait)
        return self.attempt(unit, folder)

    def _run(self, unit: Unit, folder: Path) -> float:
        sweep, (configuration, task) = self._sweep, unit
        manager = sweep.task_manager(configuration)
        tasks = load_task(manager, task)
        base = None
        if sweep.stop_when is not None:
            members = manager.load(tasks)["tasks"]
            # Those of the unpruned model, too, for which all sizes wait.
            check_tasks(sweep.stop_when, members, sweep.settings)
            if self._base and sweep.may_stop(configuration):
                base = self._base(task)
        self._load(configuration)
        start, tracker = time.perf_counter(), EvaluationTracker()
        given = configuration, manager, tasks, tracker
        evaluate = functools.partial(self._evaluate, *given)
        if base is None:
            results = evaluate()
        else:
            results = evaluate_until_decided(
                sweep, task.name, members, base, evaluate, folder.parent
            )
        seconds = time.perf_counter() - start
        # Of several processes, the first has them.
        if results is not None:
            report(" ".join(unit.names), results, sweep.settings)
            write_results(results, tracker, folder)
        return seconds

    def _load(self, configuration: Configuration | Floor) -> None:
        """Hold the model of a configuration, or raise what loading it has raised."""
        sweep = self._sweep
        if self._holds is not configuration:
            self.release()
            self._holds = configuration
            logger.info("Loading %s.", configuration.id)
            names = ("batch_size", "max_batch_size", "device")
            more = {name: getattr(sweep.settings, name) for name in names}
            try:
                if isinstance(configuration, Configuration) and configuration.healed:
                    sweep.heal(configuration)
                    release_memory()
                kind = sweep.model_type(configuration)
                if kind in MODELS:
                    more["known_scores"] = self._known_scores
                load = get_model(kind).create_from_arg_obj
                self._lm = load(sweep.model_args(configuration), more)
            except Exception as error:  # noqa: BLE001
                # The frames of the traceback keep what was loaded so far.
                traceback.clear_frames(error.__traceback__)
                self._lm = error
        if isinstance(self._lm, Exception):
            raise self._lm
        # The results of a unit are of that unit alone.
        getattr(self._lm, "begin_evaluation", lambda: None)()

    def _evaluate(
        self,
        configuration: Configuration | Floor,
        manager: Any,
        tasks: list[Any],
        tracker: EvaluationTracker,
        chosen: dict[str, list[int]] | None = None,
        cache: str | None = None,
    ) -> Any:
        """Return the harness's results, of chosen documents and with a cache of their answers."""
        lm, sweep, settings = self._lm, self._sweep, self._sweep.settings
        # Automatic batch sizes were found for the lengths of other documents.
        lm.batch_sizes = {}
        names = (*deciding("scores"), "batch_size", "max_batch_size")
        options = {name: getattr(settings, name) for name in names}
        if chosen is not None:
            options |= {"limit": None, "samples": chosen}
        drawing = ("random", "numpy_random", "torch_random", "fewshot_random")
        seeds = zip(drawing, settings.seed or [None] * 4, strict=True)
        own_cache = settings.use_cache
        if isinstance(configuration, Floor):
            # Their answers cost nothing, and depend on which documents there are.
            own_cache = None
        if own_cache is not None:
            # The harness's key of a response holds the request and nothing of the model.
            model = fingerprint(sweep.model_definition(configuration))[:12]
            own_cache += f"_{configuration.id}_{model}{self._part}"
        try:
            with _quiet_git():
                results = lm_eval.simple_evaluate(
                    model=lm,
                    model_args=sweep.model_args(configuration),
                    tasks=tasks,
                    **options,
                    **{f"{name}_seed": seed for name, seed in seeds},
                    # What it computes on, which need not be what was asked for.
                    device=str(getattr(lm, "device", settings.device)),
                    use_cache=own_cache or cache,
                    evaluation_tracker=tracker,
                    task_manager=manager,
                    confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
                    metadata=manager.metadata,
                )
        finally:
            if (answers := getattr(lm.cache_hook, "dbdict", None)) is not None:
                answers.close()
                lm.set_cache_hook(CacheHook(None))
        if results is not None:
            # What `lm_eval run` records where it makes the model itself.
            model = sweep.model_type(configuration)
            results["config"] |= {"model": model, "use_cache": own_cache}
            results["config"]["weight_bytes"] = weight_bytes(getattr(lm, "model", None))
            tracker.general_config_tracker.model_source = model
        return results


def weight_bytes(model: Any) -> int | None:
    """Return how many bytes the parameters and buffers of a model take, or None for an engine."""
    if not isinstance(model, torch.nn.Module):
        return None
    return sum(map(_bytes_of, [*model.parameters(), *model.buffers()]))


def _bytes_of(tensor: Any) -> int:
    # A quantised tensor of torchao is made of others.
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes_of(getattr(tensor, name)) for name in names)


def describe_error(error: BaseException) -> dict[str, str]:
    """Return type, message and traceback of `error` as text."""
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    text = "".join(traceback.format_exception(error))
    return {"type": name, "message": str(error), "traceback": text}


def _is_of_device(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, is of the device. Too little memory does not count."""
    if error is None:
        return False
    # Before release 2.8, torch raises a plain RuntimeError.
    pattern = r"(CUDA|HIP|XPU)( driver)? error: (?!out of memory)"
    found = isinstance(error, RuntimeError) and re.match(pattern, str(error))
    return bool(found) or _is_of_device(error.__cause__ or error.__context__)


def _quiet_git() -> contextlib.AbstractContextManager[Any]:
    """Have the harness ask git for a commit only where there is a repository to ask about."""
    here = Path.cwd()
    if any((place / ".git").exists() for place in (here, *here.parents)):
        return contextlib.nullcontext()
    return mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None)
