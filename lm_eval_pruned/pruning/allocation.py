"""Allocation: how the neurons of a size are shared among the layers of a model.

A uniform cut says how many neurons stay in all. An allocation keeps as many, but takes them
where measured losses or scores say that they matter least. Every layer has a curve, the cost of
removing 0, 1, 2, ... of its neurons, and `allocate` finds the widths of least total cost.
Costs are whole numbers, so the same curves give the same widths on every machine.

The problem is that of marginal allocation (Fox 1966, "Discrete Optimization via Marginal
Analysis", Management Science 13(3)) and of bit allocation in coding (Shoham & Gersho 1988,
IEEE Trans. ASSP 36(9)). Where every curve is convex, taking the cheapest next neuron is
optimal. Elsewhere a dynamic program over the layers is exact, as in SPDY (Frantar & Alistarh
2022, arXiv 2201.13096), which shares out sparsity in this way.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import numbers
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lm_eval_pruned.pruning.allocation_names import GLOBAL, GROUP, MEASURED, UNIFORM
from lm_eval_pruned.pruning.calibration import check_observable
from lm_eval_pruned.pruning.criteria import CALIBRATED, RANDOM, load_declared
from lm_eval_pruned.pruning.layer_widths import written_by_layer
from lm_eval_pruned.pruning.layouts import UnsupportedModelError, describe


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from lm_eval_pruned.pruning.curves import Sensitivity
    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.widths import Widths

    Costs = NDArray[np.int64]
    Scores = NDArray[np.float64]

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.allocation")

#: Shares of a layer's neurons to remove when its loss is measured, in percent.
MEASURED_CUTS = (25, 50, 75, 87.5)
#: Costs are whole numbers of this, in nats or whatever a curve is measured in.
RESOLUTION = 1e-12
#: More than any total of costs, and small enough to be added to one.
_IMPOSSIBLE = np.int64(1) << np.int64(61)


class Evidence(Protocol):
    """What decides between layers, computed when it is asked for."""

    def scores(self, criterion: str) -> Mapping[str, Tensor]:
        """Return the scores of every GLU-MLP by a criterion, by name of the MLP, each (I,)."""

    def curves(self, criteria: Sequence[str]) -> Sensitivity:
        """Return the losses with one layer cut at a time by `MEASURED_CUTS` and each criterion."""


def plan_layers(plan: PrunePlan, widths: Widths, evidence: Evidence) -> PrunePlan:
    """Return `plan` with the width, and the criterion, of every layer that it prunes.

    Args:
        plan: A plan of the model; returned as it is unless it `is_open`.
        widths: The model's widths.
        evidence: Scores and curves of the same model.

    Raises:
        ValueError: The bounds leave more neurons than the size asks for; see also
            `allocate_by_scores`.
        UnsupportedModelError: See `check_comparable`.
    """
    if not plan.is_open:
        return plan
    check_comparable(plan, widths)
    kept = _uniform(plan, widths)
    before = {layer: widths.layers[layer] for layer in kept}
    neurons = sum(kept.values())
    if plan.tried or plan.allocation in MEASURED:
        tried = plan.tried or (plan.criterion,)
        found = evidence.curves(tried)
        costs = {n: _costs(found, n, tried, plan.seed) for n in before}
        if plan.allocation in MEASURED:
            kept = _by_losses(plan, costs, before, neurons)
        names = ("file", "sha256", "texts", "tokens")
        text = {name: getattr(found, name) for name in names}
        plan = dataclasses.replace(plan, measured_on=text)
        if plan.tried:
            best = tuple(
                (n, tried[int(np.argmin(costs[n][:, before[n] - width]))])
                for n, width in kept.items()
            )
            plan = dataclasses.replace(plan, layer_criteria=best)
            said = written_by_layer(best)
            logger.info("criterion=best scores the layers by: %s.", said)
    else:
        by_layer = _by_layer(evidence.scores(plan.criterion), widths, before)
        kept = allocate_by_scores(
            plan.allocation,
            by_layer,
            neurons=neurons,
            min_width=plan.min_width or 1,
            multiple_of=plan.multiple_of,
        )
    if plan.allocation != UNIFORM:
        plan = plan.with_layers(kept)
        said = written_by_layer(plan.layer_widths or ())
        logger.info("allocation=%s keeps of each layer: %s.", plan.allocation, said)
    return plan


def check_comparable(plan: PrunePlan, widths: Widths) -> None:
    """Refuse a model whose layers an open plan cannot compare, before any weight is read.

    Args:
        plan: The plan.
        widths: The model's widths.

    Raises:
        UnsupportedModelError: An allocation would have to weigh layers against each other that
            hold different MLPs, a criterion cannot be observed, or losses cannot be measured.
    """
    model = widths.skeleton()
    if model.config.is_encoder_decoder and plan.allocation in MEASURED:
        check_observable(model, "allocation=global")
    if model.config.is_encoder_decoder and plan.tried:
        check_observable(model)
    if {*plan.tried} & {*CALIBRATED}:
        check_observable(model, "criteria_tried=maw+l2")
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


def _costs(found: Sensitivity, layer: int, criteria: Sequence[str], seed: int) -> Costs:
    """Return the costs of cutting a layer by each criterion, shape (criteria, I + 1)."""
    curves = [
        found.curve(layer, name, seed if name == RANDOM else None) for name in criteria
    ]
    return np.stack(
        [costs_of_losses(c.width_before, c.widths, found.rises(c)) for c in curves]
    )


def _by_losses(
    plan: PrunePlan,
    costs: Mapping[int, Costs],
    before: Mapping[int, int],
    neurons: int,
) -> dict[int, int]:
    """Return the widths of least total damage, not below what was measured if that will do."""
    lowest = plan.min_width
    if lowest is None:
        share = 1 - max(MEASURED_CUTS) / 100
        # What is not known of narrower layers is not relied on without need.
        needed = neurons // len(before) // plan.multiple_of * plan.multiple_of
        lowest = max(1, min(math.ceil(min(before.values()) * share), needed))
    envelopes = [each.min(axis=0) for each in costs.values()]
    found = allocate(envelopes, neurons, min_width=lowest, multiple_of=plan.multiple_of)
    return dict(zip(before, found, strict=True))


def _by_layer(
    scores: Mapping[str, Tensor], widths: Widths, before: Mapping[int, int]
) -> dict[int, Scores]:
    """Return the scores of each layer; of experts, what each gives up with its nth neuron."""
    found: dict[int, list[Scores]] = {layer: [] for layer in before}
    for mlp in widths.mlps:
        if mlp.block in found and widths.actual[mlp.name] == before[mlp.block]:
            found[mlp.block].append(np.asarray(scores[mlp.name], dtype=np.float64))
    return {
        layer: each[0] if len(each) == 1 else np.mean([np.sort(e) for e in each], 0)
        for layer, each in found.items()
    }


def allocate_by_scores(
    allocation: str, scores: Mapping[int, Scores], **bounds: int
) -> dict[int, int]:
    """Return the kept width of each layer by an allocation that looks at scores.

    Args:
        allocation: ``global``, or the name of one that another package declares.
        scores: The scores of each layer, each of shape (I,), by its number, ascending.
        **bounds: What `global_ranking` takes besides.

    Raises:
        ValueError: The bounds leave more than `neurons`; or the allocation of another package
            cannot be imported, or returns anything but widths that keep as many.
    """
    by_layer = [*scores.values()]
    if allocation == GLOBAL:
        return dict(zip(scores, global_ranking(by_layer, **bounds), strict=True))
    found = load_declared(GROUP, "allocation", allocation)(by_layer, **bounds)
    expected = (
        f"it must return {len(scores)} whole numbers, each from 1 to the width of its layer, "
        f"{bounds['neurons']} in all"
    )
    try:
        widths = [*found]
    except TypeError:
        raise ValueError(
            f"allocation={allocation} returned a {type(found).__name__}: {expected}."
        ) from None
    whole = all(isinstance(each, numbers.Integral) for each in widths)
    if (
        not whole
        or len(widths) != len(by_layer)
        or not all(1 <= n <= len(own) for n, own in zip(widths, by_layer, strict=True))
        or sum(widths) != bounds["neurons"]
    ):
        total = f", {sum(widths)} in all" if whole else ""
        raise ValueError(
            f"allocation={allocation} returned {widths}{total}: {expected}."
        )
    return dict(zip(scores, map(int, widths), strict=True))


def global_ranking(
    scores: Sequence[Scores], *, neurons: int, min_width: int, multiple_of: int
) -> tuple[int, ...]:
    """Keep the neurons with the highest scores of all layers together.

    Scores of different layers are no common scale, so each layer's are standardised first:
    ``(score - mean) / standard deviation``.

    Args:
        scores: The scores of each layer, each of shape (I,).
        neurons: Neurons to keep in all.
        min_width: Neurons to leave in each layer at least.
        multiple_of: Widths are multiples of this.

    Returns:
        The kept width of each layer.

    Source: FLAP (arXiv 2312.11983), section 4.2, which standardises its scores in this way
    to compare them across layers.
    """
    costs = []
    for each in scores:
        ascending = np.sort((each - each.mean()) / (each.std() or 1.0))
        marginal = np.rint(ascending / RESOLUTION).astype(np.int64)
        costs.append(np.cumsum([0, *marginal], dtype=np.int64))
    return allocate(costs, neurons, min_width=min_width, multiple_of=multiple_of)


def costs_of_losses(width: int, kept: Sequence[int], rises: Sequence[float]) -> Costs:
    """Return the cost curve through measured losses, made monotone.

    Measured points are noisy: a layer that is cut further may seem to do better. They are
    replaced by the closest ones, in the sense of least squares, that neither fall nor are
    below 0 (isotonic regression; Barlow et al. 1972), and joined by straight lines. Below
    the smallest measured width the curve goes on as steeply as it has been anywhere.

    Args:
        width: The layer's width I before, in neurons.
        kept: Measured widths, in neurons, ascending, each below `width`.
        rises: By how much the loss rose at each of them, in nats.

    Returns:
        The cost of removing 0, 1, ... I neurons, shape (I + 1,), int64, in `RESOLUTION`.

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
    curves: Sequence[Costs],
    neurons: int,
    *,
    min_width: int = 1,
    multiple_of: int = 1,
) -> tuple[int, ...]:
    """Return the widths of least total cost that keep `neurons` neurons in all.

    Of equally good allocations, it is the one in which the last layer gives the least, then the
    last but one, and so on.

    Args:
        curves: The cost of removing 0, 1, ... I neurons of each layer, shape (I + 1,), int64.
        neurons: Neurons to keep, in all layers together. If no widths that are allowed keep
            exactly as many, the most below that are kept.
        min_width: Neurons to leave in each layer at least. A layer that has no more stays.
        multiple_of: Widths are multiples of this. A layer that has fewer neurons stays.

    Returns:
        The kept width of each layer, in the order of `curves`.

    Raises:
        ValueError: The bounds leave more than `neurons`.

    Example:
        >>> flat, steep = (costs_of_losses(100, [25], [rise]) for rise in (0.0, 1.5))
        >>> allocate([steep, flat], 150, min_width=20)
        (100, 50)
        >>> allocate([steep, flat], 150, min_width=60)
        (90, 60)
    """
    bounds = []
    for curve in curves:
        width = len(curve) - 1
        low = -(-min_width // multiple_of) * multiple_of
        high = width // multiple_of * multiple_of
        bounds.append((width, width) if high < low else (low, high))
    least, most = (sum(each) for each in zip(*bounds, strict=True))
    if neurons < least:
        raise ValueError(
            f"min_width={min_width} keeps {least} neurons in {len(curves)} layers, but the size "
            f"that was asked for keeps {neurons}: pass a min_width of at most "
            f"{neurons // len(curves)}, or a larger size."
        )
    costs = []
    for curve, (low, high) in zip(curves, bounds, strict=True):
        part = curve[len(curve) - 1 - high : len(curve) - low : multiple_of]
        costs.append(part - part[0])
    steps = max(0, -(-(most - neurons) // multiple_of))
    steps = min(steps, sum(len(part) - 1 for part in costs))
    convex = all(np.all(np.diff(part, 2) >= 0) for part in costs)
    taken = (_greedy if convex else _dynamic)(costs, steps)
    pairs = zip(bounds, taken, strict=True)
    return tuple(high - multiple_of * each for (_, high), each in pairs)


def _greedy(costs: Sequence[Costs], steps: int) -> list[int]:
    """Take the cheapest next step of any layer, `steps` times; the costs are convex.

    Args:
        costs: ``costs[l][j]`` is the cost of j steps in layer l.
        steps: Steps to take in all.
    """
    marginal = np.concatenate([np.diff(each) for each in costs])
    owner = np.repeat(np.arange(len(costs)), [len(each) - 1 for each in costs])
    chosen = owner[np.argsort(marginal, kind="stable")[:steps]]
    return np.bincount(chosen, minlength=len(costs)).tolist()


def _dynamic(costs: Sequence[Costs], steps: int) -> list[int]:
    """Do the same for costs of any shape: one layer after the other, for every total.

    Takes and returns what `_greedy` does.
    """
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
    result = reached.copy()
    totals = np.arange(len(reached), dtype=np.int64)
    slopes = np.diff(costs)
    corners = [0, *(np.flatnonzero(np.diff(slopes)) + 1), len(slopes)]
    for first, last in pairwise(corners):
        if first >= min(len(reached), len(slopes)):
            break
        slope = slopes[first]
        level = reached - slope * totals
        # The minimum of each value and the `last - first` before it, by doubling the window.
        reach = 0
        while reach < last - first:
            step = min(reach + 1, last - first - reach)
            level[step:] = np.minimum(level[step:], level[:-step].copy())
            reach += step
        here = totals[first:]
        line = costs[first] + slope * (here - first)
        np.minimum(result[first:], level[: len(here)] + line, out=result[first:])
    return np.where(result > _IMPOSSIBLE // 2, _IMPOSSIBLE, result)
