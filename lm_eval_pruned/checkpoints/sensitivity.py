"""Sensitivity of a checkpoint: what the loss becomes when a single layer is cut."""

from __future__ import annotations

import dataclasses
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
    tell_device,
)
from lm_eval_pruned.pruning.criteria import (
    ACTIVITY,
    OBS,
    RANDOM,
    canonical_name,
)
from lm_eval_pruned.pruning.curves import Sensitivity
from lm_eval_pruned.pruning.measuring import (
    LENGTH,
    LoadedModel,
    check_weights,
    samples_for_losses,
)


if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerBase

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.arguments import Number


def measure_sensitivity(
    request: LoadRequest,
    calibration: str = str(OWN_TEXT),
    *,
    criteria: Iterable[str] = ("maw", "act", RANDOM),
    seeds: Iterable[Number] | None = None,
    prune_percents: Iterable[Number] = (10, 25, 50),
    calibration_samples: Number | None = None,
    calibration_tokens: Number = LENGTH,
    repair: str = NO_REPAIR,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Sensitivity:
    """Measure what cutting a single layer costs, for each layer, criterion and width.

    Args:
        request: The model, whatever its plan says.
        calibration: JSON Lines file of text; default: text that comes with this package. See
            `lm_eval_pruned.pruning.calibration`.
        criteria: Which to measure. Those that look at activations see all tokens of the texts.
        seeds: Seeds of ``random``; default: 0, 1, 2.
        prune_percents: Shares of neurons to remove, as ``prune_percent`` counts.
        calibration_samples: How many texts to use, from the first on; default: the first 16.
        calibration_tokens: How many tokens of each text to use for the loss.
        repair: What follows the cut of a layer: none or least_squares. Repair sees all tokens, by
            default of all texts.
        tokenizer: What reads the text; default: the model's own.

    Raises:
        ValueError: An argument is out of range, the text cannot be used, or the
            checkpoint is damaged.
        UnsupportedModelError: The model cannot be measured.
        OSError: A file of the checkpoint is missing.
    """
    if repair not in (NO_REPAIR, LEAST_SQUARES):
        raise ValueError(
            f"repair={repair} has no curves: pass {NO_REPAIR} or {LEAST_SQUARES}."
        )
    device = request.device()
    tell_device(device)
    named = [each if each == OBS else canonical_name(each) for each in criteria]
    names = dict.fromkeys(named)
    if OBS in names and repair == NO_REPAIR:
        raise ValueError(
            f"criterion={OBS} orders neurons by what their removal costs after repair: add "
            f"repair={LEAST_SQUARES}, or name another criterion."
        )
    if seeds is not None and RANDOM not in names:
        raise ValueError(
            f"seeds={' '.join(map(str, seeds))} were given, but only the criterion random uses "
            "seeds: add random to criteria, or leave seeds out."
        )
    drawn = {seed_below_limit("seeds", each): None for each in seeds or (0, 1, 2)}
    ways = [(n, s) for n in names for s in (drawn if n == RANDOM else [None])]
    shares = sorted({exact("prune_percents", each, "25") for each in prune_percents})
    length = whole("calibration_tokens", calibration_tokens)
    if not ways or not shares or length < 2 or not 0 < shares[0] <= shares[-1] < 100:
        raise ValueError(
            f"criteria={' '.join(names)}, prune_percents={' '.join(f'{float(s):g}' for s in shares)} and "
            f"calibration_tokens={length} leave nothing to measure: name a criterion and shares "
            "between 0 and 100, such as 10 25 50, and use 2 tokens of each text or more."
        )
    if calibration_samples is not None:
        calibration_samples = whole("calibration_samples", calibration_samples)
    samples = samples_for_losses(calibration, calibration_samples)
    skeleton = request.widths.skeleton()
    if skeleton.config.is_encoder_decoder or names.keys() & {*ACTIVITY}:
        check_observable(skeleton)
    tokenizer = tokenizer or request.load_tokenizer()
    text = CalibrationText.of(skeleton, tokenizer, calibration, samples, length, 2)
    model, *_ = request.load_stored()
    check_weights(model)
    # As where a model is pruned.
    seen: int | None = samples if repair == NO_REPAIR else calibration_samples
    loaded = LoadedModel(
        *(model, tokenizer, calibration, seen, 0, device, request.content_key())
    )
    parts = []
    for name, seed in ways:
        drawing = loaded if seed is None else dataclasses.replace(loaded, seed=seed)
        parts.append(drawing.losses(text, name, shares, repair))
    curves = tuple(curve for part in parts for curve in part.curves)
    return Sensitivity(
        *(request.pretrained, parts[0].loss, curves),
        **text.as_dict(),
        repair=repair,
        device=parts[0].device,
    )
