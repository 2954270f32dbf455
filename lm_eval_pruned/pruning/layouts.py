"""GLU layouts: where a model keeps its GLU-MLPs, and how each is cut out of its parameters.

All knowledge of module names, of fused and stacked weights and of models that
cannot be pruned lives here. A GLU-MLP computes
``down_proj(act(gate_proj(x)) * up_proj(x))``; neuron i is row i of gate and up
with column i of down. What several projections in one parameter look like is said in
`lm_eval_pruned.pruning.regions`.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import nn

from lm_eval_pruned.pruning.regions import Region, assemble


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

#: Projections of a GLU-MLP and the axis of their weight that counts neurons.
NEURON_AXIS = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}

#: Held while a model is built or loaded: transformers replaces methods of all models and
#: functions of torch meanwhile, and two threads restore each other's replacements.
BUILDING = threading.RLock()

#: Names under which models hold gate, up and down as three nn.Linear.
_SEPARATE = (
    ("gate_proj", "up_proj", "down_proj"),
    ("wi_0", "wi_1", "wo"),
    ("w1", "w3", "w2"),
)
#: Names under which models hold gate and up as one nn.Linear, and down.
_FUSED = (("gate_up_proj", "down_proj"), ("input_linear", "output_linear"))
#: Names under which models hold those of all experts as two tensors.
_STACKED = (("gate_up_proj", "down_proj"),)


class UnsupportedModelError(ValueError):
    """The model has no GLU-MLP, or one of a layout that cannot be pruned."""


@dataclass(frozen=True)
class GluMlp:
    """One GLU-MLP of a model: a dense one, a shared expert or one expert of many.

    Attributes:
        name: What messages call it, such as ``model.layers.0.mlp`` or
            ``model.layers.0.mlp.experts[3]``.
        layer: Position among the model's GLU-MLPs, from 0.
        module: The module that holds its parameters.
        path: Path of that module in the model.
        kind: ``dense``, ``expert`` or ``shared`` (an expert that every token uses).
        regions: Where each ``(projection, "weight" or "bias")`` with a neuron axis
            lies; the bias of down has none.
        linears: Attribute of `module` that holds each projection as nn.Linear;
            without the projections that are fused or stacked.
    """

    name: str
    layer: int
    module: nn.Module
    path: str
    kind: str
    regions: Mapping[tuple[str, str], Region]
    linears: Mapping[str, str]

    def projection(self, name: str) -> nn.Linear:
        """Return the nn.Linear that is ``gate_proj``, ``up_proj`` or ``down_proj``.

        Raises:
            UnsupportedModelError: The projection is fused with another, or stacked.
        """
        if name not in self.linears:
            raise UnsupportedModelError(
                f"{self.name} has no {name} of its own: it is stored in "
                f"{self.regions[name, 'weight'].parameter}."
            )
        return cast("nn.Linear", getattr(self.module, self.linears[name]))

    def weight(self, projection: str, part: str = "weight") -> Tensor:
        """Return a projection: (I, H) for gate and up, (H, I) for down; contiguous."""
        region = self.regions[projection, part]
        return region.view(self.parameter(region)).contiguous()

    def parameter(self, region: Region) -> Tensor:
        """Return the parameter of the model that holds `region`."""
        return self.module.get_parameter(region.parameter[len(self.path) + 1 :])

    @property
    def hidden_size(self) -> int:
        """Width H of its input."""
        region = self.regions["gate_proj", "weight"]
        return region.view(self.parameter(region)).shape[1]

    @property
    def width(self) -> int:
        """Intermediate size I, in neurons."""
        region = self.regions["gate_proj", "weight"]
        return region.view(self.parameter(region)).shape[0]

    @property
    def stack(self) -> str:
        """Path of the model's layer that holds it, such as ``model.layers.3``."""
        match = _LAYER.match(self.path)
        return match[0] if match else self.path

    @property
    def block(self) -> int:
        """Number of the model's layer that holds it, as ``layers=`` counts."""
        match = _LAYER.match(self.path)
        return int(match[1]) if match else 0


