"""One unit of a sweep: evaluating it with the model at hand, and keeping what came of it."""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import logging
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from lm_eval_pruned.compare.stopping import LEVEL
from lm_eval_pruned.results.files import read_results_file
from lm_eval_pruned.results.folder import ERROR, error_text
from lm_eval_pruned.results.stopping_record import Stopping
from lm_eval_pruned.sweeps.fingerprints import fingerprint
from lm_eval_pruned.sweeps.folder import SweepFolder, own_scores
from lm_eval_pruned.sweeps.options import deciding
from lm_eval_pruned.sweeps.stopping import (
    check_tasks,
    documents_of_looks,
    evaluate_until_decided,
)
from lm_eval_pruned.sweeps.tasks import load_task


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval.api.model import LM
    from lm_eval.loggers import EvaluationTracker

    from lm_eval_pruned.pruning.measuring import KnownScores
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.sweeps.configurations import Configuration
    from lm_eval_pruned.sweeps.plan import Sweep
    from lm_eval_pruned.sweeps.tasks import SweepTask

    Unit = tuple[Configuration, SweepTask]


logger = logging.getLogger("lm_eval.pruned.sweep")


@dataclass(frozen=True)
class Outcome:
    """How one unit ended.

    Attributes:
        unit: Configuration and task.
        seconds: Time the evaluation took, without loading the model.
        scores: The unit's own metrics; empty after a failure.
        error: None, or ``type``, ``message`` and ``traceback`` of the failure.
    """

    unit: Unit
    seconds: float
    scores: dict[str, float]
    error: dict[str, str] | None


