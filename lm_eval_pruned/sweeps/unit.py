"""One unit of a sweep: evaluating it with the model that is loaded, tracking it, recording failures."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import lm_eval
import torch
from accelerate.utils import release_memory
from lm_eval import loggers
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import get_model
from lm_eval.loggers import EvaluationTracker
from torch.utils import collect_env

from lm_eval_pruned.sweeps.folder import write_results
from lm_eval_pruned.sweeps.options import deciding
from lm_eval_pruned.sweeps.plan import OF_MODEL, Unit
from lm_eval_pruned.sweeps.tasks import fingerprint


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.config.evaluate_config import EvaluatorConfig

    from lm_eval_pruned.sweeps.plan import Configuration, Sweep

    #: A unit, the folder of its files, its seconds, and None or what it failed with.
    Ended = tuple[Unit, Path, float, dict[str, str] | None]

logger = logging.getLogger("lm_eval.pruned.sweep")
#: What a traceback says where the device failed, for which too little memory does not count.
_OF_DEVICE = r"Error: (CUDA|HIP|XPU)( driver)? error: (?!out of memory)"


#: What torch says of the machine; it asks pip and ten other programs, which takes six seconds.
_environment = functools.cache(collect_env.get_pretty_env_info)


@contextlib.contextmanager
def _asked_once() -> Iterator[None]:
    """Keep the harness from looking at the machine again for each unit.

    Nor does it ask git for a commit where there is none: git complains on the terminal.
    """
    here = Path.cwd()
    with contextlib.ExitStack() as patches:
        patch = mock.patch.object(collect_env, "get_pretty_env_info", _environment)
        patches.enter_context(patch)
        if not any((folder / ".git").exists() for folder in (here, *here.parents)):
            name = "lm_eval.evaluator.get_git_commit_hash"
            patches.enter_context(mock.patch(name, return_value=None))
        yield


class UnitRunner:
    """Evaluates units, holding one model at a time.

    `part` separates the cache files of parallel processes. Once its `device_failed`, a process
    cannot evaluate anything else.
    """

    def __init__(self, sweep: Sweep, part: str) -> None:
        self._sweep, self._part = sweep, part
        check_tracking(sweep.settings)
        self._holds: Configuration | None = None
        # The model, or what loading it raised.
        self._lm: Any = None
        self.device_failed = False

    def attempt(self, unit: Unit, folder: Path) -> tuple[float, dict[str, str] | None]:
        """Evaluate a unit and write the harness's files of it to `folder`, an empty one.

        Returns:
            Seconds the evaluation took, without loading the model; and None, or ``type``,
            ``message`` and ``traceback`` of what the unit failed with.
        """
        start = time.perf_counter()
        try:
            return self._run(unit, folder), None
        except Exception as error:
            shown = self._sweep.shows_tracebacks
            logger.error("%s / %s failed.", *unit.names, exc_info=shown)
            description = describe_error(error)
        seconds = time.perf_counter() - start
        self.device_failed = re.search(_OF_DEVICE, description["traceback"]) is not None
        if getattr(self._lm, "engine_died", False):
            self.release()
        elif not self.device_failed:
            release_memory()
        return seconds, description

    def release(self) -> None:
        """Free the model's memory."""
        getattr(self._lm, "close", lambda: None)()
        self._lm = self._holds = None
        release_memory()

    def _run(self, unit: Unit, folder: Path) -> float:
        sweep, (configuration, task) = self._sweep, unit
        manager = sweep.task_manager(configuration)
        built = task.build(manager._factory)
        # `simple_evaluate` of 0.5 takes no task, but the name of one.
        manager._load_spec = lambda *_, **__: built
        self._load(configuration)
        start, tracker = time.perf_counter(), EvaluationTracker()
        with sweep.observed(unit, self._lm, folder) as add_to:
            results = self._evaluate(configuration, manager, task.name, tracker)
            add_to(results)
        seconds = time.perf_counter() - start
        _track(" ".join(unit.names), results, sweep.settings)
        write_results(results, tracker, folder)
        return seconds

    def _load(self, configuration: Configuration) -> None:
        """Hold the model of a configuration, or raise what loading it has raised."""
        sweep = self._sweep
        if self._holds is not configuration:
            self.release()
            self._holds = configuration
            logger.info("Loading %s.", configuration.id)
            more = {name: getattr(sweep.settings, name) for name in OF_MODEL}
            try:
                kind = configuration.floor or sweep.settings.model
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

    @_asked_once()
    def _evaluate(
        self,
        configuration: Configuration,
        manager: Any,
        task: str,
        tracker: EvaluationTracker,
    ) -> Any:
        """Return the harness's results."""
        lm, sweep, settings = self._lm, self._sweep, self._sweep.settings
        # Automatic batch sizes were found for the lengths of other documents.
        lm.batch_sizes = {}
        names = (*deciding("scores"), "batch_size", "max_batch_size")
        options = {name: getattr(settings, name) for name in names}
        drawing = ("random", "numpy_random", "torch_random", "fewshot_random")
        seeds = zip(drawing, settings.seed or [None] * 4, strict=True)
        # The answers of what knows nothing cost nothing, and depend on which documents there are.
        cache = None if configuration.floor else settings.use_cache
        if cache is not None:
            # The harness's key of a response holds the request and nothing of the model.
            key = fingerprint(sweep.model_definition(configuration))[:12]
            cache += f"_{configuration.id}_{key}{self._part}"
        options |= {f"{name}_seed": seed for name, seed in seeds}
        try:
            results = lm_eval.simple_evaluate(
                model=lm,
                model_args=sweep.model_args(configuration),
                tasks=[task],
                # What it computes on, which need not be what was asked for.
                device=str(getattr(lm, "device", settings.device)),
                use_cache=cache,
                evaluation_tracker=tracker,
                task_manager=manager,
                confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
                metadata=manager.metadata,
                **options,
            )
        finally:
            if (answers := getattr(lm.cache_hook, "dbdict", None)) is not None:
                answers.close()
                lm.set_cache_hook(CacheHook(None))
        # What `lm_eval run` records where it makes the model itself.
        name, model = configuration.floor or settings.model, getattr(lm, "model", None)
        results["config"] |= {"model": name, "use_cache": cache}
        is_here = isinstance(model, torch.nn.Module)
        results["config"]["weight_bytes"] = _bytes_of(model) if is_here else None
        tracker.general_config_tracker.model_source = name
        return results


