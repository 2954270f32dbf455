"""Models whose MLPs have other widths than their config says: building and recognising them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.layouts import (
    NEURON_AXIS,
    find_glu_mlps,
    regions_by_parameter,
    resize,
)


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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
        pieces = {}
        for mlp in odd:
            for (projection, part), region in mlp.regions.items():
                parameter = mlp.parameter(region)
                shape = list(region.view(parameter).shape)
                shape[NEURON_AXIS[projection] if part == "weight" else 0] = widths[
                    mlp.name
                ]
                pieces[mlp.name, projection, part] = parameter.new_empty(shape)
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
    places = regions_by_parameter(widths.mlps)
    found = dict(widths.actual)
    shapes = {name: stored for name, stored, _ in mismatched if name in places}
    for name, stored in shapes.items():
        for mlp, (projection, part), region in places[name]:
            axis = NEURON_AXIS[projection] if part == "weight" else 0
            width = _width(region, stored, axis, mlp.hidden_size)
            if width is None or found[mlp.name] not in (width, widths.actual[mlp.name]):
                raise ValueError(
                    f"{name} has shape {list(stored)} in the checkpoint, which does not fit the "
                    "other tensors of its MLP, or the hidden size that config.json says: copy the "
                    "checkpoint again."
                )
            found[mlp.name] = width
    if shapes and (len({*found.values()}) == 1 or widths.actual != widths.configured):
        name = next(
            name for name, width in found.items() if width != widths.actual[name]
        )
        raise ValueError(
            f"{name} has {found[name]} neurons in the checkpoint, but its config.json "
            f"says {widths.actual[name]}: correct {widths.keys[name]} there, or copy the "
            "checkpoint again."
        )
    for name, other in found.items():
        touched = {
            p for p, each in places.items() if any(m.name == name for m, _, _ in each)
        }
        if other != widths.actual[name] and touched - shapes.keys():
            raise ValueError(
                f"{min(touched & shapes.keys())} has shape {list(shapes[min(touched & shapes.keys())])} "
                "in the checkpoint, which does not fit the other tensors of its MLP: copy the "
                "checkpoint again."
            )
    return found


def _width(
    region: Any, shape: Sequence[int], axis: int, hidden_size: int
) -> int | None:
    """Return the neurons of a region of a tensor of `shape`; None where it is no projection."""
    try:
        cut = list(region.view(torch.empty(list(shape), device="meta")).shape)
    except (IndexError, RuntimeError):
        return None
    width = cut.pop(axis) if axis < len(cut) else 0
    return width if width >= 1 and cut in ([], [hidden_size]) else None
