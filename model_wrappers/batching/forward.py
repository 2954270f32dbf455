"""One pass of a language model with a mask of ours and logits at chosen positions only."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_in_parts import AttentionInParts
from .attention_support import base_model, cache_argument
from .cpu_linear import fast_cpu_linears


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PretrainedConfig
    from transformers.cache_utils import Cache

    from .attention_in_parts import Part

#: sdpa's memory-efficient kernel wants the rows of a mask to begin at multiples of so
#: many elements (8 or 16, by version), and else copies the mask in each layer.
ALIGNMENT = 16
#: Kernels of attention that a card may take: not cuDNN's, which is planned anew for each shape.
KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Has transformers group keys under a mask, too.
_GROUP_KEYS = "TRANSFORMERS_SDPA_FORCE_GQA"


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores: 0, and minus infinity where `hidden`.

    Args:
        hidden: Boolean, [rows, queries, keys].
        dtype: Of the mask; that of the queries.

    Returns:
        [rows, 1, queries, keys]; rows begin at multiples of `ALIGNMENT`.
    """
    rows, queries, keys = hidden.shape
    padded = -(-keys // ALIGNMENT) * ALIGNMENT
    whole = torch.zeros(rows, 1, queries, padded, dtype=dtype, device=hidden.device)
    return whole[..., :keys].masked_fill_(hidden[:, None], float("-inf"))


def kernel_of_shared_keys(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> SDPBackend | None:
    """Return what a card attends with under a mask to keys that several heads share.

    transformers copies such keys for each head. That is right where torch would take its math
    kernel, which has all scores in memory at once. Only a private function of torch says so.

    Returns:
        None where there is no card, no key is shared, or torch does not say.
    """
    config = config.get_text_config()
    shared = getattr(config, "num_key_value_heads", None)
    choose = getattr(torch, "_fused_sdp_choice", None)
    if device.type != "cuda" or not shared or choose is None:
        return None
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shapes = ((heads, 64, size), (shared, 64, size), (shared, 64, size), (1, 64, 64))
    query, key, value, mask = (
        torch.empty(1, *shape, dtype=dtype, device=device) for shape in shapes
    )
    with sdpa_kernel(KERNELS):
        return SDPBackend(choose(query, key, value, attn_mask=mask, enable_gqa=True))


class Forward:
    """Runs a model and computes logits where they are wanted.

    Hidden states are thinned out in front of the output embedding, inside the model's own
    forward: what a model does to its logits afterwards stays.

    Attributes:
        model: A causal language model, or an adapter around one.
        device: Where its inputs belong.
        dtype: Of queries, and so of masks.
        groups_keys: Whether keys that heads share are not copied for each head under a mask.
    """

    def __init__(self, lm: Any) -> None:
        """Run the model of an `HFLM` as `HFLM` does."""
        self.model = lm.model
        self.device = lm.device
        self._cache_argument = cache_argument(lm.model)
        self._autocast_dtype = lm.mixed_precision_dtype
        self.dtype = self._autocast_dtype or lm.model.dtype
        config = base_model(lm.model).config
        kernel = kernel_of_shared_keys(config, self.device, self.dtype)
        self.groups_keys = kernel == SDPBackend.EFFICIENT_ATTENTION
        # glibc keeps memory of up to twice the largest block that was freed, at most 32 MiB,
        # instead of having the system clear its pages anew in each layer.
        torch.empty(31 << 20, dtype=torch.uint8)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        keep: Callable[[Tensor], Tensor] | None,
        mask: Tensor | None,
        parts: Sequence[Part],
        cache: Cache | None,
    ) -> Tensor:
        """Return the logits, [..., vocabulary], at the positions that `keep` leaves.

        Args:
            tokens: Token ids, [rows, width], on `device`.
            positions: Their positions, [rows, width].
            keep: Takes hidden states, [rows, width, H], and returns those whose logits
                are wanted, with any shape that ends in H and has three dimensions;
                None: all.
            mask: Additive, [rows, 1, width, keys]; None: each token sees those before it.
            parts: Parts of the mask in which attention is computed; none: all at once.
            cache: Keys and values that tokens see besides those of the pass, and what keeps these.
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
            if self._autocast_dtype is not None:
                stack.enter_context(
                    torch.autocast(self.device.type, self._autocast_dtype)
                )
            if self.device.type == "cuda":
                stack.enter_context(sdpa_kernel(KERNELS))
            if self.groups_keys and _GROUP_KEYS not in os.environ:
                os.environ[_GROUP_KEYS] = "1"
                stack.callback(os.environ.pop, _GROUP_KEYS)
            if mask is not None and parts:
                stack.enter_context(AttentionInParts(mask, parts))
            stack.enter_context(fast_cpu_linears(self.model))
            return self.model(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=mask,
                use_cache=cache is not None,
                **{self._cache_argument: cache},
            ).logits
