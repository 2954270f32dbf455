"""Widths that differ from layer to layer, as files and as text.

Nothing here imports torch, transformers or the harness.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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
            ``{"layer": 0, "width": 1200}``. CSV: the columns ``layer`` and ``width``,
            named in the first line; others are passed over.

    Raises:
        ValueError: The file is missing or in no such form, a layer is named twice, or a
            number is not whole.

    Example:
        >>> read_widths([1200, None, 900])
        {0: 1200, 2: 900}
    """
    try:
        content = _content(widths) if isinstance(widths, (str, Path)) else widths
        return _by_layer(content)
    except ValueError as error:
        where = f"widths={written_source(widths)}"
        raise ValueError(f"{where} {error}: {_FORMS}.") from None


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
        return written_by_layer(_by_layer(widths).items())
    except ValueError:
        return repr(widths)[:80]


def written_by_layer(values: Iterable[tuple[int, Any]]) -> str:
    """Return widths, or what else layers have, by layer: ``0:1200,1-2:900``.

    Args:
        values: Pairs of layer and width.

    Example:
        >>> written_by_layer([(0, 1200), (1, 900), (2, 900)])
        '0:1200,1-2:900'
    """
    runs: list[list[Any]] = []
    for layer, value in sorted(values):
        if runs and runs[-1][1:] == [layer - 1, value]:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer, value])
    return ",".join(f"{a}:{v}" if a == b else f"{a}-{b}:{v}" for a, b, v in runs)


def _content(file: str | Path) -> Any:
    """Return what a file of widths holds, as JSON would have it."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    if text.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(text, object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON ({error})") from None
    lines = [line for line in text.splitlines() if line.strip()]
    rows = list(csv.DictReader(lines, skipinitialspace=True))
    if not rows or not {"layer", "width"} <= rows[0].keys():
        raise ValueError("holds no widths")
    return rows


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = {name for name, _ in pairs if [n for n, _ in pairs].count(name) > 1}
    if repeated:
        raise ValueError(f"{min(repeated)} stands in it twice")
    return dict(pairs)


def _by_layer(content: Any) -> dict[int, int]:
    """Return widths by layer, in ascending order; errors go on where ``widths=FILE`` ends."""
    if not hasattr(content, "__iter__"):
        raise ValueError("names no widths")
    is_map = isinstance(content, Mapping)
    named = list(content.items() if is_map else enumerate(content))
    if not is_map and any(isinstance(entry, Mapping) for _, entry in named):
        named = [_pair(entry) for _, entry in named]
    found: dict[int, int] = {}
    for name, value in named:
        if value is None:
            continue
        layer = _whole(name)
        if layer in found:
            raise ValueError(f"names layer {layer} twice")
        found[layer] = _whole(value)
    if not found:
        raise ValueError("names no layer")
    return dict(sorted(found.items()))


def _pair(entry: Any) -> tuple[Any, Any]:
    if not isinstance(entry, Mapping) or not {"layer", "width"} <= entry.keys():
        raise ValueError(f"has an entry without layer or width, {entry!r}")
    return entry["layer"], entry["width"]


def _whole(value: Any) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not (text.isascii() and text.isdigit()):
        raise ValueError(f"has {value!r} where a whole number of 0 or more belongs")
    if len(text) > 9:
        raise ValueError(f"has {text[:20]}, more than any model has")
    return int(text)
