"""GLU layouts: where a model keeps its GLU-MLPs, and how each is cut out of its parameters.

A GLU-MLP computes ``down_proj(act(gate_proj(x)) * up_proj(x))``; neuron i is row i of
gate and up with column i of down. Only this file knows names and kinds of weights.
"""

from __future__ import annotations

import copy
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    #: Where the ``(projection, "weight" or "bias")`` of a GLU-MLP lie.
    Regions = Mapping[tuple[str, str], "Region"]
    #: A region, of which MLP it is, and of which projection and part.
    Entry = tuple["GluMlp", tuple[str, str], "Region"]

#: Projections of a GLU-MLP and the axis of their weight that counts neurons.
NEURON_AXIS = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


def neuron_axis(projection: str, part: str) -> int:
    """Return the axis of a ``weight`` or ``bias`` that counts neurons."""
    return NEURON_AXIS[projection] if part == "weight" else 0


#: What models call gate, up and down. One name for gate and up is one matrix that holds both.
#: They name modules, or parameters in which a module stacks the matrices of its experts.
LAYOUTS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("wi_0", "wi_1", "wo"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
    ("input_linear", "input_linear", "output_linear"),
)

#: Attributes in which modules remember their width; some compute with them.
_WIDTH_NAMES = re.compile("intermediate_size|intermediate_dim|expert_dim|ffn_dim|d_ff")
#: Path of a layer of the model at the start of a module's path, and its number.
_LAYER = re.compile(r".*?\.(\d+)(?=\.|$)")

#: What models call a norm that takes what an MLP returns: Gemma and OLMo, GLM, LFM, HyperCLOVA.
_NORMS_AFTER = (
    "post_feedforward_layernorm",
    "post_mlp_layernorm",
    "post_ffn_norm",
    "post_norm2",
)

#: Held while a model is built or loaded: transformers replaces methods of all models and
#: functions of torch meanwhile, and two threads restore each other's replacements.
BUILDING = threading.RLock()


class UnsupportedModelError(ValueError):
    """The model has no GLU-MLP, or one of a layout that cannot be pruned."""


@dataclass(frozen=True)
class Region:
    """The part of a parameter that holds one projection of one GLU-MLP.

    Attributes:
        parameter: Full name of the parameter in the model.
        owner: The module whose attribute it is.
        expert: Position on its first axis, where it stacks experts.
        half: 0 for gate and 1 for up, where it holds both.
        interleaved: Whether gate and up alternate row by row.
        transposed: Whether its weights are stored as (inputs, outputs).
    """

    parameter: str
    owner: nn.Module
    expert: int | None = None
    half: int | None = None
    interleaved: bool = False
    transposed: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """Cut the region out of its parameter; see `GluMlp.weight` for shapes."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        if self.transposed:
            tensor = tensor.T
        if self.half is None:
            return tensor
        if self.interleaved:
            return tensor[self.half :: 2]
        return tensor.chunk(2)[self.half]


@dataclass(frozen=True)
class GluMlp:
    """One GLU-MLP of a model: a dense one, a shared expert or one expert of many.

    Attributes:
        name: What messages call it, such as ``model.layers.0.mlp.experts[3]``.
        index: Position among the model's GLU-MLPs, from 0.
        module: The module that holds its parameters.
        path: Path of that module in the model.
        layer_path: Path of the model's layer that holds it, such as ``model.layers.3``.
        layer: Number of that layer, as ``layers=`` counts.
        kind: ``dense``, ``expert`` or ``shared`` (an expert that every token uses).
        regions: Where each ``(projection, "weight" or "bias")`` with a neuron axis
            lies; the bias of down has none.
    """

    name: str
    index: int
    module: nn.Module
    path: str
    layer_path: str
    layer: int
    kind: str
    regions: Regions

    def parameter(self, region: Region) -> nn.Parameter:
        """Return the parameter of the model that holds `region`."""
        return getattr(region.owner, region.parameter.rpartition(".")[2])

    def projection(self, name: str) -> Any:
        """Return the nn.Linear that holds only ``gate_proj``, ``up_proj`` or ``down_proj``, if any."""
        region = self.regions[name, "weight"]
        alone = region.half is region.expert is None
        return region.owner if alone else None

    def weight(self, projection: str, part: str = "weight") -> Tensor:
        """Return a view: (I, H) for gate and up, (H, I) for down, (I,) for a bias."""
        region = self.regions[projection, part]
        return region.view(self.parameter(region))

    @property
    def down_bias(self) -> Tensor | None:
        """The bias of down, shape (H,), a view of that of all experts where they are stacked; None without one."""
        region = self.regions["down_proj", "weight"]
        if region.expert is None:
            return getattr(self.projection("down_proj"), "bias", None)
        name = f"{region.parameter.rpartition('.')[2]}_bias"
        biases = getattr(region.owner, name, None)
        return None if biases is None else biases[region.expert]

    @property
    def hidden_size(self) -> int:
        """Width H of its input."""
        return self.weight("gate_proj").shape[1]

    @property
    def width(self) -> int:
        """Intermediate size I, in neurons."""
        return self.weight("gate_proj").shape[0]


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of `config` that describes the language model."""
    return config.get_text_config(decoder=True)


