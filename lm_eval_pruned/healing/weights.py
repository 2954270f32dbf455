"""Which weights of a model are trained, the memory that takes, and their precision meanwhile."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lm_eval_pruned.pruning.layouts import find_glu_mlps


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel


def trained_weights(model: PreTrainedModel, method: str) -> list[nn.Parameter]:
    """Return the parameters of a model that ``mlp`` or ``full`` trains."""
    if method == "full":
        return [*model.parameters()]
    found = (m.parameter(r) for m in find_glu_mlps(model) for r in m.regions.values())
    return [*{id(parameter): parameter for parameter in found}.values()]


def bytes_to_train(model: PreTrainedModel, method: str) -> int:
    """Return the bytes of float32 weights, and of gradients and AdamW's two moments of those trained."""
    every = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in trained_weights(model, method))
    return 4 * every + 12 * trained


def write_trained(model: nn.Module, file: Path) -> None:
    """Write the weights of a model that gradients reach, by name; replaces the file."""
    weights = {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    unfinished = file.with_name(f"unfinished-{file.name}")
    save_file(weights, unfinished)
    unfinished.replace(file)


@torch.no_grad()
def read_trained(model: nn.Module, file: Path) -> None:
    """Give a model the weights that `write_trained` left in a file."""
    parameters = dict(model.named_parameters())
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():
            parameters[name].copy_(weights.get_tensor(name))


@contextlib.contextmanager
def trainable(model: PreTrainedModel, method: str) -> Iterator[None]:
    """Copy the weights of a model to float32, and let gradients reach those that a method trains.

    Steps are smaller than what 16 bits can add. Afterwards, weights have their dtypes again.
    """
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = [(tensor.dtype, tensor.requires_grad) for tensor in tensors]
    model.requires_grad_(False)
    for tensor in tensors:
        if tensor.is_floating_point():
            # A mapped file cannot be trained.
            tensor.data = tensor.data.to(torch.float32, copy=True)
    for parameter in trained_weights(model, method):
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for tensor, (dtype, has_gradient) in zip(tensors, dtypes, strict=True):
            tensor.grad = None
            tensor.data = tensor.data.to(dtype)
            tensor.requires_grad_(has_gradient)
