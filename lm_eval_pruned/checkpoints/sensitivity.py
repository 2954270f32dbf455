"""Sensitivity of a checkpoint: its curves, measured layer by layer and kept in the user's cache."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

from lm_eval_pruned.checkpoints.default_model import cache_folder
from lm_eval_pruned.pruning.argument_values import exact
from lm_eval_pruned.pruning.calibration import (
    LENGTH,
    CalibrationText,
    calibrate,
    calibrate_by_layer,
    check_observable,
)
from lm_eval_pruned.pruning.criteria import (
    CALIBRATED,
    RANDOM,
    canonical_name,
    code_behind,
)
from lm_eval_pruned.pruning.layerwise import LayeredModel
from lm_eval_pruned.pruning.layouts import find_glu_mlps
from lm_eval_pruned.pruning.measuring import (
    Ranking,
    layered,
    measure,
    scores_of_activity,
)
from lm_eval_pruned.pruning.scores import ScoreTable
from lm_eval_pruned.pruning.sensitivity import Sensitivity, read_sensitivity


if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence
    from fractions import Fraction
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.pruning.arguments import Number

    #: A criterion and its seed.
    Way = tuple[str, int | None]

logger = logging.getLogger("lm_eval.pruned.sensitivity")

#: Shares of neurons that are removed by default, in percent.
REMOVED = (10, 25, 50)
#: How many texts the loss is measured on by default.
SAMPLES = 16
#: Part of the name of a cached curve; raise it when they are measured in another way.
_MEASURE = 1


def measure_sensitivity(
    request: LoadRequest,
    calibration: str,
    *,
    criteria: Sequence[str] = ("maw",),
    seeds: Sequence[int] = (0, 1, 2),
    removed: Sequence[Number] = REMOVED,
    samples: int | None = SAMPLES,
    length: int = LENGTH,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model: PreTrainedModel | None = None,
    known: ScoreTable | None = None,
) -> Sensitivity:
    """Measure what cutting one layer alone costs, for each layer, criterion and width.

    Each criterion takes one pass over the layers; in a model that cannot be run layer by
    layer, each cut takes a pass over the model. Curves are kept in ``sensitivity`` of the user's cache folder, one file for each
    criterion and seed, and found again as long as the checkpoint's files, the tokens,
    the arguments of the load, criterion (of another package: its code), seed and widths
    are the same.

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
        model: The unpruned model of `request`, if it is loaded already.
        known: Takes the scores by criteria that look at activations, if curves by them are
            not in the cache.

    Raises:
        ValueError: An argument is out of range, the text cannot be used, or the
            checkpoint is damaged.
        UnsupportedModelError: The model cannot be measured.
        OSError: A file of the checkpoint is missing or damaged.
    """
    ways: list[Way] = []
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
    if skeleton.config.is_encoder_decoder:
        check_observable(skeleton)
    tokenizer = tokenizer or request.load_tokenizer()
    text = CalibrationText.of(skeleton, tokenizer, calibration, samples, length)
    text.check_predictable()
    measurement = _Measurement(
        request,
        calibration,
        text,
        tokenizer,
        shares,
        samples,
        model,
        known or ScoreTable(),
    )
    return measurement.of(ways)


class _Measurement:
    """Curves of one model on one text at some shares."""

    def __init__(
        self,
        request: LoadRequest,
        calibration: str,
        text: CalibrationText,
        tokenizer: PreTrainedTokenizerBase,
        shares: list[Fraction],
        samples: int | None,
        model: PreTrainedModel | None,
        known: ScoreTable,
    ):
        self._request = request
        self._calibration = calibration
        self._text = text
        self._tokenizer = tokenizer
        self._shares = shares
        self._samples = samples
        self._model = model
        self._known = known

    def of(self, ways: Sequence[Way]) -> Sensitivity:
        files = {way: self._file(way) for way in ways}
        found = {way: each for way in ways if (each := _read(files[way])) is not None}
        missing = [way for way in ways if way not in found]
        if missing:
            for way, measured in self._measure(missing):
                _write(measured, files[way])
                found[way] = measured
        parts = [found[way] for way in ways]
        curves = tuple(curve for part in parts for curve in part.curves)
        return self._sensitivity(parts[0].loss, curves, parts[0].path)

    def _sensitivity(self, loss: float, curves: tuple, path: str) -> Sensitivity:
        text = self._text
        return Sensitivity(
            self._request.pretrained,
            loss,
            curves,
            text.path.name,
            text.sha256,
            len(text.tokens),
            text.count,
            path,
        )

    def _measure(self, ways: list[Way]) -> Iterator[tuple[Way, Sensitivity]]:
        """Measure the curves of each way, all of them with the model opened once."""
        observed = [criterion for criterion, _ in ways if criterion in CALIBRATED]
        if observed:
            check_observable(self._request.widths.skeleton())
        whole = self._model or self._request.load_stored()[0]
        model, how = layered(whole, self._text.tokens[0])
        scores = self._observe(model, observed) if observed else {}
        plan, texts = self._request.plan, self._text.tokens
        for criterion, seed in ways:
            ranking = Ranking.by(plan, criterion, seed, scores)
            loss, curves = measure(model, texts, ranking, self._shares)
            path = how or "layer by layer"
            yield (criterion, seed), self._sensitivity(loss, curves, path)

    def _observe(
        self, model: LayeredModel | PreTrainedModel, criteria: list[str]
    ) -> dict[str, dict[str, Tensor]]:
        """Return scores by criterion and name of the MLP."""
        plan = self._request.plan
        scores: dict[str, dict[str, Tensor]] = {each: {} for each in criteria}

        def seen(mlp, activity) -> None:
            found = scores_of_activity(plan, mlp, activity, criteria)
            for criterion, values in found.items():
                scores[criterion][mlp.name] = values

        if isinstance(model, LayeredModel):
            text = self._whole_text(model.model)
            observed = calibrate_by_layer(model, text, seen)
        else:
            file, samples = self._calibration, self._samples
            observed = calibrate(model, self._tokenizer, file, samples)
            for mlp in find_glu_mlps(model):
                seen(mlp, observed.activity[mlp.name])
        self._known.calibration = observed
        self._known.by_criterion |= scores
        return scores

    def _whole_text(self, model: PreTrainedModel) -> CalibrationText:
        return CalibrationText.of(
            model, self._tokenizer, self._calibration, self._samples
        )

    def _file(self, way: Way) -> Path | None:
        """Return the file in the cache that holds the curves of `way`, if any can."""
        content, code = self._request.content_key(), code_behind(way[0])
        if content is None or code is None:
            return None
        texts = [self._text]
        if way[0] in CALIBRATED:
            texts.append(self._whole_text(self._request.widths.skeleton()))
        tokens = [[each.tolist() for each in text.tokens] for text in texts]
        key: tuple[Hashable, ...]
        key = (_MEASURE, content, repr(tokens), way, tuple(self._shares))
        if code:
            key += (code,)
        digest = hashlib.sha256(repr(key).encode()).hexdigest()
        return cache_folder() / "sensitivity" / f"{digest}.json"


def _read(file: Path | None) -> Sensitivity | None:
    if file is None or not file.is_file():
        return None
    try:
        return read_sensitivity(file)
    except ValueError as error:
        logger.warning("%s", error)
        return None


def _write(measured: Sensitivity, file: Path | None) -> None:
    if file is None:
        return
    try:
        measured.write(file)
    except OSError as error:
        logger.warning(
            "The cache %s cannot be written (%s), so the curves are measured each time; set "
            "XDG_CACHE_HOME to a writable folder to avoid that.",
            file.parent,
            error,
        )