def without_weights(
    build: Callable[..., PreTrainedModel], config: PretrainedConfig, **named: Any
) -> PreTrainedModel:
    """Return the model that a class, or another function, builds of a copy of `config`, on the meta device."""
    config = copy.deepcopy(config)
    # Where a model was saved, transformers leaves the name of its dtype, which not every class takes.
    if isinstance(config.dtype, str):
        config.dtype = getattr(torch, config.dtype)
    with BUILDING, torch.device("meta"):
        return build(config, **named)


def norm_follows(model: PreTrainedModel, mlp: GluMlp) -> bool:
    """Return whether a norm takes what a dense MLP without bias returns, so that its direction counts."""
    layer, down = model.get_submodule(mlp.layer_path), mlp.projection("down_proj")
    # A place that a model leaves empty has no weight.
    normed = any(hasattr(getattr(layer, n, None), "weight") for n in _NORMS_AFTER)
    return normed and mlp.kind == "dense" and getattr(down, "bias", None) is None


def describe(model: PreTrainedModel) -> str:
    """Return what messages call `model`."""
    return f"{type(model).__name__} (model_type {model.config.model_type})"


def find_glu_mlps(model: PreTrainedModel) -> list[GluMlp]:
    """Find the GLU-MLPs of a model's language part, in order; it may be on the meta device.

    Raises:
        UnsupportedModelError: The model has no GLU-MLP, or some of a layout that
            cannot be pruned; the message names the model, the module and why.
    """
    mlps: list[GluMlp] = []
    for path, module in _language_modules(model):
        try:
            for name, regions in _mlps_of(path, module):
                match = _LAYER.match(path)
                layer = (match[0], int(match[1])) if match else (path, 0)
                where = module, path, *layer, _kind(path)
                mlps.append(GluMlp(name, len(mlps), *where, regions))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{describe(model)} {error}") from None
    if not mlps:
        raise UnsupportedModelError(
            f"{describe(model)} has no GLU-MLP of a known layout (gate, up and down projections), "
            "so it has no width to prune: use --model hf for it."
        )
    _check_complete(model, mlps)
    return mlps


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path of the list of decoder layers of a model, and the list.

    Raises:
        UnsupportedModelError: There is none, or the config says another number.
    """
    paths = {mlp.layer_path.rpartition(".")[0] for mlp in find_glu_mlps(model)}
    path = min(paths)
    layers = model.get_submodule(path)
    count = getattr(text_config(model.config), "num_hidden_layers", None)
    alone = len(paths) == 1 and not model.config.is_encoder_decoder
    if not alone or not isinstance(layers, nn.ModuleList) or count != len(layers):
        raise UnsupportedModelError(
            f"{describe(model)} does not hold its GLU-MLPs in one list of {count} layers, the number "
            "in its config, so repair and criterion=obs (recipe=best) cannot be used with it: "
            "leave them out, or pass recipe=fast."
        )
    return path, layers


def regions_by_parameter(mlps: Iterable[GluMlp]) -> dict[str, list[Entry]]:
    """Map each parameter to the GLU-MLPs, ``(projection, part)`` and regions in it."""
    entries: dict[str, list[Entry]] = {}
    for mlp in mlps:
        for part, region in mlp.regions.items():
            entries.setdefault(region.parameter, []).append((mlp, part, region))
    return entries


@torch.no_grad()
def resize(mlps: Sequence[GluMlp], pieces: Mapping[tuple[str, str, str], Tensor]):
    """Give GLU-MLPs new weights, of another width.

    Args:
        mlps: GLU-MLPs; those that share a parameter go together and end equally wide.
        pieces: The new `GluMlp.weight` of each ``(name of the MLP, projection, part)``;
            contiguous.
    """
    for entries in regions_by_parameter(mlps).values():
        mlp, (projection, part), region = entries[0]
        owner, name = region.owner, region.parameter.rpartition(".")[2]
        old, new = mlp.parameter(region), pieces[mlp.name, projection, part]
        if region.half is not None or region.expert is not None:
            shape = list(new.shape)
            if region.half is not None:
                shape[0] *= 2
            if region.transposed:
                shape.reverse()
            if region.expert is not None:
                shape.insert(0, len(old))
            new = new.new_empty(shape)
            for mlp, (projection, part), region in entries:
                region.view(new).copy_(pieces[mlp.name, projection, part])
        setattr(owner, name, nn.Parameter(new, requires_grad=old.requires_grad))
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
    for mlp in mlps:
        for name, value in list(vars(mlp.module).items()):
            if _WIDTH_NAMES.fullmatch(name) and isinstance(value, int):
                setattr(mlp.module, name, mlp.width)


def with_widths(model_class: Any, widths: Mapping[str, int]) -> Any:
    """Derive a class of models whose MLPs have other widths, by name, than their config says."""

    def build(self, config, *args, **kwargs) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        odd = [mlp for mlp in find_glu_mlps(self) if mlp.width != widths[mlp.name]]
        pieces = {}
        for mlp in odd:
            for projection, part in mlp.regions:
                weight = mlp.weight(projection, part)
                shape = list(weight.shape)
                shape[neuron_axis(projection, part)] = widths[mlp.name]
                pieces[mlp.name, projection, part] = weight.new_empty(shape)
        resize(odd, pieces)

    # transformers asks for the name of the class.
    names = {
        name: getattr(model_class, name) for name in ("__module__", "__qualname__")
    }
    return type(model_class)(
        model_class.__name__, (model_class,), {**names, "__init__": build}
    )


def _language_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of the language part with their paths, its root first."""
    text, root = text_config(model.config), ""
    if not model.config.is_encoder_decoder and type(text) is not type(model.config):
        configs = {p: getattr(m, "config", None) for p, m in model.named_modules()}
        root = next((p for p, c in configs.items() if type(c) is type(text)), "")
    towers: tuple[str, ...] = ()
    for path, module in model.get_submodule(root).named_modules(prefix=root):
        if path.startswith(towers):
            continue
        # A tower for images or sound has a separate config, without a vocabulary; an encoder's
        # may hold one of text beside one of images.
        config = getattr(module, "config", text)
        inner = getattr(config, "text_config", None)
        if hasattr(config, "vocab_size") or hasattr(inner, "vocab_size"):
            yield path, module
        else:
            towers = (*towers, f"{path}.")
            _check_tower(model, path, module)


