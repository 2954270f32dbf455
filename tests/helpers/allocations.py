"""How many bytes of tensors are in memory at once, counted as they are allocated: no clock, no RSS."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


if TYPE_CHECKING:
    from collections.abc import Iterator


class Allocations(TorchDispatchMode):
    """Counts the storages that operations of this thread allocate on the CPU.

    The storages that safetensors maps are handed to operations, so they are not counted.

    Attributes:
        peak: Most bytes that were in memory at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = {t._cdata for t in _storages((args, kwargs))}
        result = operation(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given:
                reference = StorageWeakRef(storage)
                self._live[storage._cdata] = reference, storage.nbytes()
        self._live = {k: v for k, v in self._live.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _storages(values) -> Iterator[torch.UntypedStorage]:
    for value in pytree.tree_leaves(values):
        if isinstance(value, torch.UntypedStorage):
            yield value
        elif isinstance(value, torch.Tensor) and value.device.type == "cpu":
            with contextlib.suppress(NotImplementedError):
                yield value.untyped_storage()