def _bytes_of(held: Any) -> int:
    """Return how many bytes a tensor, or the parameters and buffers of a model, take."""
    if isinstance(held, torch.nn.Module):
        return sum(map(_bytes_of, [*held.parameters(), *held.buffers()]))
    # A quantised tensor of torchao is made of others.
    if not hasattr(held, "__tensor_flatten__"):
        return int(held.nbytes)
    return sum(_bytes_of(getattr(held, name)) for name in held.__tensor_flatten__()[0])


def describe_error(error: BaseException) -> dict[str, str]:
    """Return type, message and traceback of `error` as text."""
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    text = "".join(traceback.format_exception(error))
    return {"type": name, "message": str(error), "traceback": text}


def check_tracking(settings: EvaluatorConfig) -> None:
    """Raise ValueError where a package is missing."""
    for package in ("wandb", "trackio"):
        if getattr(settings, f"{package}_args", {}) and find_spec(package) is None:
            raise ValueError(
                f"{package}_args was given, but {package} is not installed: run "
                f"`pip install {package}`, or leave {package}_args out."
            )


def _track(label: str, results: dict[str, Any], settings: EvaluatorConfig) -> None:
    """Make a unit one run of W&B and Trackio, by the harness's loggers; what fails here is a warning, for its files are whole."""
    for service, options, kind, *more in (
        ("W&B", settings.wandb_args, "WandbLogger", settings.wandb_config_args),
        ("Trackio", getattr(settings, "trackio_args", {}), "TrackioLogger"),
    ):
        if not options:
            continue
        name = f"{options['name']} {label}" if options.get("name") else label
        try:
            # They change what they are given.
            run: Any = getattr(loggers, kind)(
                {**options, "name": name}, *map(dict, more)
            )
            run.post_init({k: v for k, v in results.items() if k != "samples"})
            run.log_eval_result()
            if "samples" in results:
                run.log_eval_samples(results["samples"])
            (run if service == "Trackio" else run.run).finish()
        except Exception as error:  # noqa: BLE001
            what = f"{type(error).__name__}: {error}"
            logger.warning("%s was not logged to %s: %s", label, service, what)