class UnitRunner:
    """Evaluates units, holding one model at a time, and the scores of all neurons.

    Args:
        sweep: The plan.
        part: Distinguishes the cache files of processes that run side by side.

    Attributes:
        holds: Id of the configuration whose model is loaded, or None.
    """

    def __init__(self, sweep: Sweep, part: str = "") -> None:
        self._sweep = sweep
        self._part = part
        self._lm: LM | None = None
        self._known_scores: KnownScores = {}
        self._load_error: tuple[Exception, Any] | None = None
        self.holds: str | None = None

    def run(
        self,
        configuration: Configuration,
        task: SweepTask,
        folder: Path,
        base: Callable[[SweepTask], Run] | None = None,
    ) -> float:
        """Evaluate one unit and write the harness's files of it to `folder`.

        Args:
            configuration: The model.
            task: The task.
            folder: An empty one.
            base: Reads the unpruned model's results on a task, for a unit that may stop early.

        Returns:
            Seconds the evaluation took, without loading the model.

        Raises:
            Exception: Whatever loading or evaluating raised.
        """
        loaded: dict[str, Any] = {}
        if self._sweep.stop_when is not None:
            manager = self._sweep.task_manager(configuration)
            loaded = manager.load(load_task(manager, task))  # type: ignore[assignment]
            # Those of the unpruned model, too, for which all sizes wait.
            check_tasks(self._sweep.stop_when, loaded["tasks"], self._sweep.settings)
        compared = base(task) if base is not None else None
        lm = self._model(configuration)
        tracking = self._sweep.tracking
        with tracking.unit(configuration.id, task.name, lm.rank) as log:
            start = time.perf_counter()
            try:
                # The tracker writes beside a path that ends in .json; the folder comes later.
                tracker = tracking.hub_tracker(lm.rank)
                if compared is None:
                    tasks = load_task(self._sweep.task_manager(configuration), task)
                    results = self._evaluate(lm, configuration, tasks, tracker)
                else:
                    results = self._until_decided(
                        lm, configuration, loaded, compared, tracker, folder.parent
                    )
                if results is not None:
                    tracking.name_on_the_hub(tracker, configuration.id)
                    log(results)
                    _write(results, tracker, folder)
                    tracking.describe_on_the_hub(tracker)
            except Exception:
                # An engine that died answers nobody: the next unit starts another.
                if getattr(lm, "engine_died", False):
                    self.release()
                raise
            return time.perf_counter() - start

    def release(self) -> None:
        """Free the model's memory."""
        close = getattr(self._lm, "close", None)
        if close is not None:
            close()
        self._lm = self.holds = self._load_error = None
        from accelerate.utils import release_memory

        release_memory()

    def _model(self, configuration: Configuration) -> LM:
        if self.holds != configuration.id:
            self.release()
            from accelerate.utils import release_memory
            from lm_eval.api.registry import get_model

            self.holds = configuration.id
            settings = self._sweep.settings
            logger.info("Loading %s.", configuration.id)
            try:
                if configuration.healed:
                    self._sweep.heal(configuration)
                    release_memory()
                self._lm = get_model(self._sweep.model).create_from_arg_obj(
                    self._sweep.model_args(configuration),
                    {
                        "batch_size": settings.batch_size,
                        "max_batch_size": settings.max_batch_size,
                        "device": settings.device,
                        "known_scores": self._known_scores,
                    },
                )
            except Exception as error:  # noqa: BLE001
                # The frames of the traceback keep what was loaded so far.
                traceback.clear_frames(error.__traceback__)
                self._load_error = error, error.__traceback__
        if self._load_error is not None:
            failure, frames = self._load_error
            raise failure.with_traceback(frames)
        assert self._lm is not None
        # The results of a unit are of that unit alone.
        self._lm.begin_evaluation()  # type: ignore[attr-defined]
        return self._lm

    def _until_decided(
        self,
        lm: LM,
        configuration: Configuration,
        loaded: dict[str, Any],
        base: Run,
        tracker: EvaluationTracker,
        scratch: Path,
    ) -> dict[str, Any]:
        sweep = self._sweep
        tasks = list(loaded["groups"].values())[:1] or list(loaded["tasks"].values())
        name = tasks[0].name if loaded["groups"] else next(iter(loaded["tasks"]))
        looks = documents_of_looks(loaded["tasks"], sweep.settings)
        assert sweep.stop_when is not None
        sizes = len(sweep.configurations) - 1
        stopping = Stopping(sweep.stop_when, name, max(looks), LEVEL, sizes)
        evaluate = functools.partial(self._evaluate, lm, configuration, tasks, tracker)
        return evaluate_until_decided(
            lm, looks, stopping, base, evaluate, _write_look, scratch
        )

    def _evaluate(
        self,
        lm: LM,
        configuration: Configuration,
        tasks: list[Any],
        tracker: EvaluationTracker,
        chosen: dict[str, list[int]] | None = None,
        cache: str | None = None,
    ) -> dict[str, Any] | None:
        """Return the harness's results.

        Args:
            lm: The model.
            configuration: What it is.
            tasks: The harness's objects or names of them.
            tracker: What the harness notes its settings in.
            chosen: Indices of documents by task, in place of those that the sweep asks for.
            cache: Prefix of a cache, where the sweep has none.
        """
        from lm_eval import simple_evaluate

        settings = self._sweep.settings
        # Automatic batch sizes were found for the lengths of other documents.
        if hasattr(lm, "batch_sizes"):
            lm.batch_sizes = {}
        options = {name: getattr(settings, name) for name in deciding("scores")}
        if chosen is not None:
            options |= {"limit": None, "samples": chosen}
        seed = settings.seed or [None] * 4
        own_cache = self._cache(configuration)
        try:
            with _quiet_git():
                results = simple_evaluate(
                    model=lm,
                    model_args=self._sweep.model_args(configuration),
                    tasks=tasks,
                    **options,
                    batch_size=settings.batch_size,
                    max_batch_size=settings.max_batch_size,
                    # What it computes on, which need not be what was asked for.
                    device=str(getattr(lm, "device", settings.device)),
                    use_cache=own_cache or cache,
                    evaluation_tracker=tracker,
                    task_manager=self._sweep.task_manager(configuration),
                    random_seed=seed[0],
                    numpy_random_seed=seed[1],
                    torch_random_seed=seed[2],
                    fewshot_random_seed=seed[3],
                    confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
                    metadata=self._sweep.metadata(configuration),
                )
        finally:
            self._drop_cache(lm)
        if results is not None:
            # What `lm_eval run` records where it makes the model itself.
            results["config"] |= {"model": self._sweep.model, "use_cache": own_cache}
            tracker.general_config_tracker.model_source = self._sweep.model
        return results

    def _cache(self, configuration: Configuration) -> str | None:
        """Return a cache that no other model and no other process shares.

        The harness's key of a response holds the request and nothing of the model.
        """
        prefix = self._sweep.settings.use_cache
        if prefix is None:
            return None
        model = fingerprint(self._sweep.model_definition(configuration))[:12]
        return f"{prefix}_{configuration.id}_{model}{self._part}"

    @staticmethod
    def _drop_cache(lm: LM) -> None:
        from lm_eval.api.model import CacheHook

        cache = getattr(getattr(lm, "cache_hook", None), "dbdict", None)
        if cache is not None:
            cache.close()
            lm.set_cache_hook(CacheHook(None))


