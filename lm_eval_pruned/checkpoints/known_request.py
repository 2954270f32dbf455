"""Which scores of an earlier load belong to what is about to be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_pruned.pruning.scores import ScoreTable, known_scores


if TYPE_CHECKING:
    from collections.abc import Hashable

    from lm_eval_pruned.checkpoints.load import Request


def table_for(request: Request) -> ScoreTable:
    """Return the scores that are known of what `request` asks for."""
    known, checkpoint = known_scores(), _checkpoint(request)
    if known is None or checkpoint is None:
        return ScoreTable()
    plan = request.plan
    text = None
    if plan.calibration is not None:
        text = (_stamp(Path(plan.calibration)), plan.calibration_samples)
    arguments = sorted((k, repr(v)) for k, v in request.model_arguments.items())
    return known.table(
        (
            checkpoint,
            request.auto_class,
            tuple(arguments),
            plan.criterion,
            plan.seed,
            text,
        )
    )


def _checkpoint(request: Request) -> Hashable:
    """Identify the checkpoint's content as it is now; None where that cannot be told."""
    folder = Path(request.pretrained)
    if not folder.is_dir():
        # A commit of the Hub never changes.
        commit = getattr(request.widths.original, "_commit_hash", None)
        return commit and (request.pretrained, commit)
    folder /= request.model_arguments.get("subfolder") or ""
    return tuple(_stamp(path) for path in sorted(folder.iterdir()) if path.is_file())


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns
