"""``lm-eval-pruned sweep``: many configurations by many tasks, each result kept at once.

`sweep_plan` says which units there are, `sweep_folder` keeps them, this module
runs those that are missing: here, or through `sweep_ray` on a cluster.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import json
import logging
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.scores import KnownScores
from lm_eval_pruned.sweeps.folder import SweepFolder, own_scores
from lm_eval_pruned.sweeps.plan import MODEL, Sweep, fingerprint, load_task
from lm_eval_pruned.sweeps.ranks import Ranks
from lm_eval_pruned.util.progress import Progress


if TYPE_CHECKING:
    from collections.abc import Generator

    from lm_eval.api.model import LM

    from lm_eval_pruned.sweeps.plan import Configuration, SweepTask

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


def run_sweep(
    options: dict[str, Any],
    *,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> int:
    """Run the units of a sweep that its folder does not hold yet.

    Args:
        options: From `sweep_options.read_options`.
        shard: ``(I, N)`` to run part I of N.
        retry_failed: Whether units that failed before run again.
        dry_run: Print the plan; evaluate and write nothing.

    Returns:
        Exit code: 0 where every unit of this sweep (or shard) is done, 1 where one
        failed, 130 after Ctrl-C.

    Raises:
        ValueError: The sweep cannot be planned, or its folder is in use.
        OSError: The model's config or the folder cannot be read or written.
    """
    sweep = Sweep(options)
    folder = SweepFolder(options["output_path"], shard)
    units = sweep.units(shard)
    prints = {
        _key(unit): fingerprint(sweep.definition(*unit))  # type: ignore[arg-type]
        for unit in units
    }
    if dry_run:
        print(_plan_table(sweep, units, folder, prints), end="")
        return 0
    ranks = Ranks()
    if not ranks.main:
        return _follow(sweep, units, ranks, shard)
    with folder.locked():
        folder.write_definition(sweep.as_dict())
        done, failed, waiting = _sort(units, folder, prints, retry_failed)
        store = Store(sweep, folder, prints)
        with contextlib.closing(
            Progress(
                len(done),
                len(failed),
                [task.name for _, task in waiting],
                [(task.name, seconds) for (_, task), seconds in done],
            )
        ) as progress:
            if options.get("ray"):
                from lm_eval_pruned.sweeps.ray import run_on_ray

                outcomes = run_on_ray(sweep, waiting, store, progress, shard)
            else:
                outcomes = _run_here(sweep, waiting, store, progress, shard, ranks)
            try:
                for outcome in outcomes:
                    configuration, task = outcome.unit
                    progress.finish(
                        configuration.id,
                        task.name,
                        outcome.seconds,
                        outcome.scores,
                        outcome.error,
                    )
            except KeyboardInterrupt:
                outcomes.close()
                print(
                    f"Stopped: {progress.done} of {len(units)} units are done. The same "
                    "command goes on from here."
                )
                return 130
    if progress.failed:
        print(
            f"{progress.failed} of {len(units)} units failed; error.json in their folders "
            f"below {folder.path / 'units'} says why, --retry_failed tries them again."
        )
    return 1 if progress.failed else 0


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
        self._known = KnownScores()
        self._load_error: tuple[Exception, Any] | None = None
        self.holds: str | None = None

    def run(self, configuration: Configuration, task: SweepTask, folder: Path) -> float:
        """Evaluate one unit and write the harness's files of it to `folder`.

        Returns:
            Seconds the evaluation took, without loading the model.

        Raises:
            Exception: Whatever loading or evaluating raised.
        """
        lm = self._model(configuration)
        start = time.perf_counter()
        try:
            results, tracker = self._evaluate(lm, configuration, task)
        finally:
            self._drop_cache(lm)
        if results is not None:
            _write(results, tracker, folder)
        return time.perf_counter() - start

    def release(self) -> None:
        """Free the model's memory."""
        self._lm = self.holds = self._load_error = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _model(self, configuration: Configuration) -> LM:
        if self.holds != configuration.id:
            self.release()
            from lm_eval.api.registry import get_model

            self.holds = configuration.id
            settings = self._sweep.settings
            logger.info("Loading %s.", configuration.id)
            try:
                with self._known.in_use():
                    self._lm = get_model(MODEL).create_from_arg_obj(
                        self._sweep.model_args(configuration),
                        {
                            "batch_size": settings.batch_size,
                            "max_batch_size": settings.max_batch_size,
                            "device": settings.device,
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
        # Automatic batch sizes were found for the lengths of another task.
        if hasattr(self._lm, "batch_sizes"):
            self._lm.batch_sizes = {}
        # The results of a unit are of that unit alone.
        self._lm.begin_evaluation()  # type: ignore[attr-defined]
        return self._lm

    def _evaluate(self, lm: LM, configuration: Configuration, task: SweepTask):
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        settings = self._sweep.settings
        model_args = self._sweep.model_args(configuration)
        manager = self._sweep.task_manager(configuration)
        # The tracker writes beside a path that ends in .json; the folder comes later.
        tracker = EvaluationTracker()
        seed = settings.seed or [None] * 4
        results = simple_evaluate(
            model=lm,
            model_args=model_args,
            tasks=load_task(manager, task),
            num_fewshot=settings.num_fewshot,
            batch_size=settings.batch_size,
            max_batch_size=settings.max_batch_size,
            device=settings.device,
            use_cache=self._cache(configuration),
            limit=settings.limit,
            samples=settings.samples,
            log_samples=settings.log_samples,
            evaluation_tracker=tracker,
            system_instruction=settings.system_instruction,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.fewshot_as_multiturn,
            gen_kwargs=settings.gen_kwargs,
            task_manager=manager,
            predict_only=settings.predict_only,
            random_seed=seed[0],
            numpy_random_seed=seed[1],
            torch_random_seed=seed[2],
            fewshot_random_seed=seed[3],
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            metadata=self._sweep.metadata(configuration),
        )
        if results is not None:
            # What `lm_eval run` records where it makes the model itself.
            results["config"]["model"] = MODEL
            tracker.general_config_tracker.model_source = MODEL
        return results, tracker

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
            (files / "error.json").write_text(
                json.dumps(error, indent=2, ensure_ascii=False) + "\n",
                encoding="utf-8",
            )
        configuration, task = unit
        self._folder.commit(
            files,
            configuration.id,
            task.name,
            {
                "configuration": configuration.id,
                "task": task.name,
                "fingerprint": self._prints[_key(unit)],
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


def _run_here(
    sweep: Sweep,
    waiting: list[Unit],
    store: Store,
    progress: Progress,
    shard: tuple[int, int] | None,
    ranks: Ranks,
) -> Generator[Outcome]:
    runner = UnitRunner(sweep, part_name(shard))
    ranks.from_main([_key(unit) for unit in waiting])
    for unit in waiting:
        configuration, task = unit
        progress.start(configuration.id, task.name)
        with store.new_unit() as files:
            seconds, error = _attempt(runner, unit, files, ranks)
            outcome = store.keep(unit, files, seconds, error)
        yield outcome
    runner.release()


def _follow(
    sweep: Sweep, units: list[Unit], ranks: Ranks, shard: tuple[int, int] | None
) -> int:
    """Take part in the units of the main process; it keeps and reports them."""
    runner = UnitRunner(sweep, part_name(shard))
    by_key = {_key(unit): unit for unit in units}
    waiting: list[tuple[str, str]] = ranks.from_main([])
    for key in waiting:
        with tempfile.TemporaryDirectory() as nothing:
            _attempt(runner, by_key[key], Path(nothing), ranks)
    return 0


def _attempt(
    runner: UnitRunner, unit: Unit, files: Path, ranks: Ranks
) -> tuple[float, dict[str, str] | None]:
    """Return the seconds a unit took, and None or the error it failed with."""
    error = None
    start = time.perf_counter()
    seconds = None
    try:
        seconds = runner.run(*unit, files)
    except Exception as failure:
        logger.exception("%s / %s failed.", *_key(unit))
        error = describe_error(failure)
    error = ranks.first_error(error)
    if error is not None:
        _free_memory()
    return time.perf_counter() - start if seconds is None else seconds, error


def part_name(shard: tuple[int, int] | None) -> str:
    """Return what tells the cache files of a shard from those of another."""
    return f"_shard{shard[0]}of{shard[1]}" if shard else ""


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


def _free_memory() -> None:
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _key(unit: Unit) -> tuple[str, str]:
    return unit[0].id, unit[1].name


def _sort(
    units: list[Unit],
    folder: SweepFolder,
    prints: dict[tuple[str, str], str],
    retry_failed: bool,
) -> tuple[list[tuple[Unit, float]], list[Unit], list[Unit]]:
    """Return units that are done (with their seconds), that failed, and that are to run."""
    done, failed, waiting = [], [], []
    for unit in units:
        record = folder.read(unit[0].id, unit[1].name)
        if record is None or record.fingerprint != prints[_key(unit)]:
            waiting.append(unit)
        elif record.error is None:
            done.append((unit, record.seconds))
        elif retry_failed:
            waiting.append(unit)
        else:
            failed.append(unit)
    return done, failed, waiting


def _plan_table(
    sweep: Sweep,
    units: list[Unit],
    folder: SweepFolder,
    prints: dict[tuple[str, str], str],
) -> str:
    done, failed, waiting = _sort(units, folder, prints, retry_failed=False)
    lines = [
        "|configuration|kept width|expansion ratio|parameters|reduction|done|failed|to run|",
        "|-------------|---------:|--------------:|---------:|--------:|---:|-----:|-----:|",
    ]
    for each in sweep.configurations:
        counts = [
            sum(configuration.id == each.id for configuration, _ in part)
            for part in ([unit for unit, _ in done], failed, waiting)
        ]
        lines.append(
            f"|{each.id}|{each.kept_width:,}|{each.expansion_ratio:.4f}|{each.parameters:,}"
            f"|{each.reduction:.2%}|{counts[0]}|{counts[1]}|{counts[2]}|"
        )
    lines += [
        "",
        f"Tasks: {', '.join(task.name for task in sweep.tasks)}",
    ]
    lines.append(
        f"Units: {len(units)}, {len(done)} done, {len(failed)} failed, "
        f"{len(waiting)} to run, in {folder.path}"
    )
    return "\n".join(lines) + "\n"
