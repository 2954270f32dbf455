"""What a teacher leaves on the disk, and the distance to it beside what autograd makes of the formula."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, strategies as st
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

from lm_eval_pruned.healing.teacher import (
    distillation_loss,
    read_expected,
    write_expected,
)


def kept_of(logits, temperature, kept):
    """Return the likeliest tokens and their log-probabilities."""
    top = log_softmax(logits.float() / temperature, dim=-1).topk(kept)
    return top.indices.int(), top.values


def plain(ours, theirs, temperature, kept):
    """Return T² KL(teacher || student) over the kept tokens and the others together, the mean."""
    q, p = (log_softmax(x.float() / temperature, dim=-1).exp() for x in (ours, theirs))
    chosen = p.topk(kept).indices
    q, p = q.gather(-1, chosen), p.gather(-1, chosen)
    q, p = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (q, p))
    return temperature**2 * (p * (p / q).log()).sum(-1).mean()


@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 6),
    vocabulary=st.integers(3, 9),
    kept=st.integers(1, 8),
    temperature=st.floats(0.5, 4),
    slope=st.floats(-2, 2),
    seed=st.integers(0, 99),
)
def test_loss_and_gradient_are_those_of_the_formula(
    rows, tokens, vocabulary, kept, temperature, slope, seed
):
    random = torch.Generator().manual_seed(seed)
    kept = min(kept, vocabulary - 1)
    ours, theirs = (
        torch.randn(rows, tokens, vocabulary, generator=random) for _ in range(2)
    )
    leaf, exact = ours.clone().requires_grad_(), ours.clone().requires_grad_()
    expected = kept_of(theirs, temperature, kept)
    loss = distillation_loss(leaf, *expected, temperature)
    formula = plain(exact, theirs, temperature, kept)
    (slope * loss).backward()
    (slope * formula).backward()
    torch.testing.assert_close(loss, formula, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(leaf.grad, exact.grad, atol=1e-6, rtol=1e-4)


def test_with_one_token_left_out_it_is_the_divergence_over_the_vocabulary():
    ours, theirs = torch.randn(2, 2, 5, 9, generator=torch.Generator().manual_seed(0))
    loss = distillation_loss(ours, *kept_of(theirs, 1, 8))
    p, q = log_softmax(theirs, -1), log_softmax(ours, -1)
    torch.testing.assert_close(loss, (p.exp() * (p - q)).sum(-1).mean())
    assert distillation_loss(ours, *kept_of(theirs, 1, 4)) < loss


def test_where_nothing_was_cut_there_is_nothing_to_learn():
    logits = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0))
    leaf = logits.clone().requires_grad_()
    loss = distillation_loss(leaf, *kept_of(logits, 1, 64))
    loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-5, rtol=0)
    assert leaf.grad.abs().max() < 1e-6


def test_half_precision_is_rounded_after_the_softmax():
    random = torch.Generator().manual_seed(0)
    ours, theirs = (
        torch.randn(2, 5, 300, generator=random).bfloat16() for _ in range(2)
    )
    leaf, exact = ours.clone().requires_grad_(), ours.float().requires_grad_()
    loss = distillation_loss(leaf, *kept_of(theirs, 1, 64))
    formula = plain(exact, theirs, 1, 64)
    loss.backward()
    formula.backward()
    assert loss.dtype == torch.float32
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(loss, formula, atol=1e-4, rtol=1e-4)
    assert leaf.grad.dtype == torch.bfloat16
    torch.testing.assert_close(leaf.grad.float(), exact.grad, atol=1e-6, rtol=2e-2)


def test_the_disk_holds_what_the_teacher_says(tiny_llama, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_llama)
    blocks = torch.randint(3, 250, (3, 8), generator=torch.Generator().manual_seed(0))
    assert read_expected(tmp_path) is None
    written = write_expected(teacher, blocks, tmp_path, temperature=2.0)
    read = read_expected(tmp_path)
    assert read is not None and isinstance(read.tokens, np.memmap)
    np.testing.assert_array_equal(read.tokens, written.tokens)
    tokens, log_probabilities = kept_of(teacher(blocks).logits.detach(), 2.0, 64)
    found = torch.from_numpy(np.array(read.log_probabilities))
    torch.testing.assert_close(found, log_probabilities, atol=1e-5, rtol=1e-5)
    # Two tokens may be equally likely.
    assert (torch.from_numpy(np.array(read.tokens)) == tokens).float().mean() > 0.99
