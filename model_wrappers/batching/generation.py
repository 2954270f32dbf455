"""How many tokens a call of ``generate`` produced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from torch import Tensor


def end_tokens(model: Any) -> list[int]:
    """Return the ids that end a text, from the generation config of `model`."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]


def count_generated(tokens: Tensor, ends: list[int]) -> int:
    """Count generated tokens, up to and with the first end-of-text token of each row.

    Args:
        tokens: Shape (rows, steps): what ``generate`` returned, without the prompts.
        ends: Ids that end a row; what follows is padding.
    """
    if not ends:
        return tokens.numel()
    is_end = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).int()
    ended_before = is_end.cumsum(1) - is_end
    return int((ended_before == 0).sum())
