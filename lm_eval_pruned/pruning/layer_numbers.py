"""Numbers of layers as the user writes and reads them, such as ``0,4-11``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from lm_eval_pruned.pruning.arguments import Layers

#: More layers than any model has; a longer range is a typing error.
_MOST_LAYERS = 100_000


def layer_numbers(name: str, value: Layers) -> list[int]:
    """Return the layers that text such as ``0,4-11`` names, in its order.

    Args:
        name: The argument, for messages.
        value: Its value.

    Raises:
        ValueError: It is no list of layers.
    """
    is_list = isinstance(value, Iterable) and not isinstance(value, str)
    text = ",".join(str(part) for part in value) if is_list else str(value)  # type: ignore[union-attr]
    numbers: list[int] = []
    for part in re.split(r"[,;+\s]+", text.strip().strip("[]()")):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part)
        first, last = (match[1], match[2] or match[1]) if match else (1, 0)
        if not 0 <= int(last) - int(first) < _MOST_LAYERS:
            raise ValueError(
                f"{name}={value} is no list of layers: write numbers and ranges such as 4-11, or "
                "0+4-11 where a comma separates arguments."
            )
        numbers += range(int(first), int(last) + 1)
    return numbers


def written_layers(layers: Iterable[int]) -> str:
    """Return numbers of layers as the user would write them, such as ``0,4-11``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
