"""The two models of a verdict: finished results, or evaluated here, each as a sweep of one model."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.registry import model_registry
from transformers import PretrainedConfig

from lm_eval_pruned.compare.margins import (
    check_measure,
    judged_keys,
    with_choice_prob,
)
from lm_eval_pruned.results.documents import CHOICE_PROB, KL
from lm_eval_pruned.results.files import (
    SERVED_WITH,
    ResultsError,
    Run,
    newest_first,
)
from lm_eval_pruned.results.runs import (
    is_sweep,
    read_failures,
    read_run,
    read_sweep,
    setting_of,
)
from lm_eval_pruned.sweeps.checks import check_model
from lm_eval_pruned.sweeps.options import SweepOptions, read_mapping
from lm_eval_pruned.sweeps.plan import (
    FLOORS,
    OF_MODEL,
    Configuration,
    harness_settings,
    model_source,
)
from lm_eval_pruned.sweeps.run import run_sweep
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.verdict.decision import check_margins
from lm_eval_pruned.verdict.divergence import (
    DEMO_TEXT,
    KINDS,
    LONG_TEXT,
    NOT_MEASURED,
    OF_FILE,
    TEXTS,
)
from lm_eval_pruned.verdict.watching import WatchingSweep
from lm_eval_pruned.verdict.written import ENDINGS, WRITTEN


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.sweeps.plan import Sweep
    from lm_eval_pruned.sweeps.tasks import SweepTask

#: What evaluates each model type: ``hf-prefix`` is ``hf`` that computes shared prefixes once.
TYPES = {"hf": "hf-prefix"}
TYPES |= {name: name for name in ("hf-prefix", "pruned-hf", "vllm", "pruned-vllm")}
#: Arguments that quantise a model while it loads, which `pruned-hf` takes and the harness's ``hf`` does not.
QUANTISING = {"quantization_config", "load_in_8bit", "load_in_4bit"}
#: Where neither the user nor finished results name tasks.
TASKS = ["pruned_demo", "pruned_demo_bias", WRITTEN, KINDS, LONG_TEXT]
#: Tokens of each long text, unless ``--context`` or the config of a model says fewer.
CONTEXT = 2048
#: What results record a seed of, in the order of ``--seed``.
SEEDS = ("random", "numpy", "torch", "fewshot")


def plan_model(name: str, text: str, options: Mapping[str, Any]) -> WatchingSweep:
    """Plan a sweep of one model of `TYPES`, specified as ``TYPE,key=value,...``.

    Raises:
        ValueError: The model, an option or a task cannot be used.
    """
    kind, _, arguments = text.partition(",")
    if kind not in TYPES and kind in model_registry:
        raise ValueError(
            f"The {name} {text} is of a model type that verdict does not run: pass one of {', '.join(TYPES)}, "
            f"or run `lm_eval --model {kind} ... --log_samples` there and pass that folder."
        )
    if kind not in TYPES:
        raise ValueError(
            f"The {name} {text} is neither a path of results nor a model: pass a folder, or a "
            f"model type ({', '.join(TYPES)}) with its arguments, such as hf,pretrained=NAME."
        )
    model = TYPES[kind]
    model_args = read_mapping(arguments, f"The {name} {text}") if arguments else {}
    if model == "hf-prefix" and {*model_args} & QUANTISING:
        # HFLM passes what its config says under the first name, and would pass ours beside it; transformers
        # takes the others no longer.
        model = "pruned-hf"
    # Refused here, not once the base has been evaluated.
    where = f"The {name} {text}"
    for option in model_args.keys() & {*OF_MODEL}:
        raise ValueError(
            f"{where} has {option}={model_args[option]}, which is asked of both models: pass "
            f"--{option} {model_args[option]} instead."
        )
    check_model(model, model_args, where, options.get("device"))
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


def _model_of(text: str) -> str:
    """Return the specification of the model in a folder, if it is a checkpoint and no results; else the text."""
    path = Path(text)
    if not (path / "config.json").is_file() or is_sweep(path) or newest_first(path):
        return text
    # JSON, because the path may hold a comma.
    return f"hf,{json.dumps({'pretrained': text})}"


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
    path = folder / f"{OF_FILE}.yaml"
    # JSON is YAML.
    write_atomically(path, json.dumps(task, indent=2) + "\n")
    return str(path)


def both_runs(
    base: str,
    candidate: str,
    options: Mapping[str, Any],
    output_path: Path,
    margins: Mapping[str, str],
    measure: str | None = None,
    text: str | None = None,
    context: int | None = None,
) -> tuple[Run, Run, Sequence[Run]]:
    """Return the results of both models and of models that know nothing, each a path of results or as `plan_model` takes it.

    What is not finished is evaluated, each model into a sweep folder of `output_path`, once the
    `margins` and the `measure` are known to suit the tasks. The text of the file `text` takes the
    place of the demo's. Long texts have `context` tokens, fewer where the config of the base allows no more.

    A folder with a checkpoint is the model ``hf,pretrained=FOLDER``.

    Raises:
        ValueError: A model, an option, a margin or a task cannot be used, or results cannot be read.
        KeyboardInterrupt: Someone stopped the evaluation.
    """
    models = {"base": _model_of(base), "candidate": _model_of(candidate)}
    finished = {
        name: _results_of(path, name)
        for name, path in models.items()
        if Path(path).exists()
    }
    options = _asked(options, finished, text, output_path)
    metadata = options.get("metadata", {})
    if LONG_TEXT in options["tasks"] and (context or "context" not in metadata):
        tokens = context or CONTEXT
        # What the candidate's config allows is among what is tested.
        if "base" not in finished:
            tokens = _context(models["base"], tokens)
        options["metadata"] = {**metadata, "context": tokens}
    # Both are planned first, so that a mistake in one is told before the other is evaluated; the base
    # before the other, because it knows the tasks.
    planned: dict[str, WatchingSweep] = {}
    for name, model in models.items():
        if name not in finished:
            where = {"output_path": str(output_path / name)}
            planned[name] = plan_model(name, model, {**options, **where})
        if name == "base":
            of_base = planned[name] if name in planned else finished[name][0]
            _check_claims(margins, measure, of_base)
    if not finished:
        planned["candidate"].base = planned["base"]
    results = dict(finished)
    for name, sweep in planned.items():
        print(f"The {name}: {models[name]}", flush=True)
        results[name] = _evaluated(name, models[name], sweep)
    (before, floors), (run, _) = results["base"], results["candidate"]
    if run.name == before.name:
        run = replace(run, name=str(run.path))
    for each in (before, run):
        if WRITTEN in each.tasks() and not each.settings[WRITTEN].get(SERVED_WITH):
            note = (
                f"{each.name} answered {WRITTEN} without its own chat template, and nothing is known of its "
                "files: only a verdict on hf or pruned-hf has a model write as it is served."
            )
            run = replace(run, notes=(*run.notes, note))
    if why := _not_measured(before, run, bool(finished)):
        note = f"The divergence from the base (KL) was not measured, because {why}."
        if KL.partition(",")[0] in margins:
            raise ResultsError(f"{note[:-1]}: leave out its margin.")
        run = replace(run, notes=(*run.notes, note))
    return before, run, floors


def _asked(
    options: Mapping[str, Any],
    finished: Mapping[str, tuple[Run, Sequence[Run]]],
    text: str | None,
    folder: Path,
) -> dict[str, Any]:
    """Return the options of the models that are not finished.

    Raises:
        ValueError: The text cannot be read, or not by both models, or finished results record what
            cannot be an option.
    """
    runs = [run for run, _ in finished.values()]
    if text is not None and runs:
        raise ValueError(
            f"--text {text} cannot be read by {runs[0].path}, which is finished results: pass two "
            "models."
        )
    if text is not None:
        tasks = [*options.get("tasks", TASKS), text_task(text, folder)]
        return {**options, "tasks": tasks}
    recorded = asked_of(runs[0], options) if len(runs) == 1 else {}
    return {"tasks": [*TASKS, DEMO_TEXT], **recorded, **options}


def _context(model: str, most: int) -> int:
    """Return how many tokens the config of a specified model allows, at most so many."""
    kind, _, arguments = model.partition(",")
    # What is wrong with a model is said where it is planned.
    if kind not in TYPES:
        return most
    with contextlib.suppress(OSError, ValueError, KeyError):
        given = read_mapping(arguments, model) if arguments else {}
        source = {**model_source(given), **given}
        names = ("revision", "subfolder", "gguf_file")
        how = {name: source[name] for name in names if source.get(name)}
        stored, _ = PretrainedConfig.get_config_dict(source["pretrained"], **how)
        stored = stored.get("text_config") or stored
        for limit in (given.get("max_length"), stored.get("max_position_embeddings")):
            most = min(most, int(limit or most))
    return most


def asked_of(run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that ask a model what a finished run was asked, as far as its results record it.

    Not those for which the `given` ones leave no room: documents by number have no limit, and without
    a chat template examples are no turns.

    Raises:
        ValueError: What is recorded cannot be an option.
    """
    shots, chat = (setting_of(run, name) for name in ("num_fewshot", "chat_template"))
    seeds = [run.config.get(f"{kind}_seed") for kind in SEEDS]
    found: dict[str, Any] = {
        "tasks": run.tasks(subtasks=False),
        # Tasks with several numbers have them from their own files.
        "num_fewshot": shots if isinstance(shots, int) else None,
        "gen_kwargs": run.config.get("gen_kwargs") or None,
        "seed": None if None in seeds else ",".join(map(str, seeds)),
    }
    if "samples" not in given:
        found["limit"] = run.config.get("limit")
    if chat and "apply_chat_template" not in given:
        found["apply_chat_template"] = True
        found["fewshot_as_multiturn"] = bool(setting_of(run, "fewshot_as_multiturn"))
    if context := run.metadata.get(LONG_TEXT, {}).get("context"):
        found["metadata"] = {"context": context}
    recorded = {name: value for name, value in found.items() if value is not None}
    read = SweepOptions.of(recorded, str(run.path))
    return {name: getattr(read, name) for name in recorded}


