"""What a user writes as the value of an argument: numbers, layers, widths by layer, and names.

Nothing here imports torch, transformers or the harness.
"""

from __future__ import annotations

import csv
import functools
import json
import logging
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    Number = int | float | str | Fraction
    #: Layers as the user writes them: ``4-11``, ``0,15``, 3 or a list of such.
    Layers = int | str | Iterable[int | str]

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.arguments")

#: Every layer is cut alike; or, with as many neurons in all, by the loss on calibration text with
#: one layer cut at a time.
ALLOCATIONS = UNIFORM, SENSITIVITY = "uniform", "sensitivity"
#: What is done to the weights of the neurons that stay.
REPAIRS = NO_REPAIR, LEAST_SQUARES = "none", "least_squares"
#: Above all seeds: with the number of the layer, one has to fit into 63 bits.
SEEDS = 1 << 43


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


def whole(name: str, value: Number, least: int = 1) -> int:
    number = exact(name, value, "1")
    if number.denominator != 1 or number < least:
        raise ValueError(
            f"{name}={value} is not a whole number of {least} or more: pass one such as {name}=1."
        )
    return int(number)


def percent(name: str, value: Number) -> Number:
    """Return `value` as it is; say once of one below 1 that it is in percent."""
    if re.fullmatch(r"0*\.\d*[1-9]\d*", written := str(value).strip()):
        _tell_percent(name, written)
    return value


@functools.cache
def _tell_percent(name: str, value: str) -> None:
    meant = float(100 * Fraction(value))
    logger.warning(
        "%s=%s removes %s %% of the neurons; for %g %% pass %g.",
        name,
        value,
        value,
        meant,
        meant,
    )


def seed_below_limit(name: str, value: Number) -> int:
    number = whole(name, value, least=0)
    if number >= SEEDS:
        raise ValueError(
            f"{name}={value} is too large for a seed: pass one below {SEEDS}."
        )
    return number


def layer_numbers(name: str, value: Layers) -> list[int]:
    """Return the layers that text such as ``0,4-11`` names, in its order."""
    is_list = isinstance(value, Iterable) and not isinstance(value, str)
    text = ",".join(map(str, value)) if is_list else str(value)  # type: ignore[arg-type]
    numbers: list[int] = []
    for part in re.split(r"[,;+\s]+", text.strip().strip("[]()")):
        # Five digits are more layers than any model has.
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(
                f"{name}={value} does not name layers: write numbers and ranges such as 4-11, or "
                "0+4-11 where a comma separates arguments."
            )
        numbers += range(first, last + 1)
    return numbers


def written_layers(layers: Iterable[int]) -> str:
    """Return numbers of layers as the user would write them, such as ``0,4-11``."""
    return written_by_layer((layer, None) for layer in layers)


def written_by_layer(values: Iterable[tuple[int, Any]]) -> str:
    """Return what layers have, such as widths, by layer; with None, only the layers.

    Example:
        >>> written_by_layer([(0, 1200), (1, 900), (2, 900)])
        '0:1200,1-2:900'
    """
    parts = []
    numbered = enumerate(sorted(values))
    # In a run of consecutive layers, the number is always as far from the position.
    for (_, value), run in groupby(numbered, lambda e: (e[1][0] - e[0], e[1][1])):
        first, *others = [layer for _, (layer, _) in run]
        layers = f"{first}-{others[-1]}" if others else f"{first}"
        parts.append(layers if value is None else f"{layers}:{value}")
    return ",".join(parts)


def written_source(widths: Any) -> str:
    """Return what results and messages call `widths`: a file's name, or the widths by layer."""
    if isinstance(widths, (str, Path)):
        return Path(widths).name
    try:
        return written_by_layer(_by_layer(_pairs(widths)).items())
    except (TypeError, ValueError):
        return repr(widths)[:80]


def read_widths(widths: Any) -> dict[int, int]:
    """Return the kept width of each layer that `widths` names, by ascending layer.

    Args:
        widths: A file, or what it holds. JSON: an object ``{"0": 1200, "1": 900}``, or a list with
            one width per layer from 0 on, in which null leaves a layer as it is. CSV: the columns
            ``layer`` and ``width``.

    Raises:
        ValueError: The file is missing or in no such form, a layer is in it twice, or a number is
            not whole.
    """
    try:
        if not isinstance(widths, (str, Path)):
            return _by_layer(_pairs(widths))
        text = Path(widths).read_text(encoding="utf-8-sig")
        if text.lstrip()[:1] == "{":
            return _by_layer(json.loads(text, object_pairs_hook=list))
        if text.lstrip()[:1] == "[":
            return _by_layer(enumerate(json.loads(text)))
        rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
        return _by_layer((row["layer"], row["width"]) for row in rows)
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(
            f"widths={written_source(widths)} cannot be read ({error}): pass a JSON file such as "
            '{"0": 1200, "1": 900} or [1200, 900], or a CSV file with the columns layer and width.'
        ) from None


def _pairs(content: Any) -> Iterable[tuple[Any, Any]]:
    return content.items() if isinstance(content, Mapping) else enumerate(content)


def _by_layer(pairs: Iterable[tuple[Any, Any]]) -> dict[int, int]:
    widths: dict[int, int | None] = {}
    for layer, width in pairs:
        number = int(str(layer))
        if number in widths:
            raise ValueError(f"it names layer {number} twice")
        widths[number] = None if width is None else int(str(width))
    named = {number: width for number, width in widths.items() if width is not None}
    if not named:
        raise ValueError("it names no layer")
    return dict(sorted(named.items()))
