"""Units that end when their comparison with the unpruned model is decided: ``--stop_when``."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.samplers import FirstNSampler
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.loggers import EvaluationTracker

from lm_eval_pruned.compare.pairing import LEVEL, look, with_scores
from lm_eval_pruned.compare.verdicts import Margin
from lm_eval_pruned.results.files import Stopping
from lm_eval_pruned.results.runs import read_newest
from lm_eval_pruned.sweeps.folder import write_results
from lm_eval_pruned.sweeps.options import refuse_ray


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lm_eval.api.task import Task

    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.sweeps.tasks import SweepTask

logger = logging.getLogger("lm_eval.pruned.sweep")
#: Shares of the documents at which a unit is looked at.
LOOKS = (1 / 8, 1 / 4, 1 / 2, 1)
#: Fewer documents are not looked at, unless they are all.
LEAST = 25


def read_rule(options: Mapping[str, Any]) -> str | None:
    """Return the rule that stops units, ``decided`` or ``decided:MARGIN``, if there is one.

    ValueError where it is not usable, or not together with another option.
    """
    rule: str | None = options.get("stop_when")
    if rule is None:
        return None
    refuse_ray(f"stop_when={rule}", options)
    others = {**(options.get("model_args") or {}), **options}
    forbidden = {"log_samples": False, "predict_only": True, "energy": True}
    for name, wrong in forbidden.items():
        if others.get(name) is wrong:
            raise ValueError(
                f"stop_when={rule} cannot be combined with {name}={wrong}: leave one of them out."
            )
    if rule.partition(":")[0] != "decided":
        known = "decided, or decided:MARGIN with a margin such as 1pt"
        raise ValueError(f"stop_when={rule} is not a rule: pass {known}.")
    if rule != "decided":
        _margin(rule)
    return rule


def check_margin(rule: str | None, tasks: Sequence[SweepTask]) -> None:
    """Raise ValueError for a margin that allows any difference of a task: its unit was forgotten."""
    if rule is None or rule == "decided":
        return
    margin = _margin(rule)
    for task in tasks:
        for metric in task.metrics:
            margin.check(task.name, metric)


def _margin(rule: str) -> Margin:
    return Margin("stop_when=decided with margin", rule.removeprefix("decided:"))


def check_tasks(rule: str, tasks: Mapping[str, Task], settings: Any) -> None:
    """Raise ValueError for tasks whose examples or answers depend on the documents before."""
    for name, task in tasks.items():
        config: Any = task.config
        examples = config.num_fewshot
        if settings.num_fewshot is not None and examples != 0:
            examples = settings.num_fewshot
        told = {**(config.generation_kwargs or {}), **(settings.gen_kwargs or {})}
        sampled = told.get("do_sample", told.get("temperature"))
        if examples and not isinstance(getattr(task, "sampler", None), FirstNSampler):
            why = "its few-shot examples at random: take 0, or sampler: first_n in its YAML"
        elif task.OUTPUT_TYPE == "generate_until" and sampled:
            why = "its answers at random: pass --gen_kwargs do_sample=false"
        else:
            continue
        raise ValueError(
            f"stop_when={rule} needs prompts and answers that depend only on the document, but "
            f"{name} draws {why}, or leave stop_when out."
        )


def documents_of_looks(
    tasks: Mapping[str, Task], settings: Any
) -> dict[int, dict[str, list[int]]]:
    """Return the documents of each look, by their number: indices in rising order, by task.

    They are drawn at random from each task, by names, counts and seed alone, so that all sizes
    of a sweep have the same. Each look holds those of the look before.
    """
    orders, seed = {}, (settings.seed or [None])[0] or 0
    for name, task in tasks.items():
        known = [*range(len(task.eval_docs))]
        if settings.samples and settings.samples.get(name):
            known = sorted(settings.samples[name])
        elif settings.limit:
            known = known[: get_sample_size(task, settings.limit)]
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        orders[name] = [known[place] for place in rng.permutation(len(known))]
    looks = {}
    for share in LOOKS:
        # A group's members are strata of its test, which needs two documents of each.
        chosen = {
            name: sorted(order[: max(2, math.ceil(share * len(order)))])
            for name, order in orders.items()
        }
        count = sum(map(len, chosen.values()))
        if count >= LEAST or share == 1:
            looks[count] = chosen
    return looks


def evaluate_until_decided(
    sweep: Any,
    name: str,
    tasks: Mapping[str, Task],
    base: Run,
    evaluate: Callable[..., dict[str, Any]],
    scratch: Path,
) -> dict[str, Any]:
    """Evaluate the documents of one look after the other, until the comparison is decided.

    `evaluate` takes indices of documents by task, and the prefix of a cache of earlier answers.

    Returns:
        The harness's results on the documents of the last look, with the block ``stopping``.
    """
    looks = documents_of_looks(tasks, sweep.settings)
    sizes = len(sweep.configurations) - 1
    stopping = Stopping(sweep.stop_when, name, max(looks), LEVEL, sizes)
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        for count, chosen in looks.items():
            results = evaluate(chosen, str(Path(place, "answers")))
            here = Path(place, str(count))
            # Writing takes the samples out and changes them.
            write_results(copy.deepcopy(results), EvaluationTracker(), here)
            run = read_newest(here)
            stopping = look(stopping, count, base, run)
            if stopping.reason:
                break
        stopping = with_scores(stopping, run)
    logger.info("%s: %s (%s).", name, stopping.text, stopping.reason)
    return {**results, "stopping": stopping.as_dict()}
