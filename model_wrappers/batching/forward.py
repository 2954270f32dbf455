"""One pass of a language model with logits at chosen positions only."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .cpu_linear import Packs, fast_cpu_linears, pack_linears


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


class LogitsMemory:
    """Memory that passes on a CPU write their logits to, one after another.

    The system takes back what an allocation of more than 32 MB held as soon as it is freed,
    and clears each page of the next one: a fourth of the time of the output embedding. What
    a pass returns is overwritten by the next.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    @contextmanager
    def taken_by(self, output: nn.Module) -> Iterator[None]:
        """Let `output` write to it, if that is a linear layer on a CPU that nobody else changed."""
        if (
            type(output) is not nn.Linear
            or output.weight.device.type != "cpu"
            or output.bias is not None
            or "forward" in vars(output)
        ):
            yield
            return
        output.forward = partial(self._linear, output)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del output.forward

    def _linear(self, output: nn.Linear, hidden: Tensor) -> Tensor:
        weight = output.weight
        if hidden.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
            return nn.functional.linear(hidden, weight)
        hidden = hidden.flatten(0, -2)
        rows, memory = len(hidden), self._memory
        if memory is None or memory.dtype != weight.dtype or len(memory) < rows:
            self._memory = None
            self._memory = memory = weight.new_empty(rows, len(weight))
        return torch.mm(hidden, weight.t(), out=memory[:rows])[None]


class Forward:
    """Runs a model and computes logits where they are wanted.

    Hidden states are thinned out in front of the output embedding, inside the model's own
    forward: what a model does to its logits afterwards stays.

    Attributes:
        model: A causal language model, or an adapter around one.
        device: Where its inputs belong.
        autocast_dtype: Run under autocast to this dtype; None: as the weights are.
        packs: Its packed weights, if any.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
        packs: Packs | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.autocast_dtype = autocast_dtype
        self.packs = packs or {}

    @classmethod
    def of(cls, lm: Any, tokens: int) -> Forward:
        """Return what runs the model of an `HFLM` as `HFLM` does.

        Args:
            lm: The `HFLM`.
            tokens: About how many go through the model. The weights must not change until then.
        """
        packs = (
            pack_linears(lm.model, tokens) if lm.mixed_precision_dtype is None else {}
        )
        return cls(lm.model, lm.device, lm.mixed_precision_dtype, packs)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        keep: Callable[[Tensor], Tensor] | None,
        memory: LogitsMemory | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Return the logits, [..., vocabulary], at the positions that `keep` leaves.

        Args:
            tokens: Token ids, [rows, width], on `device`.
            positions: Their positions, [rows, width].
            keep: Takes hidden states, [rows, width, H], and returns those whose logits
                are wanted, with any shape that ends in H and has three dimensions;
                None: all.
            memory: Where logits of a CPU may be written to, for a `keep` whose result is
                [1, positions, H].
            **arguments: Further arguments of the model.
        """

        def thin_out(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            assert keep is not None
            hidden, *others = inputs
            return (keep(hidden), *others)

        with ExitStack() as stack:
            if keep is not None:
                output = self.model.get_output_embeddings()
                stack.callback(output.register_forward_pre_hook(thin_out).remove)
            stack.enter_context(torch.no_grad())
            if self.autocast_dtype is not None:
                stack.enter_context(
                    torch.autocast(self.device.type, self.autocast_dtype)
                )
            stack.enter_context(fast_cpu_linears(self.model, self.packs))
            if memory is not None:
                output = self.model.get_output_embeddings()
                stack.enter_context(memory.taken_by(output))
            return self.model(
                input_ids=tokens, position_ids=positions, **arguments
            ).logits
