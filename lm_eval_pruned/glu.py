"""GLU layouts: where a model keeps its GLU-MLPs and which config key sets their width.

All knowledge of module names, config keys and architectures that cannot be
pruned lives here. A GLU-MLP computes ``down_proj(act(gate_proj(x)) * up_proj(x))``;
neuron i is row i of ``gate_proj`` and ``up_proj`` with column i of ``down_proj``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Projections of the separate layout and the axis of their weight that counts neurons.
NEURON_AXIS = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
WIDTH_KEY = "intermediate_size"


class UnsupportedModelError(ValueError):
    """The model has no GLU-MLP, or one of a layout that cannot be pruned."""


@dataclass(frozen=True)
class GluMlp:
    """One GLU-MLP of a model.

    Attributes:
        name: Path of the module in the model, such as ``model.layers.0.mlp``.
        layer: Position among the model's GLU-MLPs, from 0.
        module: The module that holds the three projections.
    """

    name: str
    layer: int
    module: nn.Module

    def projection(self, name: str) -> nn.Linear:
        """Return ``gate_proj``, ``up_proj`` or ``down_proj``."""
        return cast("nn.Linear", getattr(self.module, name))

    @property
    def hidden_size(self) -> int:
        """Model width H."""
        return self.projection("gate_proj").in_features

    @property
    def width(self) -> int:
        """Intermediate size I, in neurons."""
        return self.projection("gate_proj").out_features

    def sliced_parameters(self) -> dict[str, tuple[str, int]]:
        """Map each parameter with a neuron axis to its projection and that axis.

        ``down_proj.bias`` has none and is not listed.
        """
        sliced = {}
        for projection, axis in NEURON_AXIS.items():
            sliced[f"{self.name}.{projection}.weight"] = (projection, axis)
            bias = self.projection(projection).bias
            if bias is not None and axis == 0:
                sliced[f"{self.name}.{projection}.bias"] = (projection, axis)
        return sliced


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of `config` that describes the language model."""
    return config.get_text_config(decoder=True)


def narrowed_config(config: PretrainedConfig, width: int) -> PretrainedConfig:
    """Return a copy of `config` whose GLU-MLPs have `width` neurons."""
    narrowed = copy.deepcopy(config)
    setattr(text_config(narrowed), WIDTH_KEY, width)
    return narrowed


def skeleton(
    auto_class: Any, config: PretrainedConfig, *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Build the model that `config` describes on the meta device, without weights."""
    with torch.device("meta"):
        return auto_class.from_config(
            copy.deepcopy(config), trust_remote_code=trust_remote_code
        )


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def find_glu_mlps(model: PreTrainedModel) -> list[GluMlp]:
    """Find the GLU-MLPs of a model's language part, in order.

    Args:
        model: A model, possibly on the meta device. Its widths must agree with
            its config.

    Raises:
        UnsupportedModelError: The model has no GLU-MLP, or some of a layout that
            cannot be pruned; the message names the model, the module and why.
    """
    config = text_config(model.config)
    language_model = _language_model(model, config)
    prefix = next(
        name for name, module in model.named_modules() if module is language_model
    )
    label = f"{type(model).__name__} (model_type {model.config.model_type})"
    mlps: list[GluMlp] = []
    for name, module in language_model.named_modules(prefix=prefix):
        children = dict(module.named_children())
        if "gate_up_proj" in children or "gate_up_proj" in module._parameters:
            raise UnsupportedModelError(
                f"{label} keeps gate and up fused in {name}.gate_up_proj: only separate "
                "gate_proj, up_proj and down_proj can be pruned."
            )
        if not NEURON_AXIS.keys() <= children.keys():
            continue
        _check_separable(label, name, module)
        mlps.append(GluMlp(name, len(mlps), module))
    if not mlps:
        raise UnsupportedModelError(
            f"{label} has no GLU-MLP (gate_proj, up_proj, down_proj), so there is no width to "
            "prune: use --model hf for it."
        )
    _check_widths(label, config, mlps)
    return mlps


def _language_model(model: PreTrainedModel, config: PretrainedConfig) -> nn.Module:
    from transformers import PreTrainedModel

    if type(model.config) is type(config):
        return model
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module.config) is type(config):
            return module
    return model


def _check_separable(label: str, name: str, module: nn.Module) -> None:
    """Refuse an MLP in which a neuron is more than its three slices."""
    projections = {getattr(module, projection) for projection in NEURON_AXIS}
    if not all(isinstance(projection, nn.Linear) for projection in projections):
        kinds = ", ".join(sorted({type(p).__name__ for p in projections}))
        raise UnsupportedModelError(
            f"{label} holds {name} in {kinds}: only dense nn.Linear projections can be pruned, "
            "so load an unquantised checkpoint without adapters."
        )
    own = {f"{projection}.{part}" for projection in NEURON_AXIS for part in _PARTS}
    extra = sorted({parameter for parameter, _ in module.named_parameters()} - own)
    if extra:
        raise UnsupportedModelError(
            f"{label} has {name}.{extra[0]} inside its MLP: a neuron of it is more than its "
            "gate, up and down weights, so it cannot be pruned by slicing."
        )


_PARTS = ("weight", "bias")


def _check_widths(label: str, config: PretrainedConfig, mlps: list[GluMlp]) -> None:
    width = getattr(config, WIDTH_KEY, None)
    if not isinstance(width, int):
        raise UnsupportedModelError(
            f"{label} has {WIDTH_KEY}={width} in its config: a single width for all layers is "
            "needed."
        )
    for mlp in mlps:
        if mlp.width != width:
            raise UnsupportedModelError(
                f"{label} has {mlp.width} neurons in {mlp.name}, but its config says "
                f"{WIDTH_KEY}={width}: only models with one width in every MLP can be pruned."
            )
