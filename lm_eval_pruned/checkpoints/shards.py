"""Safetensors shards written one tensor at a time.

`safetensors.torch.save_file` wants a whole shard in memory, and copies it. Here the
header is written first, from shapes that are known without reading, and each tensor
is dropped as soon as its bytes are in the file.

Source of the format: the README of github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import Tensor

#: Bytes per element of the dtypes of the format that torch has.
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
#: Names of the dtypes that weights can be cast to.
DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard, not read yet.

    Attributes:
        name: Key in the checkpoint.
        dtype: Name of the dtype in the format, a key of `ITEM_BYTES`.
        shape: Shape.
        read: Returns the tensor, on any device, of exactly that dtype and shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Size in the file, in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def write_shard(
    path: Path,
    tensors: Iterable[StoredTensor],
    written: Callable[[int], object] = lambda size: None,
) -> None:
    """Write a safetensors file, holding one tensor in memory at a time.

    Args:
        path: File to write; its bytes are on the disk when this returns.
        tensors: Contents. They are stored widest dtype first, which keeps each
            aligned to its own size, and otherwise in the order given.
        written: Called with the bytes of each tensor once they are written.

    Raises:
        ValueError: A tensor has another size than it declared.
    """
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.bytes],
        }
        offset += tensor.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in ordered:
            data = tensor.read().cpu().contiguous().reshape(-1).view(torch.uint8)
            if data.numel() != tensor.bytes:
                raise ValueError(
                    f"{tensor.name} has {data.numel()} bytes, but its checkpoint announced "
                    f"{tensor.bytes}."
                )
            file.write(data.numpy().data)
            written(tensor.bytes)
        file.flush()
        os.fsync(file.fileno())
