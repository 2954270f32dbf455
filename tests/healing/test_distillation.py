"""The distance to a teacher, and its gradient, beside what autograd makes of the formula."""

from __future__ import annotations

import torch
from hypothesis import given, strategies as st
from torch.nn.functional import log_softmax

from lm_eval_pruned.healing.run import distillation_loss


def plain(ours, theirs, temperature):
    """Return T² KL(teacher || student), the mean over positions that predict a token."""
    q, p = (
        log_softmax(each[:, :-1].float() / temperature, dim=-1)
        for each in (ours, theirs)
    )
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


@given(
    rows=st.integers(1, 3),
    tokens=st.integers(2, 6),
    vocabulary=st.integers(2, 9),
    temperature=st.floats(0.5, 4),
    slope=st.floats(-2, 2),
    seed=st.integers(0, 99),
)
def test_loss_and_gradient_are_those_of_the_formula(
    rows, tokens, vocabulary, temperature, slope, seed
):
    random = torch.Generator().manual_seed(seed)
    ours, theirs = (
        3 * torch.randn(rows, tokens, vocabulary, generator=random) for _ in range(2)
    )
    leaf, exact = ours.clone().requires_grad_(), ours.clone().requires_grad_()
    loss = distillation_loss(leaf, theirs, temperature)
    expected = plain(exact, theirs, temperature)
    (slope * loss).backward()
    (slope * expected).backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(leaf.grad, exact.grad, atol=1e-6, rtol=1e-4)


def test_half_precision_is_rounded_after_the_softmax():
    random = torch.Generator().manual_seed(0)
    ours, theirs = (
        torch.randn(2, 5, 300, generator=random).bfloat16() for _ in range(2)
    )
    leaf, exact = ours.clone().requires_grad_(), ours.float().requires_grad_()
    loss, expected = distillation_loss(leaf, theirs, 1.0), plain(exact, theirs, 1.0)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(loss, expected)
    assert leaf.grad.dtype == torch.bfloat16
    torch.testing.assert_close(leaf.grad.float(), exact.grad, atol=1e-7, rtol=1e-2)
