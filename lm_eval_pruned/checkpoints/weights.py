"""The files of weights of a checkpoint: which there are, and what their headers say."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from lm_eval_pruned.checkpoints.configs import HUB


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor
    from transformers import PretrainedConfig

#: Dtypes of weights, as the headers of safetensors call them.
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
#: Files of weights, in the order in which transformers looks for them.
_SAFE_FILES = ("model.safetensors", "model.safetensors.index.json")
_TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def checkpoint_files(
    pretrained: str, config: PretrainedConfig, arguments: Mapping[str, Any]
) -> list[str]:
    """Return the files of weights that ``from_pretrained`` reads, fetched from the Hub if need be.

    Empty where there are none, which ``from_pretrained`` says better.

    Source: `transformers.modeling_utils._get_resolved_checkpoint_files`.
    """
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    where = {name: arguments[name] for name in HUB if arguments.get(name) is not None}
    safe, variant = (arguments.get(name) for name in ("use_safetensors", "variant"))
    names = [*_SAFE_FILES] if safe is not False else []
    names += [] if safe else _TORCH_FILES
    if variant:
        names = [re.sub(r"\.(\w+)$", rf".{variant}.\1", name) for name in names]
    if named := getattr(config, "transformers_weights", None):
        names = [named]
    for name in names:
        with contextlib.suppress(OSError):
            file: Any = cached_file(pretrained, name, **where)
            if not name.endswith(".json"):
                return [file]
            return get_checkpoint_shard_files(pretrained, file, **where)[0]
    return []


def dtypes_in(file: str) -> Iterator[tuple[str, torch.dtype]]:
    """Yield the dtype of each tensor of a file of weights, by name, where it is one of `_FLOATS`."""
    from transformers.modeling_utils import load_state_dict

    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if dtype := _FLOATS.get(tensors.get_slice(name).get_dtype()):
                    yield name, dtype
        return
    for name, tensor in load_state_dict(file, map_location="meta").items():
        if tensor.dtype in _FLOATS.values():
            yield name, tensor.dtype


def tensor_in(file: str, name: str) -> Tensor:
    """Return one tensor of a file of weights."""
    from transformers.modeling_utils import load_state_dict

    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)
    return load_state_dict(file)[name]
