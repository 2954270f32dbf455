"""Models whose MLPs have other widths than their config says: building and recognising them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.layouts import NEURON_AXIS, find_glu_mlps, resize


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lm_eval_pruned.pruning.layouts import GluMlp
    from lm_eval_pruned.pruning.widths import Widths

    #: Name, shape in the checkpoint, and shape in the model, of a parameter that does not fit.
    Mismatch = tuple[str, Sequence[int], Sequence[int]]


def class_with_widths(model_class: Any, widths: Mapping[str, int]) -> Any:
    """Derive a class of models that are built with MLPs of other widths than their config says.

    Args:
        model_class: A model class of transformers.
        widths: The width of each MLP, by name.
    """

    def build(self, config, *args, **kwargs) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        odd = [mlp for mlp in find_glu_mlps(self) if mlp.width != widths[mlp.name]]
        pieces: dict[tuple[str, str, str], torch.Tensor] = {}
        for mlp in odd:
            for place, region in mlp.regions.items():
                parameter = mlp.parameter(region)
                shape = list(region.view(parameter).shape)
                shape[_neuron_axis(place)] = widths[mlp.name]
                pieces[mlp.name, place[0], place[1]] = parameter.new_empty(shape)
        resize(odd, pieces)

    # transformers asks for the name of the class.
    names = {
        "__module__": model_class.__module__,
        "__qualname__": model_class.__qualname__,
    }
    return type(model_class)(
        model_class.__name__, (model_class,), {**names, "__init__": build}
    )


def stored_widths(mismatched: Iterable[Mismatch], widths: Widths) -> dict[str, int]:
    """Return the width of each MLP in a checkpoint, by name.

    Args:
        mismatched: What transformers says of the parameters that do not fit `widths`.
        widths: The widths that were expected.

    Raises:
        ValueError: The tensors of an MLP do not fit together, or all layers have a width that is
            not the config's.
    """
    shapes = {name: shape for name, shape, _ in mismatched}
    found = {}
    for mlp in widths.mlps:
        names = {place: region.parameter for place, region in mlp.regions.items()}
        own = {
            _width(mlp, place, shapes[name])
            if name in shapes
            else widths.actual[mlp.name]
            for place, name in names.items()
        }
        width = own.pop()
        if own or width is None:
            odd = next(name for name in names.values() if name in shapes)
            raise ValueError(
                f"{odd} has shape {list(shapes[odd])} in the checkpoint, which does not fit the "
                "other tensors of its MLP, or the hidden size that config.json says: copy the "
                "checkpoint again."
            )
        found[mlp.name] = width
    changed = [name for name, width in found.items() if width != widths.actual[name]]
    if changed and (len({*found.values()}) == 1 or widths.actual != widths.configured):
        name = changed[0]
        raise ValueError(
            f"{name} has {found[name]} neurons in the checkpoint, but its config.json "
            f"says {widths.actual[name]}: correct {widths.keys[name]} there, or copy the "
            "checkpoint again."
        )
    return found


def _neuron_axis(place: tuple[str, str]) -> int:
    projection, part = place
    return NEURON_AXIS[projection] if part == "weight" else 0


def _width(mlp: GluMlp, place: tuple[str, str], shape: Sequence[int]) -> int | None:
    """Return the neurons in a parameter of `shape`; None where it does not hold `place`."""
    axis = _neuron_axis(place)
    try:
        whole = torch.empty(list(shape), device="meta")
        cut = list(mlp.regions[place].view(whole).shape)
        width = cut.pop(axis)
    except (IndexError, RuntimeError):
        return None
    return width if width and cut in ([], [mlp.hidden_size]) else None
