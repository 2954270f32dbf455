"""Sensitivity of a checkpoint: what cutting each of its layers costs, in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_pruned.pruning.argument_values import (
    LEAST_SQUARES,
    NO_REPAIR,
    exact,
    seed_below_limit,
    whole,
)
from lm_eval_pruned.pruning.arguments import OWN_TEXT
from lm_eval_pruned.pruning.calibration import (
    CalibrationText,
    check_observable,
)
from lm_eval_pruned.pruning.criteria import OBS, RANDOM, canonical_name
from lm_eval_pruned.pruning.measuring import LoadedModel, check_weights


if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

    from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
    from lm_eval_pruned.pruning.arguments import Number
    from lm_eval_pruned.pruning.curves import Sensitivity


def measure_sensitivity(
    checkpoint: Checkpoint,
    calibration: str = str(OWN_TEXT),
    *,
    criteria: Iterable[str] = ("maw", "act", RANDOM),
    seeds: Iterable[Number] | None = None,
    prune_percents: Iterable[Number] = (10, 25, 50),
    calibration_samples: Number | None = None,
    repair: str = NO_REPAIR,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Sensitivity:
    """Return what cutting a single layer costs, for each layer, criterion and width.

    Args:
        checkpoint: The model, whatever its plan says.
        calibration: JSON Lines file of text; default: text that comes with this package. See
            `lm_eval_pruned.pruning.calibration`.
        criteria: Which choose the neurons.
        seeds: Seeds of ``random``; default: 0, 1, 2.
        prune_percents: Shares of neurons to remove, as ``prune_percent`` counts.
        calibration_samples: How many texts to use, from the first on; default: all.
        repair: What follows the cut of a layer: none or least_squares.
        tokenizer: What reads the text; default: the model's own.

    Raises:
        ValueError: An argument is out of range, the text cannot be used, or the
            checkpoint is damaged.
        UnsupportedModelError: Activations of the model cannot be observed.
        OSError: A file of the checkpoint is missing.
    """
    if repair not in (NO_REPAIR, LEAST_SQUARES):
        raise ValueError(
            f"repair={repair} has no curves: pass {NO_REPAIR} or {LEAST_SQUARES}."
        )
    device = checkpoint.device()
    named = [each if each == OBS else canonical_name(each) for each in criteria]
    names = dict.fromkeys(named)
    if seeds is not None and RANDOM not in names:
        raise ValueError(
            f"seeds={' '.join(map(str, seeds))} were given, but only the criterion random uses "
            "seeds: add random to criteria, or leave seeds out."
        )
    drawn = {seed_below_limit("seeds", each): None for each in seeds or (0, 1, 2)}
    ways = [(n, s) for n in names for s in (drawn if n == RANDOM else [0])]
    shares = sorted({exact("prune_percents", each, "25") for each in prune_percents})
    if not ways or not shares or not 0 < shares[0] <= shares[-1] < 100:
        raise ValueError(
            f"criteria={' '.join(names)} and prune_percents={' '.join(f'{float(s):g}' for s in shares)} "
            "leave nothing to measure: name a criterion and shares between 0 and 100, such as 10 25 50."
        )
    if calibration_samples is not None:
        calibration_samples = whole("calibration_samples", calibration_samples)
    skeleton = checkpoint.widths.skeleton
    check_observable(skeleton, stacked=True)
    tokenizer = tokenizer or checkpoint.load_tokenizer()
    # What is wrong with the text is refused before weights are read.
    CalibrationText.of(skeleton, tokenizer, calibration, calibration_samples)
    model, _ = checkpoint.with_stored_widths().load_stored()
    check_weights(model)
    text = (tokenizer, calibration, calibration_samples)
    loaded = LoadedModel(model, *text, 0, device, checkpoint.content_key())
    return loaded.curves(ways, shares, repair)
