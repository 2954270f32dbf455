"""One unit of a sweep: evaluating it with the model at hand, what a failure leaves, who is told.

W&B, Trackio and the Hub are told by the harness's own loggers, which get a name for each unit.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import re
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import lm_eval
from accelerate.utils import release_memory
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import get_model
from lm_eval.loggers import EvaluationTracker, TrackioLogger, WandbLogger

from lm_eval_pruned.sweeps.folder import write_results
from lm_eval_pruned.sweeps.options import deciding
from lm_eval_pruned.sweeps.stopping import check_tasks, evaluate_until_decided
from lm_eval_pruned.sweeps.tasks import fingerprint, load_task


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lm_eval.config.evaluate_config import EvaluatorConfig

    from lm_eval_pruned.pruning.measuring import KnownScores
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.sweeps.plan import Configuration, Sweep, Unit
    from lm_eval_pruned.sweeps.tasks import SweepTask

    #: A unit, the folder of its files, its seconds, and None or what it failed with.
    Ended = tuple[Unit, Path, float, dict[str, str] | None]


logger = logging.getLogger("lm_eval.pruned.sweep")


class UnitRunner:
    """Evaluates units, holding one model at a time, and the scores of all neurons.

    Args:
        sweep: The plan.
        part: Distinguishes the cache files of processes that run side by side.
        base: Reads the unpruned model's results on a task, for units that may stop early.

    Attributes:
        tracking: Where units are reported besides the folder.
        device_failed: Whether the accelerator failed, after which this process cannot use it.
    """

    def __init__(
        self, sweep: Sweep, part: str, base: Callable[[SweepTask], Run] | None = None
    ) -> None:
        self._sweep, self._part, self._base = sweep, part, base
        self.tracking = Tracking(sweep.settings)
        self._holds: Configuration | None = None
        # The model, or what loading it raised.
        self._lm: Any = None
        self._known_scores: KnownScores = {}
        self.device_failed = False

    def attempt(
        self, unit: Unit, folder: str | Path
    ) -> tuple[float, dict[str, str] | None]:
        """Evaluate one unit and write the harness's files of it to `folder`, an empty one.

        Returns:
            Seconds the evaluation took, without loading the model; and None, or ``type``,
            ``message`` and ``traceback`` of what the unit failed with.
        """
        start = time.perf_counter()
        try:
            return self._run(unit, Path(folder)), None
        except Exception as error:
            logger.exception("%s / %s failed.", *unit.names)
            self.device_failed = any(map(_is_of_device, _causes(error)))
            told = describe_error(error)
        if not self.device_failed:
            release_memory()
        return time.perf_counter() - start, told

    def release(self) -> None:
        """Free the model's memory."""
        getattr(self._lm, "close", lambda: None)()
        self._lm = self._holds = None
        release_memory()

    def _run(self, unit: Unit, folder: Path) -> float:
        sweep, (configuration, task) = self._sweep, unit
        manager = sweep.task_manager(configuration)
        base = None
        if sweep.stop_when is not None:
            loaded = manager.load(load_task(manager, task))
            # Those of the unpruned model, too, for which all sizes wait.
            check_tasks(sweep.stop_when, loaded["tasks"], sweep.settings)
            if self._base and sweep.may_stop(configuration):
                base = self._base(task)
        lm = self._model(configuration)
        start = time.perf_counter()
        tracker = self.tracking.hub_tracker(lm.rank)
        given = lm, configuration, manager, tracker
        evaluate = functools.partial(self._evaluate, *given)
        try:
            if base is None:
                results = evaluate(load_task(manager, task))
            else:
                results = evaluate_until_decided(
                    lm, sweep, loaded, base, evaluate, folder.parent
                )
        except Exception:
            # An engine that died answers nobody: the next unit starts another.
            if getattr(lm, "engine_died", False):
                self.release()
            raise
        seconds = time.perf_counter() - start
        # Of several processes, the first has them.
        if results is not None:
            with self.tracking.reported(*unit.names, results, tracker):
                write_results(results, tracker, folder)
        return seconds

    def _model(self, configuration: Configuration) -> Any:
        if self._holds is not configuration:
            self.release()
            self._holds = configuration
            logger.info("Loading %s.", configuration.id)
            try:
                self._lm = self._loaded(configuration)
            except Exception as error:  # noqa: BLE001
                # The frames of the traceback keep what was loaded so far.
                traceback.clear_frames(error.__traceback__)
                self._lm = error
        if isinstance(self._lm, Exception):
            raise self._lm
        # The results of a unit are of that unit alone.
        self._lm.begin_evaluation()
        return self._lm

    def _loaded(self, configuration: Configuration) -> Any:
        sweep = self._sweep
        if configuration.healed:
            sweep.heal(configuration)
            release_memory()
        names = ("batch_size", "max_batch_size", "device")
        more = {name: getattr(sweep.settings, name) for name in names}
        return get_model(sweep.model).create_from_arg_obj(
            sweep.model_args(configuration),
            {**more, "known_scores": self._known_scores},
        )

    def _evaluate(
        self,
        lm: Any,
        configuration: Configuration,
        manager: Any,
        tracker: Any,
        tasks: list[Any],
        chosen: dict[str, list[int]] | None = None,
        cache: str | None = None,
    ) -> Any:
        """Return the harness's results, of chosen documents and with a cache of their answers."""
        sweep, settings = self._sweep, self._sweep.settings
        # Automatic batch sizes were found for the lengths of other documents.
        lm.batch_sizes = {}
        names = (*deciding("scores"), "batch_size", "max_batch_size")
        options = {name: getattr(settings, name) for name in names}
        if chosen is not None:
            options |= {"limit": None, "samples": chosen}
        drawing = ("random", "numpy_random", "torch_random", "fewshot_random")
        seeds = zip(drawing, settings.seed or [None] * 4, strict=True)
        own_cache = settings.use_cache
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
            results["config"] |= {"model": sweep.model, "use_cache": own_cache}
            tracker.general_config_tracker.model_source = sweep.model
        return results


