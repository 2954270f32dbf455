"""Pruning by hand, for comparison: no code of the package is used here."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import torch
from torch import nn


SEPARATE = [
    ("gate_proj", "up_proj", "down_proj"),
    ("wi_0", "wi_1", "wo"),
    ("w1", "w3", "w2"),
]
FUSED = [("gate_up_proj", "down_proj"), ("input_linear", "output_linear")]
_STACKED = ("gate_up_proj", "down_proj", "gate_up_proj_bias")
#: Path of a module that is of images or sound, by its name alone.
_NOT_TEXT = re.compile("vision|visual|image|audio|speech|sound|vq")


#: The formulas of docs/criteria.md: of gate and up, each of shape (neurons, H).
FORMULAS = {
    "maw": lambda g, u: g.max(1) + abs(g.min(1)) + u.max(1) + abs(u.min(1)),
    "max_abs": lambda g, u: abs(g).max(1) + abs(u).max(1),
    "l1": lambda g, u: abs(g).sum(1) + abs(u).sum(1),
    "l2": lambda g, u: np.linalg.norm(g, axis=1) + np.linalg.norm(u, axis=1),
    "vow": lambda g, u: g.var(1, ddof=1) + u.var(1, ddof=1),
    "pon": lambda g, u: abs(g).sum(1) * abs(u).sum(1),
}


def _relative_peaks(rows):
    peaks = rows.max(1) + abs(rows.min(1))
    return peaks / (peaks.max() or 1)


#: Also of down, transposed, and of what goes into it, (tokens, neurons) for each text.
FORMULAS_OF_ACTIVITY = {
    "act": lambda g, u, d, x: (
        np.linalg.norm(d, axis=1) * np.linalg.norm(np.concatenate(x), axis=0)
    ),
    "maw_act": lambda g, u, d, x: (
        sum(map(_relative_peaks, (g, u, d)))
        * sum(np.linalg.norm(text, axis=0) for text in x)
    ),
}


def random_scores(neurons, layer, seed=0):
    """Draw the scores of the control: `layer` counts the MLPs of the model."""
    generator = torch.Generator().manual_seed(seed * 2**20 + layer)
    return torch.randperm(neurons, generator=generator).float()


def top(scores, width):
    """Return the `width` best of some scores; ties go to the lower index."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return torch.tensor(sorted(ranked[:width]))


def best(width_of, criterion="maw", seed=0):
    """Return the rule that keeps the best neurons; it slices one model.

    Args:
        width_of: The kept width, or a rule that returns it for the path of a module and its width.
        criterion: One of `FORMULAS`, or ``random``.
        seed: Seed of ``random``.
    """
    number = itertools.count()

    def kept_of(path, gate, up):
        if criterion == "random":
            scores = random_scores(len(gate), next(number), seed)
        else:
            # maw in float32, where neurons may be on a par.
            dtype = torch.float32 if criterion == "maw" else torch.float64
            scores = FORMULAS[criterion](gate.to(dtype).numpy(), up.to(dtype).numpy())
        width = width_of(path, len(scores)) if callable(width_of) else width_of
        return top(scores.tolist(), width)

    return kept_of


def listed(kept):
    """Return the rule that keeps the given neurons, one list per MLP in the model's order."""
    remaining = iter(kept)
    return lambda path, gate, up: torch.as_tensor(next(remaining))


def sliced(model, kept_of):
    """Return ``(state_dict, masks)`` of an unpruned model pruned by hand.

    `kept_of` is a rule as `best` and `listed` return it: from the path of a module and its rows
    of gate and up to the neurons it keeps. `masks` maps the name of each parameter with down
    columns to a mask that is 0 in the columns of removed neurons. Every GLU-MLP outside of towers
    for images and sound is sliced.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = {}
    for path, module in model.named_modules():
        if _NOT_TEXT.search(path):
            continue
        parts = dict(module.named_children()) | dict(module._parameters)
        for *rows, down in SEPARATE + FUSED:
            if {*rows, down} <= parts.keys() and isinstance(parts[rows[0]], nn.Linear):
                _dense(state, masks, path, rows, down, kept_of)
        if isinstance(parts.get("gate_up_proj"), nn.Parameter):
            _experts(state, masks, path, module, kept_of)
    return state, masks


@torch.no_grad()
def narrow(model, kept_of):
    """Give `model` its sliced parameters, in place, and return it."""
    state, _ = sliced(model, kept_of)
    for name, parameter in list(model.named_parameters()):
        if parameter.shape != state[name].shape:
            path, _, own = name.rpartition(".")
            setattr(model.get_submodule(path), own, nn.Parameter(state[name]))
    return model


def _dense(state, masks, path, rows, down, kept_of):
    """Slice three matrices, or two of which one holds gate above up."""
    gate, up = torch.cat([state[f"{path}.{name}.weight"] for name in rows]).chunk(2)
    kept = kept_of(path, gate, up)
    chosen = torch.cat([kept, kept + len(gate)]) if len(rows) == 1 else kept
    for name in (f"{path}.{row}.{kind}" for row in rows for kind in ("weight", "bias")):
        if name in state:
            state[name] = state[name][chosen]
    name = f"{path}.{down}.weight"
    masks[name] = torch.zeros_like(state[name])
    masks[name][:, kept] = 1
    state[name] = state[name][:, kept]


def _experts(state, masks, path, module, kept_of):
    """Slice experts in one tensor, transposed or not; gate is above up, or they alternate."""
    b, d, bias = (f"{path}.{n}" for n in _STACKED)
    transposed = state[b].shape[2] == 2 * state[d].shape[1]

    def turned(tensor):
        return tensor.transpose(1, 2).contiguous() if transposed else tensor

    both, down = turned(state[b]), turned(state[d])
    new, mask, width = {b: [], d: [], bias: []}, torch.zeros_like(down), down.shape[2]
    alternate = not getattr(module, "is_concatenated", True)
    rows = torch.arange(2 * width).view(2, width)
    if alternate:
        rows = torch.arange(2 * width).view(width, 2).T
    for expert in range(len(both)):
        kept = kept_of(path, both[expert][rows[0]], both[expert][rows[1]])
        chosen = (rows[:, kept].T if alternate else rows[:, kept]).reshape(-1)
        mask[expert][:, kept] = 1
        new[b].append(both[expert][chosen])
        new[d].append(down[expert][:, kept])
        if bias in state:
            new[bias].append(state[bias][expert][chosen])
    masks[d] = turned(mask)
    state |= {name: turned(torch.stack(new[name])) for name in (b, d)}
    if bias in state:
        state[bias] = torch.stack(new[bias])


def share(percent, primary):
    """Return the rule of ``prune_percent`` of the `primary` width; others keep its proportion."""
    kept = primary - math.floor(percent * primary / 100)
    return lambda path, width: math.ceil(width * kept / primary)
