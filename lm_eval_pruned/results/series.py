"""Which runs and which scores belong together: the sizes of one model, one metric for each task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lm_eval_pruned.results.files import Run


def series_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group the runs of a sweep whose expansion ratio is the only thing that varies.

    Baselines belong to every series of their model.

    Returns:
        Runs by series, in falling expansion ratio; runs without a recorded
        expansion ratio are left out, and those that lack whole layers.
    """

    def model(run: Run) -> str:
        pruning = run.pruning
        return f"{pruning.get('hidden_size')}x{pruning.get('layers')}"

    pruned = [r for r in runs if r.expansion_ratio is not None and not r.is_shallow]
    series: dict[tuple[str, str], list[Run]] = {}
    for run in pruned:
        if not run.is_baseline:
            series.setdefault((model(run), series_name(run)), []).append(run)
    grouped = {}
    for (of_model, name), members in series.items():
        baselines = [r for r in pruned if r.is_baseline and model(r) == of_model][:1]
        label = name if len({key[0] for key in series}) == 1 else f"{of_model}, {name}"
        grouped[label] = sorted(
            [*baselines, *members], key=lambda run: -(run.expansion_ratio or 0)
        )
    return grouped


def series_name(run: Run) -> str:
    """Return how a run was pruned: the criterion with the seed of a random one, where, and
    whether it was trained again.

    Layers that differ in width are no point on the curve of those that do not, and neither are
    models of which some layers were left alone.
    """
    name = str(run.pruning.get("criterion") or "-")
    if "seed" in run.pruning:
        name += f", seed {run.pruning['seed']}"
    if run.is_shallow:
        dropped = f"layers {run.pruning['layers_dropped']} dropped"
        name = dropped if name == "-" else f"{name}, {dropped}"
    if "layers_pruned" in run.pruning:
        name += f", layers {run.pruning['layers_pruned']}"
    if "allocation" in run.pruning:
        name += f", allocation {run.pruning['allocation']}"
    elif "layer_widths" in run.pruning:
        name += ", widths by layer"
    if run.healing:
        name += f", healed by {healing_name(run)}"
    return name


def is_control(run: Run) -> bool:
    """Return whether the neurons of a run were removed at random."""
    return run.pruning.get("criterion") == "random"


def healing_name(run: Run) -> str:
    """Return how a healed run was trained, such as ``lora`` or ``dora with teacher 0.5``."""
    method, teacher = run.healing.get("method"), run.healing.get("teacher")
    name = str(method or "unknown training")
    if isinstance(teacher, dict):
        name += f" with teacher {teacher.get('weight')}"
    return name


def primary_metrics(
    runs: Sequence[Run], *, subtasks: bool = False
) -> list[tuple[str, str]]:
    """Return one (task, metric) for each task that all runs have.

    The metric is ``acc_norm`` where there is one, as the study reports it, else the
    first that the task lists and that is a finite number in all runs.

    Args:
        runs: At least one.
        subtasks: Whether to include the members of groups that have scores.
    """
    primary = []
    for task in runs[0].tasks(subtasks=subtasks):
        metrics = [
            metric
            for scored, metric in runs[0].scores
            if scored == task
            and all(
                (task, metric) in run.scores
                and math.isfinite(run.scores[task, metric].value)
                for run in runs
            )
        ]
        metrics.sort(key=lambda metric: not metric.startswith("acc_norm,"))
        if metrics:
            primary.append((task, metrics[0]))
    return primary


def is_perplexity(metric: str) -> bool:
    """Whether a metric is a perplexity, whose logarithm is the mean over documents."""
    return "perplexity" in metric


def is_share(metric: str, values: Iterable[float]) -> bool:
    """Whether a metric is a share of 1, as far as its name and its values tell."""
    named = is_perplexity(metric) or "bits_per_byte" in metric
    return not named and all(0 <= value <= 1 for value in values)


def scale_name(metric: str) -> str:
    """Return the name of a metric on the scale of trends and correlations."""
    return f"log {metric}" if is_perplexity(metric) else metric