def _check_claims(
    margins: Mapping[str, str], measure: str | None, base: Run | Sweep
) -> None:
    """Raise ValueError for margins and a measure that do not suit the tasks of a base, finished or planned."""
    known: dict[str, Run] = {}
    if isinstance(base, Run):
        run = with_choice_prob(base)
        metrics = [metric for _, metric in run.scores]
        keys = [*judged_keys(run, measure, margins)]
        known = dict.fromkeys([task for task, _ in keys], run)
    else:
        keys = [(task.name, m) for task in base.tasks for m in _metrics_of(task)]
        metrics = [metric for _, metric in keys if metric]
    check_measure(measure, metrics)
    check_margins(margins, keys, known)


def _evaluated(
    name: str, model: str, sweep: WatchingSweep
) -> tuple[Run, Sequence[Run]]:
    """Run the sweep of one model and return what `_results_of` its folder does."""
    folder = sweep.options["output_path"]
    code = run_sweep(sweep, retry_failed=True)
    if code == 130:
        raise KeyboardInterrupt
    for failure in read_failures(folder):
        raise ResultsError(
            f"{failure.task} failed on the {name} {model} ({failure.message}): repeat "
            "the command to try it again; finished tasks are not evaluated again."
        )
    if code:
        raise ResultsError(
            f"the {name} {model} was not evaluated on every task: repeat the command to continue."
        )
    return _results_of(folder, name)