class Tracking:
    """Reports units besides the folder. Once units run, what fails here is a warning.

    Args:
        settings: The harness's reading of the options.

    Raises:
        ValueError: A package is missing, or W&B would put all units into one run.
    """

    def __init__(self, settings: EvaluatorConfig) -> None:
        self._settings = settings
        self._hub = dict(settings.hf_hub_log_args)
        for package in ("wandb", "trackio"):
            given = getattr(settings, f"{package}_args")
            if given and importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"{package}_args was given, but {package} is not installed: run "
                    f"`pip install {package}`, or leave {package}_args out."
                )
        if "id" in settings.wandb_args:
            raise ValueError(
                f"wandb_args has id={settings.wandb_args['id']}, but each unit is a run by itself: "
                "leave it out, or name what they share with group=..."
            )

    def hub_tracker(self, rank: int = 0) -> EvaluationTracker:
        """Return the harness's tracker, which sends results to the Hub if that was asked for.

        The first of a process asks the Hub whose token this is, unless the organisation
        was given. Of several processes, that of rank 0 reports.

        Raises:
            ValueError: An argument is unknown, there is no token, or the Hub refuses it or
                cannot be reached.
        """
        if rank or not self._hub:
            return EvaluationTracker()
        token = os.environ.get("HF_TOKEN") or self._hub.get("token") or ""
        try:
            tracker = EvaluationTracker(**{**self._hub, "token": token})
        except Exception as error:
            raise ValueError(
                f"hf_hub_log_args cannot be used ({type(error).__name__}: {error}): pass what the "
                "harness's EvaluationTracker takes, hub_results_org=... among it, or check token "
                "and network."
            ) from error
        self._hub["hub_results_org"] = tracker.details_repo.partition("/")[0]
        return tracker

    @contextlib.contextmanager
    def reported(
        self, configuration: str, task: str, results: dict[str, Any], tracker: Any
    ) -> Iterator[None]:
        """Report a unit to W&B and Trackio, and name it on the Hub, where the block saves it."""
        label = f"{configuration} {task}"
        settings = self._settings
        scores = {k: v for k, v in results.items() if k != "samples"}
        for service, given, kind, *more in (
            ("W&B", settings.wandb_args, WandbLogger, settings.wandb_config_args),
            ("Trackio", settings.trackio_args, TrackioLogger),
        ):
            if not given:
                continue
            name = f"{given['name']} {label}" if given.get("name") else label
            with _warning(f"{label} was not logged to {service}"):
                # They change what they are given.
                run: Any = kind({**given, "name": name}, *map(dict, more))
                run.post_init(scores)
                run.log_eval_result()
                if "samples" in results:
                    run.log_eval_samples(results["samples"])
                (run if service == "Trackio" else run.run).finish()
        pushes = tracker.push_results_to_hub or tracker.push_samples_to_hub
        if pushes:
            # The harness names folders there after the checkpoint, which all configurations share.
            named = tracker.general_config_tracker
            named.model_name += f"_{configuration}"
            named.model_name_sanitized += f"_{configuration}"
        yield
        if pushes:
            with _warning(f"the card of {tracker.details_repo} was not written"):
                tracker.recreate_metadata_card()


@contextlib.contextmanager
def _warning(what: str) -> Iterator[None]:
    """Turn an error into a warning: the unit's results are whole without this."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        logger.warning("%s: %s: %s", what, type(error).__name__, error)


def describe_error(error: BaseException) -> dict[str, str]:
    """Return type, message and traceback of `error` as text."""
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    text = "".join(traceback.format_exception(error))
    return {"type": name, "message": str(error), "traceback": text}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_device(error: BaseException) -> bool:
    """Before release 2.8, torch raises a plain RuntimeError. Too little memory is no such failure."""
    pattern = r"(CUDA|HIP|XPU)( driver)? error: (?!out of memory)"
    return isinstance(error, RuntimeError) and bool(re.match(pattern, str(error)))


def _quiet_git() -> contextlib.AbstractContextManager[Any]:
    """Have the harness ask git for a commit only where there is a repository to ask about."""
    here = Path.cwd()
    if any((place / ".git").exists() for place in (here, *here.parents)):
        return contextlib.nullcontext()
    return mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None)
