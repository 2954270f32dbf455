"""Sensitivity of a checkpoint: what cutting each of its layers costs, in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_pruned.checkpoints.load import Stored
from lm_eval_pruned.pruning.argument_values import exact
from lm_eval_pruned.pruning.measuring import check_weights


if TYPE_CHECKING:
    from collections.abc import Iterable

    from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
    from lm_eval_pruned.pruning.arguments import Number
    from lm_eval_pruned.pruning.curves import Sensitivity


def measure_sensitivity(
    checkpoint: Checkpoint, prune_percents: Iterable[Number] = (10, 25, 50)
) -> Sensitivity:
    """Return what cutting a single layer costs, for each layer and width.

    Args:
        checkpoint: The model, and how it is cut: its arguments have ``allocation=sensitivity``, and
            any size, which does not count.
        prune_percents: Shares of neurons to remove, as ``prune_percent`` counts.

    Raises:
        ValueError: An argument is out of range, the text cannot be used, or the
            checkpoint is damaged.
        UnsupportedModelError: Layers of the model cannot be compared.
        OSError: A file of the checkpoint is missing.
    """
    shares = sorted({exact("prune_percents", p, "25") for p in prune_percents})
    if not shares or not 0 < shares[0] <= shares[-1] < 100:
        raise ValueError(
            f"prune_percents={' '.join(f'{float(s):g}' for s in shares)} leaves nothing to measure: "
            "name shares between 0 and 100, such as 10 25 50."
        )
    checkpoint.check_text()
    stored = Stored.of(checkpoint.with_stored_widths())
    check_weights(stored.model)
    return stored.curves(shares)
