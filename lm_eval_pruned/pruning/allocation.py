"""Allocation: how the neurons of a size are shared among the layers of a model.

A uniform cut says how many neurons stay in all. An allocation keeps as many, but takes them
where measured losses say that they matter least. Every layer has a curve, the cost of
removing 0, 1, 2, ... of its neurons, and `allocate` finds the widths of least total cost.
Costs are whole numbers, so the same curves give the same widths on every machine.

Where every curve is convex, taking the cheapest next neuron is optimal (Fox 1966, "Discrete
Optimization via Marginal Analysis", Management Science 13(3)). Elsewhere a dynamic program over
the layers is exact, as in SPDY (Frantar & Alistarh 2022, arXiv 2201.13096).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from lm_eval_pruned.pruning.argument_values import NO_REPAIR, written_by_layer
from lm_eval_pruned.pruning.calibration import check_observable, unless_cpu
from lm_eval_pruned.pruning.criteria import OBS
from lm_eval_pruned.pruning.layouts import UnsupportedModelError, describe
from lm_eval_pruned.pruning.measuring import MEASURED_CUTS, LoadedModel


if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.widths import Widths

    Costs = NDArray[np.int64]

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.allocation")

#: Costs are whole numbers of this, in nats or whatever a curve is measured in.
RESOLUTION = 1e-12
#: Larger than any total of costs, and small enough to be added to one without overflow.
_IMPOSSIBLE = np.int64(1) << np.int64(61)


def plan_layers(plan: PrunePlan, widths: Widths, evidence: LoadedModel) -> PrunePlan:
    """Return `plan` with the width of each layer that it prunes, if it `is_open`.

    `evidence` is the model of `widths`, whose losses it measures.

    Raises:
        UnsupportedModelError: See `check_comparable`.
    """
    if not plan.is_open:
        return plan
    check_comparable(plan, widths)
    own, targets = widths.layers, widths.targets(plan)
    # The MLPs to which the size of a layer refers.
    held: dict[int, list[str]] = {n: [] for n in own if plan.includes_layer(n)}
    for mlp in widths.mlps:
        if mlp.block in held and widths.actual[mlp.name] == own[mlp.block]:
            held[mlp.block].append(mlp.name)
    kept = {layer: targets[names[0]] for layer, names in held.items()}
    neurons, multiple = sum(kept.values()), plan.multiple_of
    repair = plan.arguments.repair
    # Only curves of repaired cuts know the criterion that chooses layer after layer.
    known = plan.criterion != OBS or repair != NO_REPAIR
    criterion = plan.criterion if known else "act"
    measured = evidence.curves(criterion, repair)
    costs = []
    for layer in held:
        curve = measured.curve(layer, criterion, plan.seed)
        rises = measured.rises(curve)
        costs.append(costs_of_losses(own[layer], curve.widths, rises))
    text = {n: getattr(measured, n) for n in ("file", "sha256", "texts", "tokens")}
    text |= {"repair": repair} if repair != NO_REPAIR else {}
    text |= unless_cpu(torch.device(measured.device))
    # What is not known of layers narrower than measured is not relied on without need.
    share = 1 - max(MEASURED_CUTS) / 100
    needed = neurons // len(held) // multiple * multiple
    fewest = min(math.ceil(min(own[layer] for layer in held) * share), needed) or 1
    shared = allocate(costs, neurons, fewest=fewest, multiple_of=multiple)
    kept = dict(zip(held, shared, strict=True))
    logger.info(
        "allocation=%s gives the layers these widths: %s.",
        plan.allocation,
        written_by_layer(kept.items()),
    )
    return dataclasses.replace(plan.with_layers(kept), measured_on=text)


def check_comparable(plan: PrunePlan, widths: Widths) -> None:
    """Refuse a model whose layers an open plan cannot compare, before any weight is read.

    Raises:
        UnsupportedModelError: An allocation would have to weigh layers against each other that
            hold different MLPs, or losses cannot be measured.
    """
    model = widths.skeleton()
    if model.config.is_encoder_decoder:
        check_observable(model, "allocation=uniform")
    held: dict[int, Counter[str]] = defaultdict(Counter)
    for mlp in widths.mlps:
        if plan.includes_layer(mlp.block):
            what = "expert" if mlp.kind == "expert" else f"{mlp.kind} MLP"
            held[mlp.block][what] += 1
    first = min(held, default=0)
    for layer, own in held.items():
        if own != held[first]:
            has = [
                " and ".join(
                    f"{n} {what}{'s' if n > 1 else ''}" for what, n in each.items()
                )
                for each in (held[first], own)
            ]
            raise UnsupportedModelError(
                f"{describe(model)} has {has[0]} in layer {first} and {has[1]} in layer {layer}, "
                f"whose neurons allocation={plan.allocation} cannot weigh against each other: name "
                "layers that are alike with layers, or leave it out."
            )


def costs_of_losses(width: int, kept: Sequence[int], rises: Sequence[float]) -> Costs:
    """Return the cost of removing 0, 1, ... I neurons, shape (I + 1,), from measured losses.

    Measured points are noisy: a layer that is cut further may seem to do better. They are
    replaced by the closest ones, in the sense of least squares, that neither fall nor are
    below 0 (isotonic regression; Barlow et al. 1972), and joined by straight lines. Below
    the smallest measured width the curve goes on as steeply as it has been anywhere.

    Args:
        width: The layer's width I before, in neurons.
        kept: Measured widths, in neurons, ascending, each below `width`.
        rises: By how much the loss rose at each of them, in nats.

    Example:
        >>> costs = costs_of_losses(4, kept=[2, 3], rises=[4e-12, 1e-12])
        >>> costs.tolist()
        [0, 1, 4, 7, 10]
    """
    from scipy.optimize import isotonic_regression

    removed = [0, *(width - each for each in reversed(kept))]
    # Fitting first and cutting off at 0 then is the closest of all that are 0 or more.
    fitted = np.maximum(isotonic_regression(list(reversed(rises))).x, 0.0)
    values = np.concatenate([[0.0], fitted]) / RESOLUTION
    slopes = np.rint(np.diff(values) / np.diff(removed)).astype(np.int64)
    lengths = [*np.diff(removed), width - removed[-1]]
    marginal = np.repeat([*slopes, max(slopes, default=0)], lengths)
    return np.cumsum([0, *marginal], dtype=np.int64)


def allocate(
    curves: Sequence[Costs], neurons: int, *, fewest: int = 1, multiple_of: int = 1
) -> tuple[int, ...]:
    """Return the widths of least total cost that keep `neurons` neurons in all.

    Of equally good allocations, it is the one in which the last layer gives the least, then the
    last but one, and so on.

    Args:
        curves: The cost of removing 0, 1, ... I neurons of each layer, shape (I + 1,), int64.
        neurons: Neurons to keep in all; the most below that where no allowed widths keep as many.
        fewest: Neurons to leave in each layer at least. A layer that has no more stays.
        multiple_of: Widths are multiples of this. A layer that has fewer neurons stays.

    Example:
        >>> flat, steep = (costs_of_losses(100, [25], [rise]) for rise in (0.0, 1.5))
        >>> allocate([steep, flat], 150, fewest=20)
        (100, 50)
        >>> allocate([steep, flat], 150, fewest=60)
        (90, 60)
    """
    low = -(-fewest // multiple_of) * multiple_of
    widest, steps = [], []
    for width in (len(curve) - 1 for curve in curves):
        high = width // multiple_of * multiple_of
        widest.append(high if high >= low else width)
        # Of `multiple_of` neurons each, from the removed end of the curve on.
        steps.append(max(0, high - low) // multiple_of)
    costs = []
    for curve, high, count in zip(curves, widest, steps, strict=True):
        removed = len(curve) - 1 - high + multiple_of * np.arange(count + 1)
        costs.append(curve[removed] - curve[removed[0]])
    wanted = max(0, -(-(sum(widest) - neurons) // multiple_of))
    convex = all(np.all(np.diff(each, 2) >= 0) for each in costs)
    taken = (_greedy if convex else _dynamic)(costs, min(wanted, sum(steps)))
    pairs = zip(widest, taken, strict=True)
    return tuple(high - multiple_of * each for high, each in pairs)


def _greedy(costs: Sequence[Costs], steps: int) -> list[int]:
    """Return how many of `steps` each layer takes; ``costs[l][j]`` of j in layer l is convex."""
    marginal = np.concatenate([np.diff(each) for each in costs])
    owner = np.repeat(np.arange(len(costs)), [len(each) - 1 for each in costs])
    chosen = owner[np.argsort(marginal, kind="stable")[:steps]]
    return np.bincount(chosen, minlength=len(costs)).tolist()


def _dynamic(costs: Sequence[Costs], steps: int) -> list[int]:
    """Do the same for costs of any shape: one layer after the other, for every total."""
    reached = np.full(steps + 1, _IMPOSSIBLE)
    reached[0] = 0
    before = []
    for each in costs:
        before.append(reached)
        reached = _added(reached, each)
    taken = []
    for each, earlier in zip(reversed(costs), reversed(before), strict=True):
        most = min(steps, len(each) - 1)
        # Of equal ones the first: the later layer gives as little as it can.
        totals = each[: most + 1] + earlier[steps - most : steps + 1][::-1]
        taken.append(int(np.argmin(totals)))
        steps -= taken[-1]
    return taken[::-1]


def _added(reached: Costs, costs: Costs) -> Costs:
    """Return the least cost of every total once one more layer may take steps.

    It is the minimum over j of ``reached[t - j] + costs[j]``. Over each straight piece of
    `costs` that is the minimum of a sliding window, so that the time grows with the number of
    pieces, not with that of neurons.
    """
    from scipy.ndimage import minimum_filter1d

    result, totals = reached.copy(), np.arange(len(reached))
    slopes = np.diff(costs)
    corners = [0, *(np.flatnonzero(np.diff(slopes)) + 1), len(slopes)]
    for first, last in pairwise(corners[: len(slopes) + 1]):
        level = reached - slopes[first] * totals
        # Of each value and the `last - first` before it.
        least = minimum_filter1d(
            level,
            last - first + 1,
            origin=(last - first) // 2,
            mode="constant",
            cval=_IMPOSSIBLE,
        )
        here = totals[first:]
        line = costs[first] + slopes[first] * (here - first)
        np.minimum(result[first:], least[: len(here)] + line, out=result[first:])
    return np.minimum(result, _IMPOSSIBLE)
