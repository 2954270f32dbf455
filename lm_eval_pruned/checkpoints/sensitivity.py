"""Sensitivity of a checkpoint: its loss curves, measured once and kept in the user's cache."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from typing import TYPE_CHECKING

from lm_eval_pruned.checkpoints.default_model import cache_folder
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
    CRITERIA,
    OBS,
    RANDOM,
    canonical_name,
)
from lm_eval_pruned.pruning.curves import Sensitivity, read_sensitivity
from lm_eval_pruned.pruning.measuring import (
    LENGTH,
    LoadedModel,
    ScoreTable,
    check_weights,
    samples_for_losses,
)


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from fractions import Fraction

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.arguments import Number

#: Part of the name of a cached curve; raise it when they are measured in another way.
_MEASURE = 2


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
    read = functools.partial(CalibrationText.of, skeleton, tokenizer, calibration)
    text, known = read(samples, length, shortest=2), ScoreTable()
    # As where a model is pruned.
    seen: int | None = samples if repair == NO_REPAIR else calibration_samples

    @functools.cache
    def load() -> PreTrainedModel:
        model, *_ = request.load_stored()
        check_weights(model)
        return model

    def measure(criterion: str, seed: int | None) -> Sensitivity:
        text_of = (tokenizer, known, calibration, seen)
        loaded = LoadedModel(load(), *text_of, seed or 0, device)
        return loaded.losses(text, criterion, shares, repair)

    parts = []
    for way in ways:
        given = request, functools.partial(measure, *way), functools.partial(read, seen)
        parts.append(cached_losses(*given, text, *way, shares, repair))
    curves = tuple(curve for part in parts for curve in part.curves)
    return Sensitivity(
        *(request.pretrained, parts[0].loss, curves),
        **text.as_dict(),
        repair=repair,
        device=parts[0].device,
    )


def cached_losses(
    request: LoadRequest,
    measure: Callable[[], Sensitivity],
    read: Callable[[], CalibrationText],
    text: CalibrationText,
    criterion: str,
    seed: int | None,
    shares: Sequence[Fraction],
    repair: str = NO_REPAIR,
) -> Sensitivity:
    """Return the curves by one criterion from the user's cache, else `measure` and keep them."""
    content = request.content_key()
    # Nothing tells whether the code of another package is still the same.
    if content is None or criterion not in (OBS, RANDOM, *CRITERIA):
        return measure()
    reads = criterion in ACTIVITY or repair != NO_REPAIR
    read_by = [text, read()] if reads else [text]
    tokens = [[each.tolist() for each in text.tokens] for text in read_by]
    after = "" if repair == NO_REPAIR else repair
    key = (_MEASURE, content, repr(tokens), criterion, seed, shares, after)
    name = hashlib.sha256(repr(key).encode()).hexdigest()
    file = cache_folder() / "sensitivity" / f"{name}.json"
    with contextlib.suppress(ValueError):
        return read_sensitivity(file)
    measured = measure()
    # Without a cache that can be written, they are measured each time.
    with contextlib.suppress(OSError):
        measured.write(file)
    return measured