def _metrics_of(task: SweepTask) -> list[str]:
    """Return the metrics that a task of a sweep will have; empty ones where only its code knows them."""
    choices = [CHOICE_PROB] if task.metrics else [""]
    seen = [KL] * (task.name in TEXTS) + [*ENDINGS] * (task.name == WRITTEN)
    return [*task.metrics, *choices, *seen]


def _not_measured(base: Run, candidate: Run, finished: bool) -> str:
    """Return why text was evaluated without a divergence from the base; empty where it was not, or with one."""
    texts = {task for task in TEXTS if (task, KL) not in candidate.scores}
    if not texts & {*base.tasks()} & {*candidate.tasks()}:
        return ""
    reasons = [run.config.get(NOT_MEASURED) for run in (base, candidate)]
    usual = "the base has no samples of it"
    if finished:
        usual = "one of the two is finished results"
    return next(filter(None, reasons), usual)


def _results_of(path: str, name: str) -> tuple[Run, Sequence[Run]]:
    """Return the results of the base or the candidate, and the floors that are known with them.

    Of a sweep of several models, the base is the unpruned one, and the candidate the only other.
    """
    floors: Sequence[Run] = ()
    if not is_sweep(path):
        run = read_run(path)
    else:
        sweep = read_sweep(path)
        (run, *others), floors = sweep.runs, sweep.floors
        if others:
            run, others = sweep.split()
        if others and name == "candidate":
            run, *more = others
            if more:
                raise ResultsError(
                    f"The candidate {path} is a sweep of {len(others)} pruned models: name one of "
                    f"them, such as {path}/units/{run.name}."
                )
    if run.is_floor and name == "candidate":
        raise ResultsError(
            f"The candidate {path} is a model that knows nothing, which shows the floor of each "
            "task: pass results of the model that you may ship."
        )
    return run, floors