_LAYER = re.compile(r".*?\.(\d+)(?=\.|$)")


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of `config` that describes the language model."""
    return config.get_text_config(decoder=True)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def find_glu_mlps(model: PreTrainedModel) -> list[GluMlp]:
    """Find the GLU-MLPs of a model's language part, in order.

    Args:
        model: A model, possibly on the meta device.

    Raises:
        UnsupportedModelError: The model has no GLU-MLP, or some of a layout that
            cannot be pruned; the message names the model, the module and why.
    """
    label = describe(model)
    mlps: list[GluMlp] = []
    for path, module in _language_modules(model):
        for name, regions, linears in _layouts(label, path, module):
            mlps.append(
                GluMlp(name, len(mlps), module, path, _kind(path), regions, linears)
            )
    if not mlps:
        raise UnsupportedModelError(
            f"{label} has no GLU-MLP of a known layout (gate, up and down projections), so there "
            "is no width to prune: use --model hf for it."
        )
    _check_complete(label, model, mlps)
    return mlps


def describe(model: PreTrainedModel) -> str:
    """Return what messages call `model`."""
    return f"{type(model).__name__} (model_type {model.config.model_type})"


def regions_by_parameter(
    mlps: Iterable[GluMlp],
) -> dict[str, list[tuple[GluMlp, tuple[str, str], Region]]]:
    """Map each parameter to the GLU-MLPs, ``(projection, part)`` and regions in it."""
    found: dict[str, list[tuple[GluMlp, tuple[str, str], Region]]] = {}
    for mlp in mlps:
        for place, region in mlp.regions.items():
            found.setdefault(region.parameter, []).append((mlp, place, region))
    return found


def resize(mlps: Sequence[GluMlp], pieces: Mapping[tuple[str, str, str], Tensor]):
    """Give GLU-MLPs new weights, of another width.

    Args:
        mlps: GLU-MLPs; those that share a parameter go together and end equal in
            width.
        pieces: The new weight of each ``(name of the MLP, projection, part)``, in
            the shapes of `GluMlp.weight`.
    """
    for entries in regions_by_parameter(mlps).values():
        mlp, _, region = entries[0]
        old = mlp.parameter(region)
        new = assemble(
            {s: pieces[m.name, place[0], place[1]] for m, place, s in entries}
        )
        owner_path, _, attribute = region.parameter[len(mlp.path) + 1 :].rpartition(".")
        owner = mlp.module.get_submodule(owner_path)
        setattr(owner, attribute, nn.Parameter(new, requires_grad=old.requires_grad))
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
    for mlp in mlps:
        for attribute in _WIDTH_ATTRIBUTES:
            if isinstance(getattr(mlp.module, attribute, None), int):
                setattr(mlp.module, attribute, mlp.width)


#: Attributes in which modules remember their width; some compute with them.
_WIDTH_ATTRIBUTES = (
    "intermediate_size",
    "intermediate_dim",
    "expert_dim",
    "ffn_dim",
    "d_ff",
)


def _language_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the language part with their paths, its root first."""
    text = text_config(model.config)
    if model.config.is_encoder_decoder or type(text) is type(model.config):
        root = ""
    else:
        root = next(
            (
                path
                for path, module in model.named_modules()
                if type(getattr(module, "config", None)) is type(text)
            ),
            "",
        )
    towers: list[str] = []
    for path, module in model.get_submodule(root).named_modules(prefix=root):
        if any(path.startswith(f"{tower}.") for tower in towers):
            continue
        # A tower for images or sound has a config of its own, which knows no words.
        if not hasattr(getattr(module, "config", text), "vocab_size"):
            towers.append(path)
            continue
        yield path, module


def _kind(path: str) -> str:
    if re.search(r"shared_(expert|mlp)|shared_experts", path):
        return "shared"
    return "expert" if re.search(r"\bexperts\b", path) else "dense"


_Layout = tuple[str, dict[tuple[str, str], Region], dict[str, str]]


def _layouts(label: str, path: str, module: nn.Module) -> list[_Layout]:
    """Return name, regions and linears of each GLU-MLP whose parameters `module` owns."""
    children = dict(module.named_children())
    parameters = {
        name for name, value in module._parameters.items() if value is not None
    }
    for stacked in _STACKED:
        if parameters.issuperset(stacked):
            return _stacked(label, path, module, *stacked)
    for names in _SEPARATE:
        if children.keys() >= set(names):
            return _separate(label, path, module, names)
    for fused in _FUSED:
        if children.keys() >= set(fused):
            return _fused(label, path, module, *fused)
    return []


def _separate(label, path, module, names: tuple[str, str, str]) -> list[_Layout]:
    _check_linears(label, path, module, names)
    linears = dict(zip(NEURON_AXIS, names, strict=True))
    regions = {}
    for projection, name in linears.items():
        regions[projection, "weight"] = Region(f"{path}.{name}.weight")
        if NEURON_AXIS[projection] == 0 and getattr(module, name).bias is not None:
            regions[projection, "bias"] = Region(f"{path}.{name}.bias")
    return [(path, regions, linears)]


