"""Pruning by hand, for comparison: no code of the package is used here.

Modules are told apart by what they hold, one rule per layout, and every neuron is
scored and sliced in a loop over plain tensors.
"""

from __future__ import annotations

import math

import torch
from torch import nn


SEPARATE = [
    ("gate_proj", "up_proj", "down_proj"),
    ("wi_0", "wi_1", "wo"),
    ("w1", "w3", "w2"),
]
FUSED = [("gate_up_proj", "down_proj"), ("input_linear", "output_linear")]


def peak_to_peak(gate, up):
    """Return the study's score of each row pair, float32."""
    gate, up = gate.float(), up.float()
    return (
        gate.max(1).values
        + gate.min(1).values.abs()
        + up.max(1).values
        + up.min(1).values.abs()
    )


def keep(gate, up, width):
    """Return the best neurons, ascending; ties go to the lower index."""
    scores = peak_to_peak(gate, up).tolist()
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return torch.tensor(sorted(ranked[:width]))


def sliced(model, width_of, language=""):
    """Return the state dict of `model` pruned by hand, and the removed neurons.

    Args:
        model: An unpruned model.
        width_of: From the path of a module and its width to its kept width.
        language: Path of the part to prune.

    Returns:
        ``(state_dict, masks)``: masks maps the name of each parameter with down
        columns to a mask that is 0 in the columns of removed neurons.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = {}
    for path, module in model.named_modules():
        if not path.startswith(language):
            continue
        parts = dict(module.named_children()) | dict(module._parameters)
        for gate, up, down in SEPARATE:
            if isinstance(parts.get(gate), nn.Linear) and {up, down} <= parts.keys():
                g, u, d = (f"{path}.{name}.weight" for name in (gate, up, down))
                kept = keep(state[g], state[u], width_of(path, len(state[g])))
                masks[d] = _mask(state[d], kept)
                for name in (g, u, f"{path}.{gate}.bias", f"{path}.{up}.bias"):
                    if name in state:
                        state[name] = state[name][kept]
                state[d] = state[d][:, kept]
        for both, down in FUSED:
            if isinstance(parts.get(both), nn.Linear) and down in parts:
                b, d = f"{path}.{both}.weight", f"{path}.{down}.weight"
                width = len(state[b]) // 2
                kept = keep(state[b][:width], state[b][width:], width_of(path, width))
                masks[d] = _mask(state[d], kept)
                for name in (b, f"{path}.{both}.bias"):
                    if name in state:
                        state[name] = torch.cat(
                            [state[name][kept], state[name][kept + width]]
                        )
                state[d] = state[d][:, kept]
        if isinstance(parts.get("gate_up_proj"), nn.Parameter):
            _experts(state, masks, path, module, width_of)
    return state, masks


def _experts(state, masks, path, module, width_of):
    b, d = f"{path}.gate_up_proj", f"{path}.down_proj"
    bias = f"{path}.gate_up_proj_bias"
    transposed = state[b].shape[2] == 2 * state[d].shape[1]
    new = {b: [], d: [], bias: []}
    masks[d] = torch.zeros_like(state[d])
    for expert in range(len(state[b])):
        both, down = state[b][expert], state[d][expert]
        if transposed:
            both, down = both.T.contiguous(), down.T.contiguous()
        width = down.shape[1]
        if getattr(module, "is_concatenated", True):
            rows = torch.arange(2 * width).view(2, width)
        else:
            rows = torch.arange(2 * width).view(width, 2).T
        kept = keep(both[rows[0]], both[rows[1]], width_of(path, width))
        chosen = rows[:, kept].reshape(-1)
        if not getattr(module, "is_concatenated", True):
            chosen = rows[:, kept].T.reshape(-1)
        mask = _mask(down, kept)
        masks[d][expert] = mask.T if transposed else mask
        new[b].append(both[chosen].T if transposed else both[chosen])
        new[d].append(down[:, kept].T if transposed else down[:, kept])
        if bias in state:
            new[bias].append(state[bias][expert][chosen])
    for name, tensors in new.items():
        if tensors:
            state[name] = torch.stack(tensors)


def _mask(down, kept):
    mask = torch.zeros_like(down)
    mask[:, kept] = 1
    return mask


def share(percent, primary):
    """Return the rule ``(path, width) -> kept width`` of ``prune_percent``.

    Args:
        percent: Share to remove.
        primary: Width to which it refers; others keep the same proportion.
    """
    kept = primary - math.floor(percent * primary / 100)
    return lambda path, width: math.ceil(width * kept / primary)
