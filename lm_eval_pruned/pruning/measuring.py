"""What a model in memory says of its neurons and layers: scores, and costs of cuts."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from lm_eval_pruned.pruning.argument_values import UNIFORM
from lm_eval_pruned.pruning.arguments import OWN_TEXT
from lm_eval_pruned.pruning.calibration import Calibration, calibrate, unless_cpu
from lm_eval_pruned.pruning.calibration_text import SELF, TextSource
from lm_eval_pruned.pruning.criteria import (
    ACTIVITY,
    CRITERIA,
    OBS,
    RANDOM,
    check_finite,
    score_neurons,
)
from lm_eval_pruned.pruning.curvature import Curvature, curvature, enough
from lm_eval_pruned.pruning.curves import LayerCurve, Sensitivity
from lm_eval_pruned.pruning.layouts import (
    NEURON_AXIS,
    find_glu_mlps,
    regions_by_parameter,
)
from lm_eval_pruned.pruning.lending import float64, moved
from lm_eval_pruned.pruning.moments import Moments, TextMoments
from lm_eval_pruned.pruning.repair import STEPS, errors_of_cuts
from lm_eval_pruned.util.cache import measured_once


if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.arguments import Number, PruneArguments
    from lm_eval_pruned.pruning.calibration_text import CalibrationText
    from lm_eval_pruned.pruning.layouts import GluMlp
    from lm_eval_pruned.util.cache import Measured

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.calibration")

#: Shares of a layer's neurons at which an allocation asks what removing them costs, in percent: up to
#: seven eighths, in as many steps as neurons are removed in.
CUTS = tuple(Fraction(175, 2) * n / STEPS for n in range(1, STEPS + 1))
#: So many bytes of `Moments` are kept at most: those of a model of 300M parameters.
_MOST_STORED = 1e9


def check_weights(model: PreTrainedModel, scored: Iterable[GluMlp] = ()) -> None:
    """Refuse a model of which a weight is NaN or infinite; it may be quantised or on disk in part.

    Weights of GLU-MLPs that were `scored` are not read again: scoring looked at them.

    Raises:
        ValueError: The first such weight is named.
    """
    seen = {
        name
        for name, [(_, (_, part), _), *_] in regions_by_parameter(scored).items()
        if part == "weight"
    }
    for name, weight in model.named_parameters():
        plain = type(weight) is torch.nn.Parameter and weight.is_floating_point()
        if plain and not weight.is_meta and name not in seen:
            check_finite(name, weight.detach())


def text_loss(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return the loss of a text of shape (1, tokens), in nats, over the tokens but the first.

    The loss of a token is float32, its sum float64.
    """
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    losses = cross_entropy(logits.float(), tokens[0, 1:], reduction="none")
    return float(float64(losses).sum())


