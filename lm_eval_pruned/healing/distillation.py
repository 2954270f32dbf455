"""How far next-token distributions are from a teacher's, where the vocabulary is large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import kl_div, log_softmax


if TYPE_CHECKING:
    from torch import Tensor

#: How many logits are turned into probabilities at once. On a CPU, more take longer: what
#: they need is new memory each time (docs/measurements/performance.md).
_AT_ONCE = 1 << 22


def distillation_loss(logits: Tensor, expected: Tensor, temperature: float) -> Tensor:
    """Return how far the distribution of each next token is from a teacher's.

    ``T ** 2 * KL(softmax(expected / T) || softmax(logits / T))``, the mean over the positions
    that predict a token of their block. The factor keeps gradients of one size over
    temperatures. Probabilities are float32. The teacher gets no gradient.

    Args:
        logits: Shape (rows, tokens, vocabulary).
        expected: Those of the teacher, of the same shape.
        temperature: T.

    Source: Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2.
    """
    return _Distance.apply(logits, expected, temperature)


class _Distance(torch.autograd.Function):
    # Autograd would keep four float32 tensors of all logits; the gradient is
    # softmax(logits / T) - softmax(expected / T), times T over the number of positions.

    @staticmethod
    def forward(ctx: Any, logits: Tensor, expected: Tensor, temperature: float):
        rows, tokens, vocabulary = logits.shape
        predicting = tokens - 1
        step = max(1, _AT_ONCE // vocabulary)
        distance = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.zeros_like(logits) if ctx.needs_input_grad[0] else None
        for row in range(rows):
            for start in range(0, predicting, step):
                part = (row, slice(start, min(start + step, predicting)))
                ours, theirs = (
                    log_softmax(each[part].float() / temperature, dim=-1)
                    for each in (logits, expected)
                )
                distance += kl_div(ours, theirs, reduction="sum", log_target=True)
                if gradient is not None:
                    gradient[part] = ours.exp_().sub_(theirs.exp_())
        positions = rows * predicting
        ctx.gradient, ctx.scale = gradient, temperature / positions
        return temperature**2 / positions * distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor):  # type: ignore[override]
        return ctx.gradient * (slope * ctx.scale), None, None