def _check_tower(model: PreTrainedModel, path: str, tower: nn.Module) -> None:
    """Refuse a part without a vocabulary that has GLU-MLPs and yet is not of images or sound alone."""
    reads = getattr(tower, "input_modalities", ())
    name = getattr(tower, "main_input_name", None)
    if "text" not in reads or name != "input_ids":
        return
    for inner, module in tower.named_modules(prefix=path):
        if next(_mlps_of(inner, module), None) is not None:
            raise UnsupportedModelError(
                f"{describe(model)} has GLU-MLPs in {path}, whose config has no vocabulary although it "
                "is of text, so its MLPs could be pruned only in part."
            )


def _kind(path: str) -> str:
    if re.search(r"shared_(expert|mlp)", path):
        return "shared"
    return "expert" if re.search(r"\bexperts\b", path) else "dense"


def _mlps_of(path: str, module: nn.Module) -> Iterator[tuple[str, Regions]]:
    """Yield name and regions of each GLU-MLP whose projections `module` owns.

    Raises:
        UnsupportedModelError: It cannot be pruned; the message lacks the model.
    """
    children = dict(module.named_children())
    parameters = {name for name, _ in module.named_parameters(recurse=False)}
    for names in LAYOUTS:
        stacked, fused = parameters >= {*names}, names[0] == names[1]
        if children.keys() >= {*names} or (stacked and fused):
            break
    else:
        return
    kinds = {} if stacked else {type(children[n]).__name__: children[n] for n in names}
    if not all(isinstance(child, nn.Linear) for child in kinds.values()):
        raise UnsupportedModelError(
            f"holds {path} in {', '.join(sorted(kinds))}: only dense nn.Linear projections can be "
            "pruned, unquantised and without adapters."
        )
    weight, bias = ("", "_bias") if stacked else (".weight", ".bias")
    held = dict(module.named_parameters(remove_duplicate=False))
    extra = sorted(held.keys() - {n + part for n in names for part in (weight, bias)})
    if extra:
        raise UnsupportedModelError(
            f"has {path}.{extra[0]} inside its MLP: a neuron of it is more than its gate, up and "
            "down weights, so it cannot be pruned by slicing."
        )
    gate, down = (list(held[names[n] + weight].shape) for n in (0, 2))
    known = len(gate) == len(down) == 2 + stacked and gate[:-2] == down[:-2]
    transposed = known and stacked and gate[2] == 2 * down[1]
    if not known or (fused and not transposed and gate[-2] != 2 * down[-1]):
        raise UnsupportedModelError(
            f"holds {path}.{names[0]} in the shape {gate} beside a {names[2]} in the shape {down}: "
            "a matrix of gate and up is twice as wide as down, and there is one for each expert."
        )
    interleaved = stacked and not getattr(module, "is_concatenated", True)
    halves = (0, 1, None) if fused else (None, None, None)
    for expert in range(gate[0]) if stacked else (None,):
        regions: dict[tuple[str, str], Region] = {}
        for projection, name, half in zip(NEURON_AXIS, names, halves, strict=True):
            owner = module if stacked else children[name]
            cut, full = (owner, expert, half, interleaved), f"{path}.{name}"
            regions[projection, "weight"] = Region(full + weight, *cut, transposed)
            if projection != "down_proj" and name + bias in held:
                regions[projection, "bias"] = Region(full + bias, *cut)
        yield path if expert is None else f"{path}[{expert}]", regions


def _check_complete(model: PreTrainedModel, mlps: list[GluMlp]) -> None:
    """Refuse a model in which slicing the known layouts would do half the work."""
    known = regions_by_parameter(mlps)
    owners = {mlp.path for mlp in mlps}
    for path, module in _language_modules(model):
        for name, parameter in module.named_parameters(path, recurse=False):
            inside = path not in owners and _kind(path) == "expert"
            if inside and parameter.dim() > 1 and name not in known:
                raise UnsupportedModelError(
                    f"{describe(model)} has experts of an unknown layout in {name}, so its MLPs "
                    "could be pruned only in part."
                )
    seen: dict[int, str] = {}
    for name, ((mlp, _, region), *_) in known.items():
        other = seen.setdefault(id(mlp.parameter(region)), name)
        if other != name:
            raise UnsupportedModelError(
                f"{describe(model)} shares one weight between {other} and {name}: slicing would "
                "separate them."
            )
