"""The parts of parameters that hold one projection of one GLU-MLP each.

A parameter of a model may hold one projection, gate and up together, or those of many
experts. A `Region` cuts one out, and `assemble` puts them together again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True)
class Region:
    """The part of a parameter that holds one projection of one GLU-MLP.

    Attributes:
        parameter: Full name of the parameter in the model.
        expert: Position on its first axis, where it stacks experts.
        half: 0 for gate and 1 for up, where it holds both.
        interleaved: Whether gate and up alternate row by row, instead of all gate
            rows preceding all up rows.
        transposed: Whether its weights are stored as (inputs, outputs).
    """

    parameter: str
    expert: int | None = None
    half: int | None = None
    interleaved: bool = False
    transposed: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """Cut the region out of its parameter.

        Args:
            tensor: The whole parameter.

        Returns:
            A view of shape (I, H) for gate and up, (H, I) for down, (I,) for biases.
        """
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transposed:
            tensor = tensor.T
        if self.half is None:
            return tensor
        if self.interleaved:
            return tensor[self.half :: 2]
        return tensor.chunk(2)[self.half]


def assemble(pieces: Mapping[Region, Tensor]) -> Tensor:
    """Put the regions of one parameter together again; the inverse of `Region.view`.

    Args:
        pieces: Every region of the parameter, each of any width, equal within the
            parameter.

    Returns:
        The parameter, contiguous.
    """
    by_expert: dict[int | None, list[Tensor]] = {}
    regions = sorted(pieces, key=lambda region: (region.expert or 0, region.half or 0))
    for region in regions:
        by_expert.setdefault(region.expert, []).append(pieces[region])
    first = regions[0]
    experts = []
    for halves in by_expert.values():
        tensor = halves[0]
        if first.half is not None:
            tensor = (
                torch.stack(halves, dim=1).flatten(0, 1)
                if first.interleaved
                else torch.cat(halves)
            )
        experts.append(tensor.T if first.transposed else tensor)
    if first.expert is not None:
        return torch.stack(experts)
    return experts[0].contiguous()
