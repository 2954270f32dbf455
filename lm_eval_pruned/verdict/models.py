"""The two models of a verdict: finished results, or evaluated here, each as a sweep of one model."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.comparison import read_comparands
from lm_eval_pruned.compare.margins import check_measure, with_choice_prob
from lm_eval_pruned.compare.pairing import DocumentReader
from lm_eval_pruned.results.documents import CHOICE_PROB, KL
from lm_eval_pruned.results.files import ResultsError, Run
from lm_eval_pruned.results.runs import is_sweep, read_failures, read_sweep
from lm_eval_pruned.sweeps.checks import check_model
from lm_eval_pruned.sweeps.options import read_mapping
from lm_eval_pruned.sweeps.plan import FLOORS, Configuration, harness_settings
from lm_eval_pruned.sweeps.run import run_sweep
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.verdict.decision import (
    check_margins,
    judged_scores,
    read_margins,
)
from lm_eval_pruned.verdict.divergence import (
    DEMO_TEXT,
    NOT_MEASURED,
    OF_FILE,
    TEXTS,
    WatchingSweep,
)


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: What evaluates each model type: ``hf-prefix`` is ``hf`` that computes shared prefixes once.
TYPES = {"hf": "hf-prefix"}
TYPES |= {name: name for name in ("hf-prefix", "pruned-hf", "vllm", "pruned-vllm")}
#: Where neither the user nor a finished base names tasks.
TASKS = ["pruned_demo", "pruned_demo_bias"]


def plan_model(name: str, text: str, options: Mapping[str, Any]) -> WatchingSweep:
    """Plan a sweep of one model of `TYPES`, specified as ``TYPE,key=value,...``.

    Raises:
        ValueError: The model, an option or a task cannot be used.
    """
    kind, _, given = text.partition(",")
    if kind not in TYPES:
        raise ValueError(
            f"The {name} {text} is neither a path of results nor a model: pass a folder, or a "
            f"model type ({', '.join(TYPES)}) with its arguments, such as hf,pretrained=NAME."
        )
    model = TYPES[kind]
    model_args = read_mapping(given, f"The {name} {text}") if given else {}
    if model == "hf-prefix" and "quantization_config" in model_args:
        # HFLM passes what its config says under this name, and would pass ours beside it.
        model = "pruned-hf"
    # Refused here, not once the base has been evaluated.
    check_model(model, model_args, f"The {name} {text}")
    which = {"model": model, "model_args": model_args, "log_samples": True}
    # The base's tell what knowing nothing gives; the candidate answers the same documents.
    has_floors = name == "base" and options.get("floors", True)
    return WatchingSweep(
        options={**options, **which},
        settings=harness_settings({**options, **which}, model, model_args),
        configurations=[Configuration(name, {})],
        floors=FLOORS if has_floors else (),
        # A verdict is on the tasks that were asked for.
        keeps_earlier=False,
        # The last line of a verdict gives the reason.
        shows_tracebacks=False,
    )


def text_task(file: str, folder: Path) -> str:
    """Write a task on the text of a file into a folder; return the task's path.

    Raises:
        ValueError: The file cannot be read as text.
    """
    try:
        content = Path(file).read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"--text {file} cannot be read as text in UTF-8 ({error}): pass a file of plain text."
        ) from None
    if not content.strip():
        raise ValueError(f"--text {file} is empty: pass a file of plain text.")
    of_demo = files("lm_eval_pruned.tasks") / "demo" / f"{DEMO_TEXT}.yaml"
    digest = hashlib.sha256(content.encode()).hexdigest()
    about = {"version": 1.0, "family": "language_modeling", "sha256": digest}
    about["text_file"] = str(Path(file).resolve())
    task = {"include": str(of_demo), "task": OF_FILE, "metadata": about}
    place = folder / f"{OF_FILE}.yaml"
    # JSON is YAML.
    write_atomically(place, json.dumps(task, indent=2) + "\n")
    return str(place)


def both_runs(
    base: str,
    candidate: str,
    options: Mapping[str, Any],
    output_path: Path,
    margins: Sequence[str] = (),
    measure: str | None = None,
    read: DocumentReader | None = None,
    text: str | None = None,
) -> tuple[Run, Run, Sequence[Run]]:
    """Return the results of both models and of models that know nothing, each a path of results or as `plan_model` takes it.

    What is not finished is evaluated, each model into a sweep folder of `output_path`, once the
    `margins` and the `measure` are known to suit the tasks. `read` keeps what it reads of a finished
    base. The text of the file `text` takes the place of the demo's.

    Raises:
        ValueError: A model, an option, a margin or a task cannot be used, or results cannot be read.
        KeyboardInterrupt: Someone stopped the evaluation.
    """
    given = {"base": base, "candidate": candidate}
    finished_ones = [path for path in given.values() if Path(path).exists()]
    of_text = DEMO_TEXT
    if text is not None:
        if finished_ones:
            raise ValueError(
                f"--text {text} cannot be read by {finished_ones[0]}, which is finished results: pass "
                "two models."
            )
        of_text = text_task(text, output_path)
    asked = {"tasks": [*TASKS, of_text], **options}
    if text is not None and "tasks" in options:
        asked["tasks"] = [*options["tasks"], of_text]
    scored: Mapping[str, Mapping[str, Sequence[float]]] = {}
    if Path(base).exists():
        finished, _ = read_comparands([_results_of(base)] * 2)
        asked = {"tasks": finished.tasks(subtasks=False), **options}
        finished = with_choice_prob(finished, read or DocumentReader())
        check_measure(measure, (metric for _, metric in finished.scores))
        scored = judged_scores(finished, measure=measure, margins=margins)
    where = {name: str(output_path / name) for name in given}
    # Both are planned first, so that a mistake in one is told before the other is evaluated.
    planned = {
        name: plan_model(name, model, {**asked, "output_path": where[name]})
        for name, model in given.items()
        if not Path(model).exists()
    }
    if len(planned) == 2:
        planned["candidate"].base = planned["base"]
    if "base" in planned:
        tasks = planned["base"].tasks
        scored = {
            each.name: dict.fromkeys(
                [
                    *each.metrics,
                    *[CHOICE_PROB] * bool(each.metrics),
                    *[KL] * (each.name in TEXTS),
                ],
                (),
            )
            for each in tasks
        }
        check_measure(measure, itertools.chain(*scored.values()))
    check_margins(margins, scored)
    for name, sweep in planned.items():
        print(f"The {name}: {given[name]}", flush=True)
        if run_sweep(sweep, retry_failed=True) == 130:
            raise KeyboardInterrupt
        for failure in read_failures(where[name]):
            raise ResultsError(
                f"{failure.task} failed on the {name} {given[name]} ({failure.message}): repeat "
                "the command to try it again; finished tasks are not evaluated again."
            )
        given[name] = where[name]
    floors = read_sweep(given["base"]).floors if is_sweep(given["base"]) else ()
    found, runs = read_comparands([*map(_results_of, given.values())])
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
    run = runs[0]
    if why := _not_measured(found, run, bool(finished_ones)):
        note = f"The divergence from the base (KL) was not measured, because {why}."
        if KL.partition(",")[0] in read_margins(margins):
            raise ResultsError(f"{note[:-1]}: leave out its margin.")
        run = replace(run, notes=(*run.notes, note))
    return found, run, floors


def _not_measured(base: Run, candidate: Run, finished: bool) -> str:
    """Return why text was evaluated without a divergence from the base; empty where it was not, or with one."""
    texts = [task for task in TEXTS if (task, KL) not in candidate.scores]
    if not {*texts} & {*base.tasks()} & {*candidate.tasks()}:
        return ""
    told = [run.config.get(NOT_MEASURED) for run in (base, candidate)]
    usual = (
        "one of the two is finished results"
        if finished
        else "the base has no samples of it"
    )
    return next(filter(None, told), usual)


def _results_of(path: str) -> str:
    """Return the folder of the only model in a sweep folder; another path as it is."""
    runs = read_sweep(path).runs if is_sweep(path) else ()
    return str(runs[0].path) if len(runs) == 1 else path
