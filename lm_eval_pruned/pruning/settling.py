"""Settling a plan: what each layer becomes, once scores are known or losses measured.

The size that the user asked for says how many neurons a uniform cut would keep. A plan whose
`allocation` is not uniform keeps as many, in widths that are found here, and one with
``criterion=best`` gets the criterion of each layer here.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lm_eval_pruned.pruning.allocation import (
    CostCurve,
    allocate,
    cheapest,
    criterion_at,
)
from lm_eval_pruned.pruning.allocations import (
    MEASURED,
    UNIFORM,
    allocate_by_scores,
)
from lm_eval_pruned.pruning.calibration import check_observable
from lm_eval_pruned.pruning.criteria import CALIBRATED
from lm_eval_pruned.pruning.layer_widths import written_by_layer
from lm_eval_pruned.pruning.layouts import UnsupportedModelError, describe


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.sensitivity import Sensitivity
    from lm_eval_pruned.pruning.widths import Widths

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.allocation")

#: Shares of a layer's neurons to remove when its loss is measured, in percent.
REMOVED = (25, 50, 75, 87.5)


class Evidence(Protocol):
    """What a plan is settled by, computed when it is asked for."""

    def scores(self) -> Mapping[str, Tensor]:
        """Return the scores of every GLU-MLP by the plan's criterion, by name, each (I,)."""

    def curves(self, criteria: Sequence[str]) -> Sensitivity:
        """Return the losses with one layer cut at a time, by `REMOVED` and each of `criteria`."""


def settled(plan: PrunePlan, widths: Widths, evidence: Evidence) -> PrunePlan:
    """Return `plan` with the width, and the criterion, of every layer that it prunes.

    Args:
        plan: A plan of the model; returned as it is unless it `is_open`.
        widths: The model's widths.
        evidence: Scores and curves of the same model.

    Raises:
        ValueError: The bounds leave more neurons than the size asks for; see also
            `lm_eval_pruned.pruning.allocations.allocate_by_scores`.
        UnsupportedModelError: See `check_settleable`.
    """
    if not plan.is_open:
        return plan
    check_settleable(plan, widths)
    uniform = _uniform(plan, widths)
    before = {layer: widths.layers[layer] for layer in uniform}
    criteria: dict[int, str] | None = None
    measured_on = None
    kept = uniform
    bounds = {
        "neurons": sum(uniform.values()),
        "min_width": plan.min_width or 1,
        "multiple_of": plan.multiple_of,
    }
    if plan.tried or plan.allocation in MEASURED:
        tried = plan.tried or (plan.criterion,)
        found = evidence.curves(tried)
        measured_on = {
            "file": found.file,
            "sha256": found.sha256,
            "texts": found.texts,
            "tokens": found.tokens,
        }
        curves = {
            layer: {
                name: _cost_curve(found, layer, own, name, plan.seed) for name in tried
            }
            for layer, own in before.items()
        }
        if plan.allocation in MEASURED:
            kept = _by_losses(plan, curves, before, sum(uniform.values()))
        if plan.tried:
            criteria = {
                layer: criterion_at(curves[layer], width)
                for layer, width in kept.items()
            }
    elif plan.allocation != UNIFORM:
        scores = _by_layer(evidence.scores(), widths, before)
        kept = allocate_by_scores(plan.allocation, scores, **bounds)
    result = plan if plan.allocation == UNIFORM else plan.with_layers(kept)
    names = None if criteria is None else tuple(criteria.items())
    result = dataclasses.replace(result, layer_criteria=names, measured_on=measured_on)
    if result.layer_widths is not None:
        logger.info(
            "allocation=%s keeps of each layer: %s.",
            plan.allocation,
            written_by_layer(result.layer_widths),
        )
    if result.layer_criteria is not None:
        logger.info(
            "criterion=best scores the layers by: %s.",
            written_by_layer(result.layer_criteria),
        )
    return result


