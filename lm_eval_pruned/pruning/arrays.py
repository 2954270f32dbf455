"""Row extremes, finiteness and gathers of weights on the CPU, at memory speed.

torch's kernels for 16-bit floats run far below the speed of memory here: a sum in
float32 takes ten times, a gather of columns three times what numpy takes on the
same bits. Loading does this in several threads at once, where numpy also has the
advantage that each call keeps to its own thread.

Weights are looked at as integers. Among floats without a sign bit, the order of the
bits read as integers is the order of the numbers; among those with one, it is the
reverse. NaN has the largest bits of all on either side, infinity the next ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch


if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_WORDS: dict[torch.dtype, np.dtype[Any]] = {
    torch.float16: np.dtype(np.int16),
    torch.bfloat16: np.dtype(np.int16),
    torch.float32: np.dtype(np.int32),
    torch.float64: np.dtype(np.int64),
}
_TORCH_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Bytes that are worked on before the next ones, so that they stay in the L2 cache.
_BLOCK_BYTES = 1 << 19


def _has_words(tensor: Tensor) -> bool:
    return (
        # Subclasses hold their numbers in ways of their own.
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype in _WORDS
        and tensor.is_contiguous()
        and tensor.numel() > 0
    )


def _words(tensor: Tensor) -> np.ndarray:
    words = tensor.detach().view(_TORCH_WORDS[tensor.element_size()])
    return words.numpy()


def _floats(words: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(words.view(_WORDS[dtype])).view(dtype)


def _blocks(rows: np.ndarray | Tensor) -> Iterator[slice]:
    """Cut the first axis into blocks."""
    step = max(1, _BLOCK_BYTES * len(rows) // max(1, rows.nbytes))
    for start in range(0, len(rows), step):
        yield slice(start, min(start + step, len(rows)))


def row_extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest weight of each row.

    Args:
        rows: Shape (n, H), floating point, on any device.

    Returns:
        Two vectors of shape (n,), in the dtype of `rows`. Where a row holds NaN, at
        least one of its two extremes is NaN.
    """
    if not _has_words(rows):
        return rows.amax(dim=1), rows.amin(dim=1)
    signed = _words(rows)
    unsigned = signed.view(f"u{signed.dtype.name}")
    high = np.empty(len(signed), signed.dtype)
    low = np.empty(len(signed), unsigned.dtype)
    for block in _blocks(signed):
        np.maximum.reduce(signed[block], axis=1, out=high[block])
        np.maximum.reduce(unsigned[block], axis=1, out=low[block])
    highest, lowest = _floats(high, rows.dtype), _floats(low, rows.dtype)
    # With one sign only, the larger of the two numbers has the smaller bits or vice versa.
    one_sign = np.flatnonzero((high < 0) | (low.view(high.dtype) >= 0))
    if len(one_sign):
        index = torch.from_numpy(one_sign)
        highest[index] = rows[index].amax(dim=1)
        lowest[index] = rows[index].amin(dim=1)
    return highest, lowest


def all_finite(weight: Tensor) -> bool:
    """Return whether no weight is NaN or infinite.

    Args:
        weight: Any shape, floating point, on any device.
    """
    if not _has_words(weight):
        # A finite sum proves that every term is finite; an overflowing one proves nothing.
        return bool(
            weight.sum(dtype=torch.float32).isfinite() or weight.isfinite().all()
        )
    signed = _words(weight).reshape(-1)
    unsigned = signed.view(f"u{signed.dtype.name}")
    ends = [
        (signed[block].max(), unsigned[block].max().view(signed.dtype))
        for block in _blocks(signed)
    ]
    return bool(_floats(np.array(ends, signed.dtype), weight.dtype).isfinite().all())


def gather(weight: Tensor, kept: Tensor, axis: int) -> Tensor:
    """Return some of the entries along an axis, as a new contiguous tensor on the same device.

    Args:
        weight: Any shape, on any device.
        kept: Indices, shape (k,), int64.
        axis: 0 or 1.
    """
    if not _has_words(weight) or weight.dim() > 2:
        return weight.index_select(axis, kept.to(weight.device))
    shape = [*weight.shape]
    shape[axis] = len(kept)
    # Not from numpy, which asks for huge pages: new ones took three times as long to come by.
    out = torch.empty(shape, dtype=weight.dtype, device="cpu")
    source, index, words = _words(weight), kept.cpu().numpy(), _words(out)
    for rows in _blocks(out):
        # The other modes check all indices first, or copy the result.
        if axis == 0:
            np.take(source, index[rows], axis=0, out=words[rows], mode="wrap")
        else:
            np.take(source[rows], index, axis=1, out=words[rows], mode="wrap")
    return out
