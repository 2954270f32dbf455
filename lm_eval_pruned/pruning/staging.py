"""Weights on their way from the CPU to where a model runs, block by block.

Only what is kept goes over the link. On CUDA it passes through two blocks of pinned
memory: while the device fetches one, the other is filled. Nothing is left under way
when `send` returns, so neither the order of streams nor the life of a block matters
to anybody else. ``docs/architecture.md`` has the arithmetic.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

#: Bytes of a block: much to transfer at once, little to keep pinned in each thread.
BLOCK_BYTES = 1 << 24


def send(
    target: Tensor, dtype: torch.dtype, fill: Callable[[slice, Tensor], None]
) -> Tensor:
    """Fill a tensor on any device with rows that are computed on the CPU.

    Args:
        target: What to fill, also a view of something larger; shape (n, ...).
        dtype: Dtype in which the rows are computed and sent. The device converts them.
        fill: Called with a slice of the n rows and a contiguous CPU tensor of their
            shape in `dtype`, which it fills.

    Returns:
        `target`, complete.
    """
    if not target.numel():
        return target
    row_bytes = target[0].numel() * dtype.itemsize
    rows = min(len(target), max(1, BLOCK_BYTES // row_bytes))
    overlaps = fetches_on_its_own(target.device)
    under_way: deque[tuple[Tensor, Any]] = deque()
    for start in range(0, len(target), rows):
        stop = min(start + rows, len(target))
        if len(under_way) < (2 if overlaps else 1):
            block = new_block((rows, *target.shape[1:]), dtype, overlaps)
        else:
            block, fetched = under_way.popleft()
            fetched.synchronize()
        fill(slice(start, stop), block[: stop - start])
        target[start:stop].copy_(block[: stop - start], non_blocking=overlaps)
        under_way.append((block, mark(target.device)))
    for _, fetched in under_way:
        fetched.synchronize()
    return target


def fetches_on_its_own(device: torch.device) -> bool:
    """Return whether a device reads pinned memory while the CPU goes on."""
    return device.type == "cuda"


def new_block(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    """Return memory of the CPU; torch keeps pinned memory for the next to ask."""
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned)


def mark(device: torch.device) -> Any:
    """Return an event whose ``synchronize`` waits for the copies so far."""
    if not fetches_on_its_own(device):
        return _Done
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


class _Done:
    """The event of a copy that is complete when it returns."""

    @staticmethod
    def synchronize() -> None:
        pass
