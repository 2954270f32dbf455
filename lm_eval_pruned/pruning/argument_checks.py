"""What is wrong with the value of one argument, whatever the others are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lm_eval_pruned.pruning.allocation_names import canonical_allocation
from lm_eval_pruned.pruning.criteria import canonical_name
from lm_eval_pruned.pruning.layer_numbers import layer_numbers


if TYPE_CHECKING:
    from collections.abc import Iterable
    from fractions import Fraction

    from lm_eval_pruned.pruning.arguments import Layers, Number

#: Seeds are below this: with the number of the layer, one has to fit into 63 bits.
SEEDS = 1 << 43


def exact(name: str, value: Number, example: str) -> Fraction:
    """Return `value` as the rational number that its decimal notation denotes."""
    from fractions import Fraction

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


def whole(name: str, value: Number, at_least: int) -> int:
    """Return `value` as a whole number."""
    number = exact(name, value, str(max(at_least, 1)))
    if number.denominator != 1 or number < at_least:
        raise ValueError(
            f"{name}={value} is not a whole number of {at_least} or more: "
            f"pass one such as {name}={max(at_least, 1)}."
        )
    return int(number)


def seed_below_limit(name: str, value: Number) -> int:
    seed = whole(name, value, at_least=0)
    if seed >= SEEDS:
        raise ValueError(
            f"{name}={value} is too large for a generator: pass one below {SEEDS}."
        )
    return seed


def whole_from_1(name: str, value: Number) -> int:
    return whole(name, value, at_least=1)


def criterion_name(name: str, value: str) -> str:
    return canonical_name(value, or_best=True)


def criterion_names(name: str, value: str | Iterable[str]) -> tuple[str, ...]:
    """Return the criteria that text such as ``maw+act`` names, each once."""
    words = [value] if isinstance(value, str) else [*value]
    written = [part for word in words for part in re.split(r"[+,;\s]+", word) if part]
    if not written:
        raise ValueError(
            f"{name}={value} names no criterion: pass some such as {name}=maw+act."
        )
    return tuple(dict.fromkeys(map(canonical_name, written)))


def allocation_name(name: str, value: str) -> str:
    return canonical_allocation(value)


#: How ``drop_by`` chooses layers: by their place, or by what they do to hidden states.
LAST, BLOCK_INFLUENCE = "last", "block_influence"


def depth_rule(name: str, value: str) -> str:
    """Return the rule by which layers are dropped."""
    if value not in (LAST, BLOCK_INFLUENCE):
        raise ValueError(
            f"{name}={value} is no way to choose layers: pass {LAST} or {BLOCK_INFLUENCE}."
        )
    return value


def dropped_layers(name: str, value: Layers) -> int | tuple[int, ...]:
    """Return how many layers to drop, or their numbers where a list or a range names them."""
    if isinstance(value, int) or str(value).strip().isdecimal():
        return whole_from_1(name, str(value))
    numbers = layer_numbers(name, value)
    twice = [number for number in numbers if numbers.count(number) > 1]
    if twice:
        raise ValueError(
            f"{name}={value} names layer {twice[0]} twice: name each layer once."
        )
    return tuple(sorted(numbers))