class Store:
    """Keeps outcomes in the sweep's folder, all of them in one way."""

    def __init__(
        self, sweep: Sweep, folder: SweepFolder, prints: dict[tuple[str, str], str]
    ) -> None:
        self._sweep = sweep
        self._folder = folder
        self._prints = prints
        self.new_unit = folder.new_unit

    def base(self, task: SweepTask) -> Run:
        """Return the unpruned model's results on a task.

        Raises:
            ValueError: There are none of this definition.
        """
        base = self._sweep.baseline
        record = self._folder.read(base.id, task.name)
        definition = fingerprint(self._sweep.definition(base, task))
        if record is None or record.fingerprint != definition or record.results is None:
            raise ValueError(
                f"{task.name} has no results of the unpruned model to compare with in "
                f"{self._folder.path}: evaluate {base.id} first, and then use --retry_failed."
            )
        return read_results_file(record.results)

    def keep(
        self,
        unit: Unit,
        files: Path,
        seconds: float,
        error: dict[str, str] | None = None,
    ) -> Outcome:
        """Put a unit into its place.

        Args:
            unit: Configuration and task.
            files: Folder from `new_unit`, with the harness's files.
            seconds: Time the evaluation took.
            error: What the unit failed with, from `describe_error`; `files` is then
                emptied.
        """
        scores: dict[str, float] = {}
        if error is None:
            (results,) = files.glob("results_*.json")
            scores = own_scores(json.loads(results.read_text(encoding="utf-8")))
        else:
            for file in files.iterdir():
                file.unlink()
            (files / ERROR).write_text(error_text(error), encoding="utf-8")
        configuration, task = unit
        self._folder.commit(
            files,
            configuration.id,
            task.name,
            {
                "configuration": configuration.id,
                "task": task.name,
                "fingerprint": self._prints[unit_key(unit)],
                "seconds": round(seconds, 3),
                "definition": self._sweep.definition(configuration, task),
            },
        )
        return Outcome(unit, seconds, scores, error)


def describe_error(error: BaseException) -> dict[str, str]:
    """Return type, message and traceback of `error` as text."""
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ != "builtins":
        name = f"{kind.__module__}.{name}"
    return {
        "type": name,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def _quiet_git() -> contextlib.AbstractContextManager[Any]:
    """Have the harness ask git for a commit only where there is a repository to ask about."""
    here = Path.cwd()
    if any((place / ".git").exists() for place in (here, *here.parents)):
        return contextlib.nullcontext()
    return mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None)


def part_name(shard: tuple[int, int] | None) -> str:
    """Return what tells the cache files of a shard from those of another."""
    return f"_shard{shard[0]}of{shard[1]}" if shard else ""


def _write_look(results: dict[str, Any], folder: Path) -> None:
    from lm_eval.loggers import EvaluationTracker

    _write(results, EvaluationTracker(), folder)


def _write(results: dict[str, Any], tracker: Any, folder: Path) -> None:
    """Let the harness write its files, and make sure that it did.

    Raises:
        OSError: A file is missing or cut short; the harness only logs that.
    """
    samples = results.pop("samples", None)
    tracker.output_path = str(folder / "results.json")
    tracker.save_results_aggregated(results=results, samples=samples)
    written = list(folder.glob("results_*.json"))
    try:
        json.loads(written[0].read_text(encoding="utf-8"))
    except (IndexError, ValueError):
        raise OSError(
            f"the results could not be written to {folder}: is the disk full?"
        ) from None
    for name in results["configs"] if samples is not None else ():
        tracker.save_results_samples(task_name=name, samples=samples[name])
        lines = 0
        for file in folder.glob(f"samples_{glob.escape(name)}_*.jsonl"):
            with open(file, "rb") as content:
                lines += sum(line.endswith(b"\n") for line in content)
        if lines != len(samples[name]):
            raise OSError(
                f"{lines} of {len(samples[name])} samples of {name} were written to {folder}: "
                "is the disk full?"
            )


def unit_key(unit: Unit) -> tuple[str, str]:
    """Return the ids of a unit's configuration and task."""
    return unit[0].id, unit[1].name
