"""Sensitivity of a checkpoint: its loss curves, measured once and kept in the user's cache."""

from __future__ import annotations

import functools
import hashlib
import logging
from typing import TYPE_CHECKING

from lm_eval_pruned.checkpoints.default_model import cache_folder
from lm_eval_pruned.pruning.argument_values import exact
from lm_eval_pruned.pruning.calibration import CalibrationText, check_observable
from lm_eval_pruned.pruning.criteria import (
    CALIBRATED,
    CRITERIA,
    RANDOM,
    canonical_name,
)
from lm_eval_pruned.pruning.curves import Sensitivity, read_sensitivity
from lm_eval_pruned.pruning.measuring import LENGTH, LoadedModel, ScoreTable


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from fractions import Fraction

    from transformers import PreTrainedTokenizerBase

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.arguments import Number

logger = logging.getLogger("lm_eval.pruned.sensitivity")

#: How many texts the loss is measured on by default.
SAMPLES = 16
#: Part of the name of a cached curve; raise it when they are measured in another way.
_MEASURE = 2


def measure_sensitivity(
    request: LoadRequest,
    calibration: str,
    *,
    criteria: Sequence[str] = ("maw",),
    seeds: Sequence[int] = (0, 1, 2),
    removed: Sequence[Number] = (10, 25, 50),
    samples: int | None = SAMPLES,
    length: int = LENGTH,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Sensitivity:
    """Measure what cutting one layer alone costs, for each layer, criterion and width.

    Curves are kept in ``sensitivity`` of the user's cache folder, one file for each
    criterion and seed, and found again as long as the checkpoint's files, the tokens,
    the arguments of the load, criterion, seed and widths are the same. Those of another
    package's criterion are measured each time.

    Args:
        request: The model, whatever its plan says.
        calibration: JSON Lines file of text; see `lm_eval_pruned.pruning.calibration`.
        criteria: Which to measure. Those that look at activations see the same texts,
            and all of each, as they do when a model is loaded with
            ``calibration_samples`` of the same number.
        seeds: Seeds of ``random``, each of which has curves of its own.
        removed: Shares of neurons to remove, in percent, as ``prune_percent`` counts.
        samples: How many texts to use, from the first on; None for all.
        length: How many tokens of each text to use for the loss.
        tokenizer: What reads the text; default: the model's own.

    Raises:
        ValueError: An argument is out of range, the text cannot be used, or the
            checkpoint is damaged.
        UnsupportedModelError: The model cannot be measured.
        OSError: A file of the checkpoint is missing or damaged.
    """
    ways: list[tuple[str, int | None]] = []
    for name in dict.fromkeys(map(canonical_name, criteria)):
        ways += [(name, each) for each in (seeds if name == RANDOM else (None,))]
    shares = sorted({exact("removed", each, "25") for each in removed})
    for share in shares:
        if not 0 < share < 100:
            raise ValueError(
                f"removed={float(share):g} is outside (0, 100): pass shares of neurons to remove, "
                "in percent, such as 10, 25 and 50."
            )
    if not ways or not shares or length < 2:
        raise ValueError(
            "There is nothing to measure: name a criterion and a share to remove, and use 2 tokens "
            "of each text or more."
        )
    skeleton = request.widths.skeleton()
    if skeleton.config.is_encoder_decoder or {name for name, _ in ways} & {*CALIBRATED}:
        check_observable(skeleton)
    tokenizer = tokenizer or request.load_tokenizer()
    read = functools.partial(
        CalibrationText.of, skeleton, tokenizer, calibration, samples
    )
    text, known = read(length, shortest=2), ScoreTable()
    load = functools.cache(lambda: request.load(stored=True)[0])

    def measure(criterion: str, seed: int | None) -> Sensitivity:
        seed = request.plan.seed if seed is None else seed
        loaded = LoadedModel(load(), tokenizer, known, calibration, samples, seed)
        return loaded.losses(text, criterion, shares)

    parts = [
        cached_losses(
            request, functools.partial(measure, *way), read, text, *way, shares
        )
        for way in ways
    ]
    curves = tuple(curve for part in parts for curve in part.curves)
    return Sensitivity(request.pretrained, parts[0].loss, curves, **text.as_dict())


def cached_losses(
    request: LoadRequest,
    measure: Callable[[], Sensitivity],
    read: Callable[[], CalibrationText],
    text: CalibrationText,
    criterion: str,
    seed: int | None,
    shares: Sequence[Fraction],
) -> Sensitivity:
    """Return the curves by one criterion from the user's cache, else measure and keep them.

    Args:
        request: The model.
        measure: Measures the curves.
        read: Reads the text of criteria that look at activations.
        text: What the loss is measured on.
        criterion: Canonical name.
        seed: Its seed, for ``random``.
        shares: Shares of neurons to remove, in percent, ascending.
    """
    content = request.content_key()
    # Nothing tells whether the code of another package is still the same.
    if content is None or criterion not in (RANDOM, *CRITERIA):
        return measure()
    texts = [text, read()] if criterion in CALIBRATED else [text]
    tokens = [[each.tolist() for each in text.tokens] for text in texts]
    key = (_MEASURE, content, repr(tokens), criterion, seed, shares, "")
    name = hashlib.sha256(repr(key).encode()).hexdigest()
    file = cache_folder() / "sensitivity" / f"{name}.json"
    if file.is_file():
        try:
            return read_sensitivity(file)
        except ValueError as error:
            logger.warning("%s", error)
    measured = measure()
    try:
        measured.write(file)
    except OSError as error:
        logger.warning(
            "The cache %s cannot be written (%s), so the curves are measured each time; set "
            "XDG_CACHE_HOME to a writable folder to avoid that.",
            file.parent,
            error,
        )
    return measured
