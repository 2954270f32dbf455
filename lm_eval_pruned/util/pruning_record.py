"""The record of a pruning as JSON, for every room that compares two of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def left_of(pruning: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what decides the weights that a pruning left: kept digest, repair, and its text.

    `pruning` is the record in a results file; the text is given by its SHA-256 and its tokens.
    """
    repair, text = pruning.get("repair"), pruning.get("calibration")
    if not repair or not isinstance(text, Mapping):
        text = {}
    return pruning.get("kept_digest"), repair, text.get("sha256"), text.get("tokens")
