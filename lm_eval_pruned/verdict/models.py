"""The two models of a verdict: finished results, or evaluated here, each as a sweep of one model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison import read_comparands
from lm_eval_pruned.compare.pairing import DocumentReader
from lm_eval_pruned.results.documents import CHOICE_PROB
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.runs import is_sweep, read_failures, read_sweep
from lm_eval_pruned.sweeps.checks import check_model
from lm_eval_pruned.sweeps.options import read_mapping
from lm_eval_pruned.sweeps.plan import FLOORS, Configuration, Sweep, harness_settings
from lm_eval_pruned.sweeps.run import run_sweep
from lm_eval_pruned.verdict.decision import (
    check_margins,
    check_measure,
    judged_scores,
    measured,
)


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: What evaluates each model type: ``hf-prefix`` is ``hf`` that computes shared prefixes once.
TYPES = {"hf": "hf-prefix"}
TYPES |= {name: name for name in ("hf-prefix", "pruned-hf", "vllm", "pruned-vllm")}
#: Where neither the user nor a finished base names tasks.
TASKS = ["pruned_demo", "pruned_demo_bias"]


def plan_model(name: str, text: str, options: Mapping[str, Any]) -> Sweep:
    """Plan a sweep of one model of `TYPES`, specified as ``TYPE,key=value,...``.

    Raises:
        ValueError: The model, an option or a task cannot be used.
    """
    kind, _, arguments = text.partition(",")
    if kind not in TYPES:
        raise ValueError(
            f"The {name} {text} is neither a path of results nor a model: pass a folder, or a "
            f"model type ({', '.join(TYPES)}) with its arguments, such as hf,pretrained=NAME."
        )
    model = TYPES[kind]
    model_args = read_mapping(arguments, f"The {name} {text}") if arguments else {}
    if model == "hf-prefix" and "quantization_config" in model_args:
        # HFLM passes what its config says under this name, and would pass ours beside it.
        model = "pruned-hf"
    # Refused here, not once the base has been evaluated.
    check_model(model, model_args, f"The {name} {text}")
    which = {"model": model, "model_args": model_args, "log_samples": True}
    # The base's tell what knowing nothing gives; the candidate answers the same documents.
    has_floors = name == "base" and options.get("floors", True)
    return Sweep(
        options={**options, **which},
        settings=harness_settings({**options, **which}, model, model_args),
        configurations=[Configuration(name, {})],
        floors=FLOORS if has_floors else (),
        # A verdict is on the tasks that were asked for.
        keeps_earlier=False,
        # The last line of a verdict gives the reason.
        shows_tracebacks=False,
    )


def both_runs(
    base: str,
    candidate: str,
    options: Mapping[str, Any],
    output_path: Path,
    margins: Sequence[str] = (),
    measure: str | None = None,
    read: DocumentReader | None = None,
) -> tuple[Run, Run, Sequence[Run]]:
    """Return the results of both models and of models that know nothing, each a path of results or as `plan_model` takes it.

    What is not finished is evaluated, each model into a sweep folder of `output_path`, once the
    `margins` and the `measure` are known to suit the tasks. `read` keeps what it reads of a finished
    base.

    Raises:
        ValueError: A model, an option, a margin or a task cannot be used, or results cannot be read.
        KeyboardInterrupt: Someone stopped the evaluation.
    """
    settings = {"tasks": TASKS, **options}
    paths = {"base": base, "candidate": candidate}
    scored: Mapping[str, Mapping[str, Sequence[float]]] = {}
    if Path(base).exists():
        finished, _ = read_comparands([_results_of(base)] * 2)
        settings = {"tasks": finished.tasks(subtasks=False), **options}
        finished = measured(finished, read or DocumentReader())
        check_measure(measure, (metric for _, metric in finished.scores))
        scored = judged_scores(finished, measure=measure)
    where = {name: str(output_path / name) for name in paths}
    # Both are planned first, so that a mistake in one is told before the other is evaluated.
    planned = {
        name: plan_model(name, text, {**settings, "output_path": where[name]})
        for name, text in paths.items()
        if not Path(text).exists()
    }
    if "base" in planned:
        tasks = planned["base"].tasks
        scored = {
            task.name: dict.fromkeys(
                [*task.metrics, *[CHOICE_PROB] * bool(task.metrics)], ()
            )
            for task in tasks
        }
        check_measure(measure, itertools.chain(*scored.values()))
    check_margins(margins, scored)
    for name, sweep in planned.items():
        print(f"The {name}: {paths[name]}", flush=True)
        if run_sweep(sweep, retry_failed=True) == 130:
            raise KeyboardInterrupt
        for failure in read_failures(where[name]):
            raise ResultsError(
                f"{failure.task} failed on the {name} {paths[name]} ({failure.message}): repeat "
                "the command to try it again; finished tasks are not evaluated again."
            )
        paths[name] = where[name]
    floors = read_sweep(paths["base"]).floors if is_sweep(paths["base"]) else ()
    base_run, runs = read_comparands([*map(_results_of, paths.values())])
    runs = [run for run in runs if not run.is_floor]
    if not runs:
        raise ResultsError(
            f"The candidate {candidate} is a model that knows nothing, which shows the floor of each "
            "task: pass results of the model that you may ship."
        )
    if len(runs) != 1:
        raise ResultsError(
            f"The candidate {candidate} is a sweep of {len(runs)} pruned models: name one of them, "
            f"such as {candidate}/units/{runs[0].name}."
        )
    return base_run, runs[0], floors


def _results_of(path: str) -> str:
    """Return the folder of the only model in a sweep folder; another path as it is."""
    runs = read_sweep(path).runs if is_sweep(path) else ()
    return str(runs[0].path) if len(runs) == 1 else path
