"""What a teacher expects of each next token, kept on disk, and the distance of a student from it.

The teacher runs once over the text and is then no longer needed. Of each position, its `LIKELIEST`
tokens are kept with their probabilities; the others count as one outcome, with the mass that is
left.

Source: Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lm_eval_pruned.pruning.calibration import progress_bar, watched


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

#: Tokens whose probabilities are kept of each position.
LIKELIEST = 64
#: Arrays of an `Expected`.
_NAMES = ("tokens.npy", "log_probabilities.npy")
#: Rows of logits whose probabilities are in memory at a time, in bytes of float32.
_CHUNK = 2**26


@dataclass(frozen=True)
class Expected:
    """What a teacher expects at each position of blocks of text.

    Attributes:
        tokens: The likeliest tokens, shape (blocks, length, k), int32.
        log_probabilities: Theirs, of the same shape, float32.
    """

    tokens: np.ndarray
    log_probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def bytes_expected(tokens: int, vocabulary: int) -> int:
    """Return how many bytes on disk the expectations of so many tokens take."""
    return 8 * tokens * _kept(vocabulary)


def _kept(vocabulary: int) -> int:
    # At least one token is left to be the others.
    return min(LIKELIEST, vocabulary - 1)


@torch.no_grad()
def write_expected(
    teacher: PreTrainedModel,
    blocks: Tensor,
    folder: Path,
    temperature: float = 1.0,
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Expected:
    """Run a teacher over blocks of text, where it is, and keep what it expects in `folder`.

    Of several processes of a launcher, each reads its share of the blocks.

    Args:
        teacher: The unpruned model.
        blocks: Shape (blocks, length), int64.
        folder: Where the arrays are written, and mapped from.
        temperature: T; probabilities are those of ``softmax(logits / T)``.
        autocast: Makes the context of each pass, for its precision.
    """
    from accelerate import PartialState

    state = PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    shape = (*blocks.shape, _kept(vocabulary_of(teacher)))
    # An array that is not whole has another name.
    files = [folder / f"unfinished-{name}" for name in _NAMES]
    if state.is_main_process:
        for file, dtype in zip(files, (np.int32, np.float32), strict=True):
            np.lib.format.open_memmap(file, "w+", dtype, shape)
    state.wait_for_everyone()
    mine = range(state.process_index, len(blocks), state.num_processes)
    total = len(mine) * blocks.shape[1]
    with (
        _rows_of(files[0]) as write_tokens,
        _rows_of(files[1]) as write_values,
        watched(teacher, {}),
        progress_bar(total, "unpruned model reads text", unit="token") as bar,
    ):
        for number in mine:
            block = blocks[number : number + 1].to(teacher.device)
            with autocast():
                output = teacher(input_ids=block, use_cache=False)
            logits = output.logits[0].float().div_(temperature)
            top = logits.topk(shape[-1], dim=-1)
            total_mass = logits.logsumexp(dim=-1, keepdim=True)
            write_tokens(number, top.indices.to(torch.int32))
            write_values(number, top.values - total_mass)
            bar.update(block.numel())
    state.wait_for_everyone()
    if state.is_main_process:
        for file, name in zip(files, _NAMES, strict=True):
            file.replace(folder / name)
    state.wait_for_everyone()
    expected = read_expected(folder)
    assert expected is not None
    return expected


@contextlib.contextmanager
def _rows_of(file: Path) -> Iterator[Callable[[int, Tensor], None]]:
    """Yield what writes one row of an array; through a map, a full disk would end the process."""
    array = np.lib.format.open_memmap(file, "r")
    offset, size = array.offset, array[0].nbytes
    del array
    with file.open("r+b") as opened:

        def write(number: int, row: Tensor) -> None:
            opened.seek(offset + number * size)
            opened.write(row.cpu().numpy().tobytes())

        yield write


def read_expected(folder: Path) -> Expected | None:
    """Return what `write_expected` left in a folder; None where it did not end."""
    files = [folder / name for name in _NAMES]
    if not all(file.exists() for file in files):
        return None
    return Expected(*(np.lib.format.open_memmap(file, "r") for file in files))


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return how many logits a model has for each token."""
    return model.get_output_embeddings().weight.shape[0]


def distillation_loss(
    logits: Tensor, tokens: Tensor, log_probabilities: Tensor, temperature: float = 1.0
) -> Tensor:
    """Return how far the distribution of each next token is from a teacher's.

    ``T ** 2 * KL(teacher || softmax(logits / T))`` over the teacher's likeliest tokens and all
    others as one outcome, the mean over positions. The factor keeps gradients of one size over
    temperatures. It is 0 where the student is the teacher,
    and at most the divergence over the whole vocabulary.

    Args:
        logits: Of the student, shape (rows, length, vocabulary).
        tokens: The likeliest tokens of the teacher, shape (rows, length, k), a whole-number type.
        log_probabilities: Theirs, at temperature T, of the same shape, float32.
        temperature: T.

    Source: Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2.
    """
    total = _Divergence.apply(
        logits.flatten(0, 1),
        tokens.flatten(0, 1).long(),
        log_probabilities.flatten(0, 1),
        temperature,
    )
    return total / tokens[..., 0].numel()


class _Divergence(torch.autograd.Function):
    """The sum of `distillation_loss` over positions, whose gradient is computed with it.

    So probabilities are computed once, in chunks of positions. With p of the teacher and q of the
    student, the gradient by a logit is T (q - p) at a token that was kept, and T q (1 - p / q), with
    p and q of all others together, at each of these.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, expected: Tensor, temperature: float
    ) -> Tensor:
        gradient = torch.empty_like(logits)
        loss = torch.zeros((), device=logits.device)
        rows = max(1, _CHUNK // (4 * logits.shape[-1]))
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            wanted, chosen = expected[part], tokens[part]
            log_q = torch.log_softmax(logits[part].float() / temperature, dim=-1)
            found = log_q.gather(1, chosen)
            q = log_q.exp_()
            p = wanted.exp()
            rest = (1 - p.sum(1, keepdim=True)).clamp_(min=0)
            left = q.scatter(1, chosen, 0.0).sum(1, keepdim=True)
            left = left.clamp_(min=torch.finfo(torch.float32).tiny)
            loss += (p * (wanted - found)).sum()
            loss += (torch.xlogy(rest, rest) - rest * left.log()).sum()
            of_kept = q.gather(1, chosen) - p
            q.mul_(1 - rest / left).scatter_(1, chosen, of_kept)
            gradient[part] = q.mul_(temperature)
        ctx.save_for_backward(gradient)
        return temperature**2 * loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None