def _fused(label, path, module, fused: str, down: str) -> list[_Layout]:
    _check_linears(label, path, module, (fused, down))
    if getattr(module, fused).out_features != 2 * getattr(module, down).in_features:
        raise UnsupportedModelError(
            f"{label} has a {path}.{fused} that is not twice as wide as its {down}: this layout "
            "is not known."
        )
    regions = {("down_proj", "weight"): Region(f"{path}.{down}.weight")}
    for half, projection in enumerate(("gate_proj", "up_proj")):
        regions[projection, "weight"] = Region(f"{path}.{fused}.weight", half=half)
        if getattr(module, fused).bias is not None:
            regions[projection, "bias"] = Region(f"{path}.{fused}.bias", half=half)
    return [(path, regions, {"down_proj": down})]


def _stacked(label, path, module, fused: str, down: str) -> list[_Layout]:
    both, columns = getattr(module, fused), getattr(module, down)
    biases = {f"{fused}_bias", f"{down}_bias"}
    _check_extra(label, path, module, {fused, down} | biases)
    if both.dim() != 3 or columns.dim() != 3 or len(both) != len(columns):
        raise UnsupportedModelError(
            f"{label} holds {path}.{fused} in the shape {list(both.shape)} beside a {down} in the "
            f"shape {list(columns.shape)}: stacked experts have three axes, the first of them "
            "equal."
        )
    transposed = both.shape[2] == 2 * columns.shape[1]
    if not transposed and both.shape[1] != 2 * columns.shape[2]:
        raise UnsupportedModelError(
            f"{label} has a {path}.{fused} that is not twice as wide as its {down}: this layout "
            "is not known."
        )
    interleaved = not getattr(module, "is_concatenated", True)
    has_bias = getattr(module, f"{fused}_bias", None) is not None
    layouts: list[_Layout] = []
    for expert in range(both.shape[0]):
        regions = {
            ("down_proj", "weight"): Region(
                f"{path}.{down}", expert, transposed=transposed
            )
        }
        for half, projection in enumerate(("gate_proj", "up_proj")):
            regions[projection, "weight"] = Region(
                f"{path}.{fused}", expert, half, interleaved, transposed
            )
            if has_bias:
                regions[projection, "bias"] = Region(
                    f"{path}.{fused}_bias", expert, half, interleaved
                )
        layouts.append((f"{path}[{expert}]", regions, {}))
    return layouts


def _check_linears(
    label: str, path: str, module: nn.Module, names: Iterable[str]
) -> None:
    """Refuse an MLP in which a neuron is more than its slices of dense matrices."""
    kinds = {type(getattr(module, name)).__name__ for name in names}
    if not all(isinstance(getattr(module, name), nn.Linear) for name in names):
        raise UnsupportedModelError(
            f"{label} holds {path} in {', '.join(sorted(kinds))}: only dense nn.Linear "
            "projections can be pruned, unquantised and without adapters."
        )
    _check_extra(label, path, module, {f"{n}.{part}" for n in names for part in _PARTS})


_PARTS = ("weight", "bias")


def _check_extra(label: str, path: str, module: nn.Module, known: set[str]) -> None:
    extra = sorted({parameter for parameter, _ in module.named_parameters()} - known)
    if extra:
        raise UnsupportedModelError(
            f"{label} has {path}.{extra[0]} inside its MLP: a neuron of it is more than its "
            "gate, up and down weights, so it cannot be pruned by slicing."
        )


def _check_complete(label: str, model: PreTrainedModel, mlps: list[GluMlp]) -> None:
    """Refuse a model in which slicing the known layouts would do half the work."""
    known = regions_by_parameter(mlps)
    owners = {mlp.path for mlp in mlps}
    for path, module in _language_modules(model):
        if path in owners or _kind(path) != "expert":
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.dim() > 1 and name not in known:
                raise UnsupportedModelError(
                    f"{label} has experts of an unknown layout in {name}, so its MLPs could be "
                    "pruned only in part."
                )
    seen: dict[int, str] = {}
    for name, entries in known.items():
        mlp, _, region = entries[0]
        other = seen.setdefault(id(mlp.parameter(region)), name)
        if other != name:
            raise UnsupportedModelError(
                f"{label} shares one weight between {other} and {name}: slicing would part them."
            )
