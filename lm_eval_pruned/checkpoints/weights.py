"""The files of weights of a checkpoint: which there are, what their headers say, and what is wrong.

transformers initialises missing tensors at random. Here a checkpoint that does not fit its config is
refused, with one sentence that names the tensor.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open

from lm_eval_pruned.checkpoints.configs import HUB
from lm_eval_pruned.pruning.layouts import neuron_axis, regions_by_parameter


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from lm_eval_pruned.pruning.layouts import GluMlp
    from lm_eval_pruned.pruning.widths import Widths

    #: Name, shape in the checkpoint, and shape in the model, of a parameter that does not fit.
    Mismatch = tuple[str, Sequence[int], Sequence[int]]

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


class StoredTensor(NamedTuple):
    """A tensor as the header of its file describes it."""

    name: str
    file: str
    dtype: torch.dtype
    shape: torch.Size


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


def tensors_in(file: str) -> list[StoredTensor]:
    """Return the tensors of a file of weights whose dtype is one of `_FLOATS`, by its header."""
    from transformers.modeling_utils import load_state_dict

    if not file.endswith(".safetensors"):
        return [
            StoredTensor(name, file, tensor.dtype, tensor.shape)
            for name, tensor in load_state_dict(file, map_location="meta").items()
            if tensor.dtype in _FLOATS.values()
        ]
    with safe_open(file, framework="pt") as tensors:
        headers = {name: tensors.get_slice(name) for name in tensors.keys()}
        return [
            StoredTensor(name, file, dtype, torch.Size(header.get_shape()))
            for name, header in headers.items()
            if (dtype := _FLOATS.get(header.get_dtype()))
        ]


def tensor_in(file: str, name: str) -> Tensor:
    """Return one tensor of a file of weights."""
    from transformers.modeling_utils import load_state_dict

    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)
    return load_state_dict(file)[name]


def stored_widths(mismatched: Iterable[Mismatch], widths: Widths) -> dict[str, int]:
    """Return the width of each MLP, by name, in a checkpoint that does not fit the config of `widths`.

    Raises:
        ValueError: The tensors of an MLP do not fit together, or all layers have a width that is
            not the config's.
    """
    shapes = {name: shape for name, shape, _ in mismatched}
    stored = {}
    for mlp in widths.mlps:
        names = {place: region.parameter for place, region in mlp.regions.items()}
        odd = {place: name for place, name in names.items() if name in shapes}
        known = {_width(mlp, place, shapes[name]) for place, name in odd.items()}
        if len(odd) < len(names):
            known.add(mlp.width)
        width = known.pop()
        if known or width is None:
            name = next(iter(odd.values()))
            raise ValueError(
                f"{name} has shape {list(shapes[name])} in the checkpoint, which does not fit the "
                "other tensors of its MLP, or the hidden size in config.json: copy the checkpoint "
                "again."
            )
        stored[mlp.name] = width
    changed = [mlp for mlp in widths.mlps if stored[mlp.name] != mlp.width]
    if changed and len({*stored.values()}) == 1:
        mlp = changed[0]
        raise ValueError(
            f"{mlp.name} has {stored[mlp.name]} neurons in the checkpoint, but its config.json "
            f"says {mlp.width}: correct {widths.keys[mlp.name]} there, or copy the "
            "checkpoint again."
        )
    return stored


def check_filled(
    model: PreTrainedModel,
    loading: Mapping[str, Any],
    widths: Widths,
    ignore_sizes: Any,
) -> None:
    """Refuse a model that its checkpoint filled in part, or that leaves part of it out.

    `loading` is transformers' loading info, `ignore_sizes` its ``ignore_mismatched_sizes``.

    Raises:
        ValueError: The checkpoint does not fit its config.
        RuntimeError: Another thread disturbed the load.
    """
    if missing := loading["missing_keys"]:
        if missing <= model.all_tied_weights_keys.keys():
            raise RuntimeError(
                f"{min(missing)} was not tied: another thread was in from_pretrained of stock "
                "transformers, which replaces tie_weights of all models meanwhile, and may leave it "
                "replaced. Start Python anew, and load stock models before or after those of "
                "lm_eval_pruned."
            )
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"The checkpoint holds no tensor for {min(missing)}{others}: it is incomplete, or its "
            "config.json describes another model."
        )
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched and not ignore_sizes:
        name, stored, expected = mismatched[0]
        raise ValueError(
            f"{name} has shape {list(stored)} in the checkpoint, but its config.json says "
            f"{list(expected)}."
        )
    state = model.state_dict().keys()
    layers = {re.sub(r"\.\d+\.", ".*.", p) for p in regions_by_parameter(widths.mlps)}
    # Stock classes leave out the layers that predict more tokens at once.
    if getattr(model.config, "num_nextn_predict_layers", None):
        layers.clear()
    for key in sorted(loading["unexpected_keys"]):
        is_bias = key.endswith(".bias") and f"{key[:-5]}.weight" in state
        if is_bias or re.sub(r"\.\d+\.", ".*.", key) in layers:
            raise ValueError(
                f"The checkpoint holds {key}, which its config.json does not describe: correct "
                "the number of layers or the key for that bias in config.json, or copy the "
                "checkpoint again."
            )


def _width(mlp: GluMlp, place: tuple[str, str], shape: Sequence[int]) -> int | None:
    """Return the neurons in a parameter of `shape`; None where it does not hold `place`."""
    try:
        whole = torch.empty(list(shape), device="meta")
        cut = list(mlp.regions[place].view(whole).shape)
        width = cut.pop(neuron_axis(*place))
    except (IndexError, RuntimeError):
        return None
    return width if width and cut in ([], [mlp.hidden_size]) else None
