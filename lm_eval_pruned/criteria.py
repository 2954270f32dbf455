"""Criteria: importance scores of the neurons of a GLU-MLP.

A criterion takes the rows of ``gate_proj`` and ``up_proj`` and returns one score
per neuron; the neurons with the highest scores are kept. This module imports
torch only to compute, so that names can be checked without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Criterion = Callable[[Tensor, Tensor], Tensor]

#: Rows are scored in blocks of about this many elements, which bounds the float32 copy.
_BLOCK_ELEMENTS = 1 << 22


def _peak_to_peak(rows: Tensor) -> Tensor:
    # max and min are exact in every dtype, so only I values are converted.
    return rows.amax(dim=1).float() + rows.amin(dim=1).float().abs()


def maw(gate: Tensor, up: Tensor) -> Tensor:
    """Peak-to-peak magnitude, the criterion of the study.

    score = (max g + abs(min g)) + (max u + abs(min u)) over the rows g and u.

    Args:
        gate: Rows of ``gate_proj``, shape (neurons, H), floating point.
        up: Rows of ``up_proj``, shape (neurons, H), floating point.

    Returns:
        Scores, shape (neurons,), float32.

    Source: arXiv 2512.22671, equation 5. Its first version calls the score
    Maximum Absolute Weight, its later one Peak-to-Peak Magnitude.
    """
    return _peak_to_peak(gate) + _peak_to_peak(up)


def max_abs(gate: Tensor, up: Tensor) -> Tensor:
    """Largest absolute weight, literally: max(abs(g)) + max(abs(u)).

    Shapes and dtype as in `maw`.
    """
    return gate.abs().amax(dim=1).float() + up.abs().amax(dim=1).float()


def l1(gate: Tensor, up: Tensor) -> Tensor:
    """Sum of the l1 norms of the two rows. Shapes and dtype as in `maw`."""
    return gate.float().norm(p=1, dim=1) + up.float().norm(p=1, dim=1)


def l2(gate: Tensor, up: Tensor) -> Tensor:
    """Sum of the l2 norms of the two rows. Shapes and dtype as in `maw`."""
    return gate.float().norm(p=2, dim=1) + up.float().norm(p=2, dim=1)


def vow(gate: Tensor, up: Tensor) -> Tensor:
    """Sum of the variances of the weights of the two rows (divisor H - 1).

    Shapes and dtype as in `maw`. Source: arXiv 2512.22671, section 3.2.
    """
    return gate.float().var(dim=1) + up.float().var(dim=1)


def pon(gate: Tensor, up: Tensor) -> Tensor:
    """Product of the l1 norms of the two rows.

    Shapes and dtype as in `maw`. Source: arXiv 2512.22671, section 3.2.
    """
    return gate.float().norm(p=1, dim=1) * up.float().norm(p=1, dim=1)


CRITERIA: dict[str, Criterion] = {
    "maw": maw,
    "max_abs": max_abs,
    "l1": l1,
    "l2": l2,
    "vow": vow,
    "pon": pon,
}
ALIASES = {"ppm": "maw"}
#: The control: scores that do not look at the weights.
RANDOM = "random"


def canonical_name(criterion: str) -> str:
    """Return the name of a criterion without aliases.

    Raises:
        ValueError: `criterion` is unknown; the message lists the known ones.
    """
    name = ALIASES.get(criterion, criterion)
    if name != RANDOM and name not in CRITERIA:
        known = ", ".join([*CRITERIA, RANDOM, *ALIASES])
        raise ValueError(f"criterion={criterion} is unknown: pass one of {known}.")
    return name


def score_neurons(
    gate: Tensor, up: Tensor, criterion: str, *, layer: int = 0, seed: int = 0
) -> Tensor:
    """Score the neurons of one GLU-MLP on the device that holds its weights.

    Args:
        gate: ``gate_proj.weight``, shape (I, H), floating point.
        up: ``up_proj.weight``, shape (I, H), same dtype and device.
        criterion: Canonical name of a criterion.
        layer: Position of the MLP in its model; with `seed` it fixes ``random``.
        seed: Seed of ``random``; other criteria ignore it.

    Returns:
        Scores, shape (I,), float32, on the same device.
    """
    import torch

    if criterion == RANDOM:
        generator = torch.Generator().manual_seed((seed << 20) + layer)
        order = torch.randperm(gate.shape[0], generator=generator)
        return order.to(device=gate.device, dtype=torch.float32)
    function = CRITERIA[criterion]
    rows = max(1, _BLOCK_ELEMENTS // gate.shape[1])
    return torch.cat(
        [
            function(gate_rows, up_rows)
            for gate_rows, up_rows in zip(gate.split(rows), up.split(rows), strict=True)
        ]
    )


def kept_set(scores: Tensor, width: int) -> Tensor:
    """Return the kept neurons in their original order; ties go to the lower index.

    Args:
        scores: Shape (I,), floating point, finite.
        width: Kept width k, 1 <= k <= I.

    Returns:
        Indices, shape (k,), int64, ascending.
    """
    order = scores.sort(descending=True, stable=True).indices
    return order[:width].sort().values
