"""Allocation: how the neurons of a size are shared among the layers of a model.

A uniform cut says how many neurons stay in all. An allocation keeps as many, but takes them where
the loss rises least. Every layer has a curve, the rise after removing 0, 1, 2, ... of its neurons,
of which the convex hull counts: `allocate` takes the cheapest next neuron until the size is
reached, which costs least in all (Fox 1966, "Discrete Optimization via Marginal Analysis",
Management Science 13(3)).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np
import torch

from lm_eval_pruned.pruning.argument_values import written_by_layer
from lm_eval_pruned.pruning.calibration import check_observable, unless_cpu
from lm_eval_pruned.pruning.layouts import UnsupportedModelError, describe
from lm_eval_pruned.pruning.measuring import CUTS, LoadedModel


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lm_eval_pruned.pruning.widths import Cut

    Costs = NDArray[np.float64]

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.allocation")


def plan_layers(cut: Cut, evidence: LoadedModel) -> Cut:
    """Return a cut of an open plan with the width of each layer that it prunes.

    `evidence` is the model, and says what cuts of its layers cost.

    Raises:
        UnsupportedModelError: See `check_comparable`.
    """
    check_comparable(cut)
    plan, widths = cut.plan, cut.widths
    before, targets = widths.layers, cut.targets
    # What the size makes of the MLPs to which the size of a layer refers.
    kept = {
        mlp.layer: targets[mlp.name]
        for mlp in widths.mlps
        if plan.includes_layer(mlp.layer)
        and widths.actual[mlp.name] == before[mlp.layer]
    }
    neurons, multiple = sum(kept.values()), plan.multiple_of
    measured = evidence.curves()
    curves = {curve.layer: curve for curve in measured.curves}
    costs = [
        marginal_costs(before[layer], curves[layer].widths, curves[layer].rises)
        for layer in kept
    ]
    # Costs are measured down to this share; a layer becomes narrower only if the size asks for it.
    share = 1 - max(CUTS) / 100
    needed = neurons // len(kept) // multiple * multiple
    fewest = [min(math.ceil(before[layer] * share), needed) or 1 for layer in kept]
    shared = allocate(costs, neurons, fewest=fewest, multiple_of=multiple)
    kept = dict(zip(kept, shared, strict=True))
    logger.info(
        "allocation=%s gives the layers these widths: %s.",
        plan.arguments.allocation,
        written_by_layer(kept.items()),
    )
    text = {n: getattr(measured, n) for n in ("file", "sha256", "texts", "tokens")}
    text |= unless_cpu(torch.device(measured.device))
    plan = dataclasses.replace(plan.with_layers(kept), measured_on=text)
    return dataclasses.replace(cut, plan=plan)


def check_comparable(cut: Cut) -> None:
    """Refuse a model whose layers an open plan cannot compare, before any weight is read.

    Raises:
        UnsupportedModelError: An allocation would have to weigh layers against each other that
            hold different MLPs, or their activations cannot be observed.
    """
    plan, widths = cut.plan, cut.widths
    model = widths.skeleton
    check_observable(model, "allocation=uniform", stacked=True)
    mlps_of: dict[int, Counter[str]] = defaultdict(Counter)
    for mlp in widths.mlps:
        if plan.includes_layer(mlp.layer):
            what = "expert" if mlp.kind == "expert" else f"{mlp.kind} MLP"
            mlps_of[mlp.layer][what] += 1
    first = min(mlps_of, default=0)
    for layer, mlps in mlps_of.items():
        if mlps != mlps_of[first]:
            raise UnsupportedModelError(
                f"{describe(model)} has {_counted(mlps_of[first])} in layer {first} and "
                f"{_counted(mlps)} in layer {layer}, whose neurons allocation={plan.arguments.allocation} cannot weigh against each other: name "
                "layers that are alike with layers, or leave it out."
            )


def _counted(kinds: Counter[str]) -> str:
    """Return how many MLPs of each kind there are, in words."""
    return " and ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in kinds.items())


def marginal_costs(width: int, kept: Sequence[int], rises: Sequence[float]) -> Costs:
    """Return what removing the first, second, ... neuron of a layer costs, shape (I,), ascending.

    These are the slopes of the greatest convex curve that starts at 0 and nowhere exceeds the
    `rises`. Below the smallest of the widths it goes on as steeply as before.

    Args:
        width: The layer's width I before, in neurons.
        kept: Some smaller widths, in neurons, ascending.
        rises: By how much the loss rises at each of them, in nats per token; 0 or more.

    Example:
        >>> marginal_costs(4, kept=[2, 3], rises=[4.0, 1.0]).tolist()
        [1.0, 3.0, 3.0, 3.0]
        >>> marginal_costs(4, kept=[2, 3], rises=[4.0, 3.0]).tolist()
        [2.0, 2.0, 2.0, 2.0]
    """
    removed = np.array([0, *(width - left for left in reversed(kept))])
    rise = np.array([0.0, *reversed(rises)])
    costs, bend = np.zeros(width), 0
    while bend < len(kept):
        after = slice(bend + 1, None)
        chords = (rise[after] - rise[bend]) / (removed[after] - removed[bend])
        costs[removed[bend] :] = chords.min()
        bend += 1 + int(chords.argmin())
    # Rounding may have a chord end below the one before.
    return np.maximum.accumulate(costs)


def allocate(
    costs: Sequence[Costs],
    neurons: int,
    *,
    fewest: Sequence[int],
    multiple_of: int = 1,
) -> tuple[int, ...]:
    """Return the widths of least total cost that keep `neurons` neurons in all.

    Of equally cheap neurons, those of the first layers go.

    Args:
        costs: Of each layer the `marginal_costs`, shape (I,), ascending.
        neurons: Neurons to keep in all; the most below that where no allowed widths keep as many.
        fewest: Neurons to leave in each layer at least, by layer. A layer that has no more stays.
        multiple_of: Widths are multiples of this. A layer that has fewer neurons stays.

    Example:
        >>> flat, steep = (marginal_costs(100, [25], [rise]) for rise in (0.0, 1.5))
        >>> allocate([steep, flat], 150, fewest=[20, 20])
        (100, 50)
        >>> allocate([steep, flat], 150, fewest=[60, 60])
        (90, 60)
    """
    widest, blocks = [], []
    for curve, least in zip(costs, fewest, strict=True):
        width, low = len(curve), -(-least // multiple_of) * multiple_of
        high = width // multiple_of * multiple_of
        high, lowest = (high, low) if high >= low else (width, width)
        widest.append(high)
        # What removing so many at a time costs, from the removed end on.
        blocks.append(
            curve[width - high : width - lowest].reshape(-1, multiple_of).sum(1)
        )
    wanted = max(0, -(-(sum(widest) - neurons) // multiple_of))
    layer = np.repeat(np.arange(len(costs)), [len(block) for block in blocks])
    cheapest = np.argsort(np.concatenate(blocks), kind="stable")[:wanted]
    taken = np.bincount(layer[cheapest], minlength=len(costs)).tolist()
    pairs = zip(widest, taken, strict=True)
    return tuple(high - multiple_of * blocks for high, blocks in pairs)
