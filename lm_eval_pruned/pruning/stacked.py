"""How experts that are stacked in one tensor run, and what goes into their down projections.

No module has that as its input, so the products of such a tensor with activations are watched while
experts run one by one, as transformers calls ``eager``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from lm_eval_pruned.pruning.layouts import find_glu_mlps


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor
    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.layouts import GluMlp

#: What transformers calls the grouped matrix product, and the bytes to which it wants rows aligned.
GROUPED, _GROUPED_ALIGNMENT = "grouped_mm", 16

#: Functions that take activations and then weights: (tokens, I) and those of one expert, or
#: (experts, tokens, I) and those of all.
_PRODUCTS = {"linear", "matmul", "__matmul__", "bmm"}


class StackedInputs(TorchFunctionMode):
    """Shows the activations of stacked experts, each time that one runs."""

    def __init__(
        self, mlps: Sequence[GluMlp], see: Callable[[GluMlp, Tensor], None]
    ) -> None:
        """`see` is given each of `mlps` that is stacked and its activations, (tokens, I)."""
        super().__init__()
        self._see = see
        self._by_address = {
            mlp.weight("down_proj").data_ptr(): mlp
            for mlp in mlps
            if mlp.projection("down_proj") is None
        }

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        """Run a function, and look at what it is given."""
        if len(args) > 1 and getattr(func, "__name__", "") in _PRODUCTS:
            x, weight = args[:2]
            if (
                isinstance(weight, torch.Tensor)
                and weight.data_ptr() in self._by_address
            ):
                pairs = (
                    zip(x, weight, strict=True) if weight.dim() > 2 else [(x, weight)]
                )
                for inputs, matrix in pairs:
                    # Where all experts see all tokens, those of others are 0.
                    seen = inputs[inputs.any(1)] if weight.dim() > 2 else inputs
                    if (mlp := self._by_address.get(matrix.data_ptr())) is not None:
                        self._see(mlp, seen)
        return func(*args, **(kwargs or {}))


def one_by_one(
    model: PreTrainedModel, mlps: Sequence[GluMlp]
) -> AbstractContextManager[object]:
    """Have experts run one by one where some of `mlps` are stacked."""
    implementation = getattr(model.config, "_experts_implementation", None)
    if implementation is None or all(mlp.projection("down_proj") for mlp in mlps):
        return contextlib.nullcontext()
    return _eager(model, implementation)


def runnable(model: PreTrainedModel) -> AbstractContextManager[object]:
    """Have experts run one by one where torch's grouped matrix product refuses their width."""
    if refused_by_grouped_mm(model) is None:
        return contextlib.nullcontext()
    return _eager(model, GROUPED)


def refused_by_grouped_mm(model: PreTrainedModel) -> tuple[int, int] | None:
    """Return the width of experts that cannot run as transformers would, and the multiple they need.

    transformers runs stacked experts in one `torch.nn.functional.grouped_mm` by default, which
    refuses rows whose size is not a multiple of 16 bytes. None where all experts can run.
    """
    if getattr(model.config, "_experts_implementation", None) != GROUPED:
        return None
    multiple = _GROUPED_ALIGNMENT // model.dtype.itemsize
    stacked = (mlp for mlp in find_glu_mlps(model) if not mlp.projection("down_proj"))
    return next(((m.width, multiple) for m in stacked if m.width % multiple), None)


@contextlib.contextmanager
def _eager(model: PreTrainedModel, otherwise: str) -> Iterator[None]:
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(otherwise)
