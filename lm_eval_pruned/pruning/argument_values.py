"""What a user writes as the value of an argument: numbers, layers, names of criteria."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

from lm_eval_pruned.pruning.criteria import canonical_name


if TYPE_CHECKING:
    Number = int | float | str | Fraction
    #: Layers as the user writes them: ``4-11``, ``0,15``, 3 or a list of such.
    Layers = int | str | Iterable[int | str]

#: Seeds are below this: with the number of the layer, one has to fit into 63 bits.
SEEDS = 1 << 43
#: More layers than any model has; a longer range is a typing error.
_MOST_LAYERS = 100_000


def exact(name: str, value: Number, example: str) -> Fraction:
    """Return `value` as the rational number that its decimal notation denotes."""
    try:
        text = str(value).strip()
        # 10 ** exponent is computed in full, so an absurd exponent would hang.
        if isinstance(value, bool) or re.search(r"[eE][+-]?\d{4}", text):
            raise ValueError
        return Fraction(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(
            f"{name}={value} is not a finite number: pass one such as {name}={example}."
        ) from None


def whole(name: str, value: Number, at_least: int = 1) -> int:
    number = exact(name, value, "1")
    if number.denominator != 1 or number < at_least:
        raise ValueError(
            f"{name}={value} is not a whole number of {at_least} or more: "
            f"pass one such as {name}=1."
        )
    return int(number)


def seed_below_limit(name: str, value: Number) -> int:
    number = whole(name, value, at_least=0)
    if number >= SEEDS:
        raise ValueError(
            f"{name}={value} is too large for a generator: pass one below {SEEDS}."
        )
    return number


def criterion_names(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    """Return the criteria that text such as ``maw+act`` names, each once."""
    written = value if isinstance(value, str) else "+".join(value)
    names = filter(None, re.split(r"[+,;\s]+", written))
    if not (found := tuple(dict.fromkeys(map(canonical_name, names)))):
        raise ValueError(
            f"{name}={value} names no criterion: pass some such as {name}=maw+act."
        )
    return found


def layer_numbers(name: str, value: Layers) -> list[int]:
    """Return the layers that text such as ``0,4-11`` names, in its order."""
    is_list = isinstance(value, Iterable) and not isinstance(value, str)
    text = ",".join(map(str, value)) if is_list else str(value)  # type: ignore[arg-type]
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


def dropped_layers(name: str, value: Layers) -> int | tuple[int, ...]:
    """Return how many layers to drop, or their numbers where a list or a range names them."""
    if isinstance(value, int) or str(value).strip().isdecimal():
        return whole(name, str(value))
    numbers = sorted(layer_numbers(name, value))
    for number, following in pairwise(numbers):
        if number == following:
            raise ValueError(
                f"{name}={value} names layer {number} twice: name each layer once."
            )
    return tuple(numbers)


def written_layers(layers: Iterable[int]) -> str:
    """Return numbers of layers as the user would write them, such as ``0,4-11``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
