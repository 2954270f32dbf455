"""Which runs, scores and tasks belong together: the sizes of one model, what tasks measure."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.results.files import PRIMARY, as_mapping
from lm_eval_pruned.results.metrics import is_perplexity


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.results.files import Run

#: What width pruning takes away in arXiv 2512.22671 (two sides), and what it leaves or improves there.
KNOWLEDGE, TEXT = "knowledge", "language modelling"
BEHAVIOUR = "truthfulness and instructions"
SIDES = (KNOWLEDGE, TEXT, BEHAVIOUR, "unknown")


class Family(NamedTuple):
    """Tasks that measure one thing, on one of the `SIDES`.

    A task declares the `name` of its family as ``family`` under ``metadata``; of others, the regular
    expression `tasks` matches the names. Their group is called ``pruned_`` and then `name`.
    """

    name: str
    label: str
    side: str
    tasks: str


_KNOWLEDGE = "mmlu|gsm8k|(^|_)arc_|trivia_?qa|nq_open|openbookqa|sciq|gpqa|(^|_)math(_|$)|medmcqa|medqa"
_COMMONSENSE = "hellaswag|winogrande|piqa|boolq|social_iqa|commonsense_?qa|(^|_)copa"
_LANGUAGE = "wikitext|lambada|^held_text|(^|_)c4(_|$)|(^|_)pile(_|$)|paloma"
#: In the order of legends; the first whose expression is found counts.
FAMILIES = (
    Family("knowledge", "Knowledge", KNOWLEDGE, _KNOWLEDGE),
    Family("commonsense", "Commonsense", KNOWLEDGE, _COMMONSENSE),
    Family("language_modeling", "Language modelling", TEXT, _LANGUAGE),
    Family("truthfulness", "Truthfulness", BEHAVIOUR, "truthful"),
    Family(
        "instruction_following",
        "Instruction following",
        BEHAVIOUR,
        "ifeval|instruction",
    ),
    Family("reasoning", "Multi-step reasoning", BEHAVIOUR, "musr|(^|_)bbh(_|$)"),
    Family("other", "The rest", SIDES[-1], ""),
)


def family_of(task: str, metadata: Mapping[str, Mapping[str, Any]]) -> Family:
    """Return the family that a task declares in the `metadata` of a run, else the one of its name."""
    declared = metadata.get(task, {}).get("family")
    named = (family for family in FAMILIES if family.name == declared)
    by_name = (family for family in FAMILIES if re.search(family.tasks, task))
    return next(itertools.chain(named, by_name))


def series_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group the runs of a sweep whose expansion ratio is the only thing that varies.

    By `series_name`, in falling expansion ratio, each with the baseline of its model. Runs without
    an expansion ratio are left out.
    """

    def model(run: Run) -> str:
        return f"{run.pruning.get('hidden_size')}x{run.pruning.get('layers')}"

    sized = [r for r in runs if r.expansion_ratio is not None]
    series: dict[tuple[str, str], list[Run]] = {}
    for run in sized:
        if not run.is_baseline:
            series.setdefault((model(run), series_name(run)), []).append(run)
    several = len({size for size, _ in series}) > 1
    return {
        f"{size}, {name}" if several else name: [
            *[run for run in sized if run.is_baseline and model(run) == size][:1],
            *sorted(members, key=lambda run: -(run.expansion_ratio or 0)),
        ]
        for (size, name), members in series.items()
    }


def series_name(run: Run) -> str:
    """Return how a run was pruned, in the words of who asked, and whether it was trained again.

    Models whose layers differ in width are a separate series, and so are models of which some
    layers were not pruned.
    """
    texts = {
        "criterion": "{}",
        "repair": "repair {}",
        "seed": "seed {}",
        "layers_pruned": "layers {}",
        "allocation": "allocation {}",
    }
    if "allocation" not in run.pruning:
        texts["layer_widths"] = "widths by layer"
    known = {key: run.pruning.get(key) for key in texts}
    asked, parts = model_arguments(run), []
    if recipe := asked.get("recipe"):
        parts = [f"recipe={recipe}"]
        # Both are part of it, unless another was asked for.
        known["criterion"] = known["criterion"] if "criterion" in asked else None
        known["repair"] = asked.get("repair")
    parts += [texts[k].format(value) for k, value in known.items() if value is not None]
    parts += [f"healed by {healing_name(run)}"] * bool(run.healing)
    return ", ".join(parts) or "-"


def model_arguments(run: Run) -> Mapping[str, Any]:
    """Return the arguments of the model that a run evaluated."""
    arguments = run.config.get("model_args")
    if isinstance(arguments, str):
        return dict(part.partition("=")[::2] for part in arguments.split(","))
    return as_mapping(arguments)


def is_control(run: Run) -> bool:
    """Return whether the neurons of a run were removed at random."""
    return run.pruning.get("criterion") == "random"


def healing_name(run: Run) -> str:
    """Return how a healed run was trained, such as ``lora`` or ``dora with teacher 0.5``."""
    name = str(run.healing.get("method") or "unknown training")
    teacher = run.healing.get("teacher")
    return f"{name} with teacher {teacher.get('weight')}" if teacher else name


def primary_metrics(
    runs: Sequence[Run], *, subtasks: bool = False
) -> list[tuple[str, str]]:
    """Return one (task, metric) for each task that all runs have, or members of groups too.

    The metric is the one that the task declares in its metadata, else ``acc_norm``, as the study
    reports it, else the first that the task lists; of those that are finite in all runs.
    """
    known: dict[str, list[str]] = {}
    for key in runs[0].scores:
        scores = [run.scores.get(key) for run in runs]
        if all(score and math.isfinite(score.value) for score in scores):
            known.setdefault(key[0], []).append(key[1])

    primary = []
    for task in (t for t in runs[0].tasks(subtasks=subtasks) if t in known):
        by_name = {metric.partition(",")[0]: metric for metric in known[task][::-1]}
        wanted = runs[0].metadata.get(task, {}).get(PRIMARY), "acc_norm"
        chosen = next((by_name[n] for n in wanted if n in by_name), known[task][0])
        primary.append((task, chosen))
    return primary


def scale_name(task: str, metric: str) -> str:
    """Return the name of a task's metric on the scale of trends and correlations."""
    return f"{task} {'log ' * is_perplexity(metric)}{metric}".strip()
