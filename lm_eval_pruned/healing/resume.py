"""Which checkpoint a training continues from, and that the same training left it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.adapters import HEALING
from lm_eval_pruned.results.files import left_of


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def last_checkpoint(folder: Path, resume: bool) -> Path | None:
    """Return the last complete checkpoint of a folder to continue from; None to start.

    Raises:
        ValueError: There is one and `resume` was not asked for, or the other way round.
    """
    complete = [file.parent for file in folder.glob(f"checkpoint-*/{HEALING}")]
    if resume is not bool(complete):
        raise ValueError(
            f"resume continues from a checkpoint, but {folder} holds none: leave it out to start."
            if resume
            else f"{folder} holds checkpoints of a training: add --resume to continue from the last, or "
            "delete the folder."
        )
    return max(
        complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None
    )


def check_same(
    last: Path | None, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Refuse to continue from a checkpoint whose record, `before`, says something else than `now`.

    Raises:
        ValueError: Names what differs.
    """
    for name, value in now.items():
        if before and before.get(name) != value:
            raise ValueError(
                f"{last} comes from a training with {name}={before.get(name)}, but this one has "
                f"{name}={value}: pass the same value to resume, or another output to start."
            )


def left_weights(pruning: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the weights that a pruning left, of its record."""
    names = ("kept_digest", "repair", "SHA-256 of its text", "tokens of its text")
    return dict(zip(names, left_of(pruning), strict=True))
