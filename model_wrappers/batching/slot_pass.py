"""One pass of slots through a model: its rows, positions and mask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .attention_support import cache_argument
from .forward import additive_mask


if TYPE_CHECKING:
    from collections.abc import Iterator

    from .forward import Forward
    from .slot_cache import SlotCache


# Elements of a pass's mask: 16 MiB in 16 bits. Prompts that need more go in pieces.
_MOST_IN_MASK = 2**23

#: Slot, its new tokens, and the number of tokens that it holds already.
_Row = tuple[int, np.ndarray, int]


def _pass(forward: Forward, cache: SlotCache, work: list[_Row]) -> torch.Tensor:
    """Run tokens through a model; return the logits after each row's last, [n, vocabulary].

    Args:
        forward: The model.
        cache: Keys and values of the slots.
        work: The rows. A pass of one token each has the slots 0, 1, ...
    """
    longest = max(len(tokens) for _, tokens, _ in work)
    tokens = np.zeros((len(work), longest), dtype=np.int64)
    for row, (_, new, _) in enumerate(work):
        tokens[row, : len(new)] = new
    start = np.array([start for _, _, start in work])
    counts = np.array([len(new) for _, new, _ in work])
    slots = np.array([slot for slot, _, _ in work])
    # One copy to the device for all that a pass needs there.
    host = np.column_stack(
        [tokens, start[:, None] + np.arange(longest), slots, start, counts - 1]
    )
    sent = torch.from_numpy(host).to(forward.device)
    position = sent[:, longest : 2 * longest]
    cache.begin_pass(slots.tolist(), start.tolist(), counts.tolist(), sent[:, -3:-1].T)
    mask = None
    if cache.shows_slots:
        places = torch.arange(cache.width, device=forward.device)
        dtype = forward.autocast_dtype or forward.model.dtype
        mask = additive_mask(places > position[:, :, None], dtype)

    def last(states: torch.Tensor) -> torch.Tensor:
        place = sent[:, -1].to(states.device)
        return states[torch.arange(len(place), device=place.device), place][:, None]

    cached: dict[str, Any] = {cache_argument(forward.model): cache}
    logits = forward(
        sent[:, :longest],
        position,
        last if longest > 1 else None,
        attention_mask=mask,
        use_cache=True,
        **cached,
    )
    return logits[:, -1]


def likeliest(forward: Forward, cache: SlotCache, work: list[_Row]) -> list[int]:
    return _pass(forward, cache, work).float().argmax(-1).tolist()


def in_pieces(work: list[_Row]) -> Iterator[tuple[list[_Row], bool]]:
    """Cut a pass into such as need no mask of more than `_MOST_IN_MASK` elements.

    Yields:
        Rows, and whether they go to their prompts' ends.
    """
    longest = max(len(tokens) for _, tokens, _ in work)
    width = max(start + len(tokens) for _, tokens, start in work)
    fitting = _MOST_IN_MASK // (longest * width)
    if longest == 1 or fitting >= len(work) or not any(start for _, _, start in work):
        yield work, True
    elif fitting:
        for row in range(0, len(work), fitting):
            yield work[row : row + fitting], True
    else:
        count = max(1, _MOST_IN_MASK // width)
        for slot, tokens, start in work:
            for begin in range(0, len(tokens), count):
                piece = tokens[begin : begin + count]
                yield [(slot, piece, start + begin)], begin + count >= len(tokens)
