"""Allocations by name: from measured curves or scores to the width of each layer.

``uniform`` cuts every layer alike. The others keep as many neurons in all, but not the same
number in every layer: ``sensitivity`` goes by the loss with one layer cut at a time,
``global`` by one ranking of all neurons, and other packages add their own under the
entry-point group `GROUP`; ``docs/allocation.md`` shows how.

Nothing here imports torch.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.criteria import declared_elsewhere, load_declared


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Scores = NDArray[np.float64]
    #: Takes the scores of each layer, and by name: neurons, min_width, multiple_of.
    Allocation = Callable[..., Sequence[int]]

#: Every layer alike.
UNIFORM = "uniform"
#: By the loss on calibration text.
SENSITIVITY = "sensitivity"
MEASURED = (SENSITIVITY,)
#: Entry-point group under which other packages declare allocations, name -> function.
GROUP = "lm_eval_pruned.allocations"


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
    from lm_eval_pruned.pruning.allocation import CostCurve, allocate

    curves = []
    for number, each in enumerate(scores):
        spread = each.std()
        standard = (each - each.mean()) / (spread if spread > 0 else 1.0)
        curves.append(CostCurve.of_scores(number, standard))
    return allocate(curves, neurons, min_width=min_width, multiple_of=multiple_of)


#: Allocations that go by the scores of the neurons.
RANKED: dict[str, Allocation] = {"global": global_ranking}


def canonical_allocation(allocation: str) -> str:
    """Return the name of an allocation.

    Raises:
        ValueError: It is unknown; the message lists the known ones.
    """
    if allocation in (UNIFORM, *MEASURED, *RANKED):
        return allocation
    added = declared_elsewhere(GROUP)
    if allocation not in added:
        known = ", ".join([UNIFORM, *MEASURED, *RANKED, *sorted(added)])
        raise ValueError(f"allocation={allocation} is unknown: pass one of {known}.")
    return allocation


def allocate_by_scores(
    allocation: str,
    scores: Mapping[int, Scores],
    **bounds: int,
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
    function = RANKED.get(allocation)
    ours = function is not None
    if function is None:
        function = load_declared(GROUP, "allocation", allocation)
    widths = function([*scores.values()], **bounds)
    if not ours:
        before = [*map(len, scores.values())]
        widths = _checked(allocation, widths, before, bounds["neurons"])
    return dict(zip(scores, widths, strict=True))


def _checked(
    allocation: str, widths: Any, before: Sequence[int], neurons: int
) -> list[int]:
    """Return the widths of an allocation that this package did not write."""
    expected = (
        f"it must return {len(before)} whole numbers, each from 1 to the width of its layer, "
        f"{neurons} in all"
    )
    try:
        found = [*widths]
    except TypeError:
        raise ValueError(
            f"allocation={allocation} returned a {type(widths).__name__}: {expected}."
        ) from None
    if (
        len(found) != len(before)
        or not all(isinstance(each, numbers.Integral) for each in found)
        or not all(1 <= n <= own for n, own in zip(found, before, strict=True))
        or sum(found) != neurons
    ):
        raise ValueError(
            f"allocation={allocation} returned {found}, {_sum_of(found)}: {expected}."
        )
    return [int(each) for each in found]


def _sum_of(found: list[Any]) -> str:
    try:
        return f"{sum(found)} in all"
    except TypeError:
        return "which cannot be added"
