"""Attention masks that no layer has to copy."""

from __future__ import annotations

from typing import Any

import torch


#: sdpa's memory-efficient kernel wants the rows of a mask to begin at multiples of so
#: many elements (8 or 16, by version), and else copies the mask in each layer.
ALIGNMENT = 16


def additive_mask(hidden: torch.Tensor, dtype: torch.dtype) -> SentOnce:
    """Return what is added to attention scores: 0, and minus infinity where `hidden`.

    Args:
        hidden: Boolean, [rows, queries, keys].
        dtype: Of the mask; that of the queries.

    Returns:
        [rows, 1, queries, keys]; rows begin at multiples of `ALIGNMENT`. Sent to
        another device, it is copied once; see `SentOnce`.
    """
    rows, queries, keys = hidden.shape
    padded = -(-keys // ALIGNMENT) * ALIGNMENT
    whole = torch.zeros(rows, 1, queries, padded, dtype=dtype, device=hidden.device)
    whole[..., :keys].masked_fill_(hidden[:, None], float("-inf"))
    return SentOnce.of(whole, keys)


class SentOnce(torch.Tensor):
    """A mask of which each other device gets one copy, however often it is sent there.

    Where layers lie on several cards, accelerate sends each layer its arguments from
    the card on which the model began. Operations return ordinary tensors.
    """

    _whole: torch.Tensor
    _copies: dict[Any, torch.Tensor]

    @classmethod
    def of(cls, whole: torch.Tensor, keys: int) -> SentOnce:
        """Return the first `keys` of the last dimension of `whole`."""
        mask = whole[..., :keys].as_subclass(cls)
        mask._whole, mask._copies = whole, {}
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.to and len(args) == 2:
                mask, target = args
                if isinstance(target, (int, str, torch.device)):
                    return mask._on(target)
            return func(*args, **(kwargs or {}))

    def _on(self, device: int | str | torch.device) -> torch.Tensor:
        if device not in self._copies:
            # The slice alone would arrive without the padding.
            whole = self._whole.to(device)
            if whole is self._whole:
                return self
            self._copies[device] = whole[..., : self.shape[-1]]
        return self._copies[device]