@dataclass(frozen=True)
class LoadedModel:
    """What an unpruned model in memory says of its neurons and layers.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer; needed where text is read.
        arguments: The text to read, and how neurons are chosen.
        device: Where text runs; default: where the model is.
        content: What identifies the model, for `measured_once`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    arguments: PruneArguments
    device: torch.device | None = None
    content: Hashable | None = None

    def scores(self, mlps: Sequence[GluMlp]) -> Mapping[str, Tensor]:
        """Return the scores of neurons, shape (I,), on the CPU, by name of the MLP."""
        criterion, seed = self.arguments.criterion, int(self.arguments.seed)
        norms = self.observed.norms if mlps and criterion in ACTIVITY else {}

        def score(mlp: GluMlp) -> Tensor:
            gate, up, down = (mlp.weight(part).contiguous() for part in NEURON_AXIS)
            return score_neurons(
                gate,
                up,
                criterion,
                layer=mlp.index,
                seed=seed,
                down=down,
                activity=norms.get(mlp.name),
                name=mlp.name,
            ).cpu()

        # Most of scoring does not hold the lock of the interpreter.
        with ThreadPoolExecutor() as pool:
            scores = pool.map(score, mlps)
            return {mlp.name: row for mlp, row in zip(mlps, scores, strict=True)}

    @functools.cached_property
    def observed(self) -> Calibration:
        """What the neurons do on the calibration text."""
        text = self.text

        def measure() -> Measured:
            with moved(self.model, self.device):
                measured_on = text.as_dict() | unless_cpu(self.model.device)
                return calibrate(self.model, text.tokens), measured_on

        return Calibration(*self._measured_once(("activity", text.key), measure))

    def _measured_once(
        self, what: Hashable, measure: Callable[[], Measured]
    ) -> Measured:
        kind_of_device = (self.device or self.model.device).type
        return measured_once(self.content, (what, kind_of_device), measure)

    @functools.cached_property
    def text(self) -> CalibrationText:
        """The calibration text that was asked for; see `TextSource.read`."""
        source = TextSource.of(self.arguments)
        if source.name != str(OWN_TEXT):
            logger.info(
                "A cut keeps what calibration=%s holds: if that is of one kind, other kinds of text lose "
                "more. Measure the cost on other text of the kinds that you need.",
                source.name,
            )
        # A file is read without the model.
        device = self.device if source.name == SELF else None
        with moved(self.model, device):
            return source.read(self.model, self.tokenizer, self.content)

    @functools.cached_property
    def curvature(self) -> Curvature:
        """What an error in the output of each GLU-MLP costs."""
        text = self.text

        def measure() -> Measured:
            mlps = find_glu_mlps(self.model)
            with moved(self.model, self.device):
                texts = enough(text.tokens, mlps)
                return curvature(self.model, texts, mlps).as_measured()

        what = ("curvature", "of sizes", text.key)
        return Curvature.of(*self._measured_once(what, measure))

    @functools.cached_property
    def moments(self) -> TextMoments:
        """What the neurons of each GLU-MLP do on the text, kept for any cut of the model.

        The text runs again for each use where that takes too much room, or where it has one use.
        """
        mlps, text = find_glu_mlps(self.model), self.text
        running = TextMoments(self.model, text.tokens, self.device)
        used_once = self.content is None and self.arguments.allocation == UNIFORM
        if used_once or sum(4 * mlp.width**2 for mlp in mlps) > _MOST_STORED:
            return running

        def measure() -> Measured:
            measured = running.measure(mlps)
            scatters = {name: moments.scatter for name, moments in measured.items()}
            means = {f"{name} mean": moments.mean for name, moments in measured.items()}
            tokens = {name: moments.tokens for name, moments in measured.items()}
            return scatters | means, tokens

        tensors, tokens = self._measured_once(("moments", text.key), measure)
        stored = {
            name: Moments(tensors[name], tensors[f"{name} mean"], count)
            for name, count in tokens.items()
        }
        return dataclasses.replace(running, stored=stored)

    def curves(self, shares: Sequence[Number] = CUTS) -> Sensitivity:
        """Return what it costs to cut one layer, for each layer and width.

        `shares` are those of neurons to remove, in percent.
        """

        def measure() -> Measured:
            return {}, self._curves(shares).as_dict()

        how = self.arguments.criterion, int(self.arguments.seed), self.arguments.repair
        # Nothing tells whether the code of another package is still the same.
        if how[0] not in (OBS, RANDOM, *CRITERIA):
            return Sensitivity.of(measure()[1])
        what = ("curves", "of sizes", self.text.key, how, tuple(shares))
        return Sensitivity.of(self._measured_once(what, measure)[1])

    def _curves(self, shares: Sequence[Number]) -> Sensitivity:
        criterion, repair = self.arguments.criterion, self.arguments.repair
        model, text, by_layer = self.model, self.text, self._mlps_by_layer()
        mlps = [mlp for together in by_layer.values() for mlp in together]
        widths, narrowed = {}, {}
        for layer, together in by_layer.items():
            width = together[0].width
            sizes = {width - math.floor(Fraction(s) / 100 * width) for s in shares}
            widths[layer] = sorted(sizes - {0, width}, reverse=True)
            # Other MLPs of a layer are cut in the same proportion.
            for mlp in together:
                narrowed[mlp.name] = [
                    math.ceil(Fraction(kept * mlp.width, width))
                    for kept in widths[layer]
                ]
        scores = {} if criterion == OBS else self.scores(mlps)
        roots = self.curvature.roots
        errors = errors_of_cuts(self.moments, mlps, narrowed, scores, roots, repair)
        curves, tokens = [], sum(ids.numel() for ids in text.tokens)
        for layer, kept in widths.items():
            by_mlp = [errors[mlp.name] for mlp in by_layer[layer]]
            # Half the squared error of a token, on average: the second-order term.
            rises = [sum(both) / 2 / tokens for both in zip(*by_mlp, strict=True)]
            before = by_layer[layer][0].width
            curves.append(
                LayerCurve(layer, before, tuple(kept[::-1]), tuple(rises[::-1]))
            )
        return Sensitivity(
            str(model.config.name_or_path),
            self.curvature.loss,
            tuple(curves),
            criterion,
            repair,
            **text.as_dict(),
            device=str(self.device or model.device),
        )

    def _mlps_by_layer(self) -> dict[int, list[GluMlp]]:
        """Return the MLPs of each layer, ascending; those to which sizes refer come first."""
        by_layer: dict[int, list[GluMlp]] = defaultdict(list)
        mlps = find_glu_mlps(self.model)
        for mlp in sorted(mlps, key=lambda mlp: (mlp.layer, mlp.kind != "expert")):
            by_layer[mlp.layer].append(mlp)
        return by_layer