def check_settleable(plan: PrunePlan, widths: Widths) -> None:
    """Refuse a model that an open plan cannot be settled for, before any weight is read.

    Args:
        plan: The plan.
        widths: The model's widths.

    Raises:
        UnsupportedModelError: An allocation would have to weigh layers against each other that
            hold different MLPs, a criterion cannot be observed, or losses cannot be measured.
    """
    model = widths.skeleton()
    if plan.allocation in MEASURED and model.config.is_encoder_decoder:
        check_observable(model, "allocation=global")
    if plan.tried and (
        {*plan.tried} & {*CALIBRATED} or model.config.is_encoder_decoder
    ):
        encodes = model.config.is_encoder_decoder
        check_observable(model, "criterion=maw" if encodes else "criteria_tried=maw+l2")
    if plan.allocation == UNIFORM:
        return
    held: dict[int, Counter[str]] = {}
    for mlp in widths.mlps:
        if plan.includes_layer(mlp.block):
            held.setdefault(mlp.block, Counter())[mlp.kind] += 1
    first, *others = sorted(held)
    for other in others:
        if held[other] != held[first]:
            raise UnsupportedModelError(
                f"{describe(model)} has {_told(held[first])} in layer {first} and "
                f"{_told(held[other])} in layer {other}, whose neurons "
                f"allocation={plan.allocation} cannot weigh against each other: name layers that "
                "are alike with layers, or leave it out."
            )


def _told(held: Mapping[str, int]) -> str:
    """Return which MLPs a layer holds, such as ``8 experts and 1 shared MLP``."""
    names = {"expert": "expert", "shared": "shared MLP", "dense": "dense MLP"}
    return " and ".join(
        f"{count} {names[kind]}{'s' if count > 1 else ''}"
        for kind, count in held.items()
    )


def _uniform(plan: PrunePlan, widths: Widths) -> dict[int, int]:
    """Return what a uniform cut would keep of each layer that is pruned."""
    targets = widths.targets(plan)
    kept: dict[int, int] = {}
    for mlp in widths.mlps:
        primary = widths.actual[mlp.name] == widths.layers[mlp.block]
        if primary and plan.includes_layer(mlp.block):
            kept.setdefault(mlp.block, targets[mlp.name])
    return dict(sorted(kept.items()))


def _cost_curve(
    found: Sensitivity, layer: int, width: int, criterion: str, seed: int
) -> CostCurve:
    curve = found.curve(layer, criterion, seed if criterion == "random" else None)
    return CostCurve.of_points(layer, width, curve.widths, found.rises(curve))


def _by_losses(
    plan: PrunePlan,
    curves: Mapping[int, Mapping[str, CostCurve]],
    before: Mapping[int, int],
    neurons: int,
) -> dict[int, int]:
    """Return the widths of least total damage, not below what was measured if that will do."""
    envelope = [cheapest(each) for each in curves.values()]
    lowest = plan.min_width
    if lowest is None:
        lowest = min(
            math.ceil(own * (100 - max(REMOVED)) / 100) for own in before.values()
        )
        # What is not known of narrower layers is not relied on without need.
        needed = neurons // len(before) // plan.multiple_of * plan.multiple_of
        lowest = max(1, min(lowest, needed))
    found = allocate(envelope, neurons, min_width=lowest, multiple_of=plan.multiple_of)
    return dict(zip(before, found, strict=True))


def _by_layer(
    scores: Mapping[str, Tensor], widths: Widths, before: Mapping[int, int]
) -> dict[int, np.ndarray]:
    """Return the scores of each layer; of experts, what each gives up with its nth neuron."""
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in before}
    for mlp in widths.mlps:
        if mlp.block in found and widths.actual[mlp.name] == before[mlp.block]:
            found[mlp.block].append(np.asarray(scores[mlp.name], dtype=np.float64))
    return {
        layer: each[0] if len(each) == 1 else np.mean([np.sort(e) for e in each], 0)
        for layer, each in found.items()
    }
