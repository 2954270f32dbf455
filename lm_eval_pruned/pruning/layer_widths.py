"""Widths that differ from layer to layer, as files and as text.

Nothing here imports torch, transformers or the harness.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from lm_eval_pruned.pruning.block_configs import BLOCKS, widths_of_blocks


_FORMS = (
    'pass a JSON file such as {"0": 1200, "1": 900} or [1200, 900], or a CSV file with the '
    "columns layer and width"
)


def read_widths(widths: Any) -> dict[int, int]:
    """Return the kept width of each layer that `widths` names.

    Args:
        widths: A file, or what such a file holds. JSON: an object
            ``{"0": 1200, "1": 900}``, a list with one width per layer from 0 on, in which
            null leaves a layer alone, or a list of objects
            ``{"layer": 0, "width": 1200}``; or a config with ``block_configs``, see
            `lm_eval_pruned.pruning.block_configs`. CSV: the columns ``layer`` and ``width``,
            named in the first line; others are passed over.

    Raises:
        ValueError: The file is missing or in no such form, a layer is named twice, or a
            number is not whole.

    Example:
        >>> read_widths([1200, None, 900])
        {0: 1200, 2: 900}
    """
    where = f"widths={written_source(widths)}"
    if isinstance(widths, (str, Path)):
        widths = _content(widths, where)
    if isinstance(widths, Mapping) and BLOCKS in widths:
        named = list(_of_blocks(widths, where).items())
    elif isinstance(widths, Mapping):
        named = list(widths.items())
    elif not isinstance(widths, Iterable):
        raise ValueError(f"{where} names no widths: {_FORMS}.")
    else:
        named = list(enumerate(widths))
        if any(isinstance(entry, Mapping) for _, entry in named):
            named = [_pair(entry, where) for _, entry in named]
    found: dict[int, int] = {}
    for name, value in named:
        if value is None:
            continue
        layer, width = _whole(name, where), _whole(value, where)
        if layer in found:
            raise ValueError(f"{where} names layer {layer} twice: leave one out.")
        found[layer] = width
    if not found:
        raise ValueError(f"{where} names no layer: {_FORMS}.")
    return dict(sorted(found.items()))


def written_source(widths: Any) -> str:
    """Return what results and messages call `widths`: a file's name, or the widths.

    Example:
        >>> written_source("somewhere/a.json")
        'a.json'
        >>> written_source({0: 1200, 1: 900, 2: 900})
        '0:1200,1-2:900'
    """
    if isinstance(widths, (str, Path)):
        return Path(widths).name
    try:
        return written_by_layer(read_widths(widths).items())
    except (ValueError, RecursionError):
        return repr(widths)[:80]


def written_by_layer(values: Iterable[tuple[int, Any]]) -> str:
    """Return widths, or what else layers have, by layer: ``0:1200,1-2:900``.

    Args:
        values: Pairs of layer and width.

    Example:
        >>> written_by_layer([(0, 1200), (1, 900), (2, 900)])
        '0:1200,1-2:900'
    """
    parts = []
    # Layers that follow each other and share a width have the same key.
    runs = groupby(
        enumerate(sorted(values)), key=lambda each: (each[1][0] - each[0], each[1][1])
    )
    for (_, value), run in runs:
        layers = [layer for _, (layer, _) in run]
        first, last = layers[0], layers[-1]
        parts.append(f"{first}:{value}" if first == last else f"{first}-{last}:{value}")
    return ",".join(parts)


def _content(file: str | Path, where: str) -> Any:
    """Return what a file of widths holds, as JSON would have it."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be read ({error}): {_FORMS}.") from None
    if text.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(text, object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON ({error}): {_FORMS}.") from None
    lines = [line for line in text.splitlines() if line.strip()]
    rows = list(csv.DictReader(lines, skipinitialspace=True))
    if not rows or not {"layer", "width"} <= rows[0].keys():
        raise ValueError(f"{where} holds no widths: {_FORMS}.")
    return rows


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = {name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1}
    if repeated:
        raise ValueError(f"{min(repeated)} stands in it twice")
    return dict(pairs)


def _of_blocks(config: Mapping[str, Any], where: str) -> dict[int, int]:
    heads = config.get("num_attention_heads")
    return widths_of_blocks(
        config[BLOCKS],
        config.get("hidden_size"),
        heads,
        config.get("num_key_value_heads", heads),
        where,
    )


def _pair(entry: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(entry, Mapping) or not {"layer", "width"} <= entry.keys():
        raise ValueError(
            f"{where} has an entry without layer or width, {entry!r}: {_FORMS}."
        )
    return entry["layer"], entry["width"]


def _whole(value: Any, where: str) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not (text.isascii() and text.isdigit()):
        raise ValueError(
            f"{where} has {value!r} where a whole number of 0 or more belongs: {_FORMS}."
        )
    if len(text) > 9:
        raise ValueError(f"{where} has {text[:20]}, more than any model has: {_FORMS}.")
    return int(text)
