"""One pass of slots through a model: its rows, positions and mask; and the trial of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .attention_support import cache_argument
from .forward import Forward
from .masks import additive_mask
from .slot_cache import SlotCache


if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


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


def _trial_tokens(model: PreTrainedModel) -> np.ndarray:
    """Return two random sequences that begin alike, [2, 12]."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, 12))
    tokens[1, :3] = tokens[0, :3]
    return tokens


def trial_plain(model: PreTrainedModel) -> torch.Tensor:
    """Return logits of the trial's tokens, [n, vocabulary], each sequence in one pass."""
    with torch.no_grad():
        first, second = (
            model(input_ids=torch.from_numpy(tokens[None])).logits[0]
            for tokens in _trial_tokens(model)
        )
    steps = torch.stack([first[7:11], second[8:12]], 1).flatten(0, 1)
    return torch.cat([first[6:7], second[4:5], steps])


def trial_slots(model: PreTrainedModel) -> torch.Tensor:
    """Return the same logits from slots: prompts, a shared beginning, steps."""
    first, second = _trial_tokens(model)
    forward = Forward(model, model.device)
    cache = SlotCache(2, in_groups=True)
    parts = [_pass(forward, cache, [(0, first[:7], 0)])]
    cache.copy(0, 1, 3)
    parts.append(_pass(forward, cache, [(1, second[3:5], 3)]))
    parts.append(_pass(forward, cache, [(0, first[7:8], 7), (1, second[5:9], 5)]))
    for i in range(8, 11):
        step = [(0, first[i : i + 1], i), (1, second[i + 1 : i + 2], i + 1)]
        parts.append(_pass(forward, cache, step))
    return torch.cat(parts)
