"""Pruning by hand: the specification that the package is compared with."""

from __future__ import annotations

import torch
from torch import nn


def glu_blocks(model):
    """Yield every module with the three projections, in the order of the model."""
    for module in model.modules():
        if all(hasattr(module, p) for p in ("gate_proj", "up_proj", "down_proj")):
            yield module


def maw_scores(block) -> list[float]:
    """Return the score of the study, one row at a time."""
    scores = []
    for gate, up in zip(block.gate_proj.weight, block.up_proj.weight, strict=True):
        parts = [
            row.max().float() + row.min().float().abs() for row in (gate.data, up.data)
        ]
        scores.append(float(parts[0] + parts[1]))
    return scores


def kept_by_hand(scores: list[float], width: int) -> list[int]:
    """Return the `width` best neurons in their own order; ties to the lower index."""
    ranked = sorted(range(len(scores)), key=lambda neuron: (-scores[neuron], neuron))
    return sorted(ranked[:width])


@torch.no_grad()
def slice_by_hand(model, kept: list[list[int]]):
    """Replace the projections of every GLU-MLP in place, neuron by neuron."""
    for block, neurons in zip(glu_blocks(model), kept, strict=True):
        for name in ("gate_proj", "up_proj"):
            linear = getattr(block, name)
            linear.weight = nn.Parameter(
                torch.stack([linear.weight[n] for n in neurons])
            )
            if linear.bias is not None:
                linear.bias = nn.Parameter(
                    torch.stack([linear.bias[n] for n in neurons])
                )
        down = block.down_proj
        down.weight = nn.Parameter(
            torch.stack([down.weight[:, n] for n in neurons], dim=1)
        )
    return model


@torch.no_grad()
def zero_removed(model, kept: list[list[int]]):
    """Silence the removed neurons of the full model through ``down_proj``."""
    for block, neurons in zip(glu_blocks(model), kept, strict=True):
        removed = sorted(set(range(block.down_proj.weight.shape[1])) - set(neurons))
        block.down_proj.weight[:, removed] = 0
    return model


def assert_same_model(one, other):
    """Fail unless two models have the same parameters, bit for bit."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype, name
        assert torch.equal(parameter, theirs[name]), name
