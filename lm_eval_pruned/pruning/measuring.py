"""What a model in memory says of its neurons and layers: scores, block influence, costs of cuts."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from lm_eval_pruned.pruning.calibration import (
    CalibrationText,
    calibrate,
    run_texts,
    unless_cpu,
)
from lm_eval_pruned.pruning.criteria import (
    ACTIVITY,
    OBS,
    RANDOM,
    check_finite,
    score_neurons,
)
from lm_eval_pruned.pruning.curvature import Curvature, curvature, enough
from lm_eval_pruned.pruning.curves import LayerCurve, Sensitivity
from lm_eval_pruned.pruning.depth import Depth, layers_of
from lm_eval_pruned.pruning.layer_by_layer import moved
from lm_eval_pruned.pruning.layouts import (
    NEURON_AXIS,
    find_glu_mlps,
    regions_by_parameter,
)
from lm_eval_pruned.pruning.repair import STEPS, errors_of_cuts


if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.arguments import Number, PruneArguments
    from lm_eval_pruned.pruning.calibration import Calibration
    from lm_eval_pruned.pruning.layouts import GluMlp

#: Shares of a layer's neurons at which an allocation asks what removing them costs, in percent: up to
#: seven eighths, in as many steps as neurons are removed in.
CUTS = tuple(Fraction(175, 2) * n / STEPS for n in range(1, STEPS + 1))


@dataclass
class ScoreTable:
    """What was measured of one unpruned model; it outlives the load, as weights do not.

    Attributes:
        scores: By criterion, seed and name of the GLU-MLP, shape (I,), float32, on the CPU.
        calibration: The activity of neurons, for criteria that need it.
        curvature: What errors in the outputs of layers cost.
        curves: The rises of the loss with one layer cut at a time, by what was asked for.
        influence: Block influence of each layer, and what the results file says of its text.
    """

    scores: dict[tuple[str, int, str], Tensor] = field(default_factory=dict)
    calibration: Calibration | None = None
    curvature: Curvature | None = None
    curves: dict[Hashable, Sensitivity] = field(default_factory=dict)
    influence: tuple[Sequence[float], Mapping[str, Any]] | None = None


#: The tables of several loads, by what identifies the model, its text and what decides.
KnownScores = dict[Hashable, ScoreTable]


def check_weights(model: PreTrainedModel, scored: Collection[str] = ()) -> None:
    """Refuse a model of which a weight is NaN or infinite; it may be quantised or on disk in part.

    Weights of the GLU-MLPs named in `scored` are not read again: scoring looked at them.

    Raises:
        ValueError: The first such weight is named.
    """
    regions = regions_by_parameter(find_glu_mlps(model) if scored else ())
    seen = {
        name
        for name, entries in regions.items()
        if all(mlp.name in scored and part == "weight" for mlp, (_, part), _ in entries)
    }
    for name, weight in model.named_parameters():
        plain = type(weight) is torch.nn.Parameter and weight.is_floating_point()
        if plain and not weight.is_meta and name not in seen:
            check_finite(name, weight.detach())


def block_influence(
    model: PreTrainedModel, texts: Sequence[Tensor]
) -> tuple[float, ...]:
    """Measure how much each decoder layer changes the hidden states of some texts.

    It is one minus the mean cosine similarity of what a layer is given and what it returns, over
    all tokens of `texts`, each of shape (1, tokens): from 0 (it changes no direction) to 2,
    float32 for a token, float64 for the sum. Layers of little influence can go.

    Raises:
        ValueError: Some hidden state was NaN or infinite.

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant
    Than You Expect", arXiv 2403.03853, section 2.2.
    """
    _, layers = layers_of(model)
    sums: dict[nn.Module, float] = dict.fromkeys(layers, 0.0)

    def compare(module, positional, named, output) -> None:
        given = positional[0] if positional else named["hidden_states"]
        returned = output[0] if isinstance(output, tuple) else output
        similar = cosine_similarity(
            given.float(), returned.float().to(given.device), dim=-1
        )
        sums[module] += float(similar.double().sum())

    run_texts(model, texts, "block influence", dict.fromkeys(layers, compare))
    tokens = sum(text.numel() for text in texts)
    found = tuple(1 - total / tokens for total in sums.values())
    for number, value in enumerate(found):
        if math.isnan(value):
            raise ValueError(
                f"The calibration text makes layer {number} return NaN or infinite hidden "
                "states: use another dtype, such as dtype=float32, or other text."
            )
    return found


def depth_in_memory(
    model: PreTrainedModel,
    arguments: PruneArguments,
    tokenizer: PreTrainedTokenizerBase | None = None,
    known: ScoreTable | None = None,
    device: torch.device | None = None,
) -> Depth | None:
    """Return which layers of a loaded model stay; `known` takes the influence that decides.

    Text runs on `device`, by default where the model is.

    Raises:
        ValueError: The layers or the text are wrong, or there is no tokenizer.
        UnsupportedModelError: Layers of this model cannot be dropped.
    """
    layers = len(layers_of(model)[1])
    if not arguments.measures_depth:
        return Depth.of(arguments, layers)
    known = known or ScoreTable()
    if known.influence is None:
        check_weights(model)
        samples: Any = arguments.calibration_samples
        text = CalibrationText.of(model, tokenizer, str(arguments.calibration), samples)
        with moved(model, device):
            on = text.as_dict() | unless_cpu(model.device)
            known.influence = block_influence(model, text.tokens), on
    return Depth.of(arguments, layers, *known.influence)


def text_loss(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return the loss of a text of shape (1, tokens), in nats, over the tokens but the first.

    The loss of a token is float32, its sum float64.
    """
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    losses = cross_entropy(logits.float(), tokens[0, 1:], reduction="none")
    return float(losses.double().sum())


@dataclass(frozen=True)
class LoadedModel:
    """What an unpruned model in memory says of its neurons and layers, each thing measured once.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer; needed where text is read.
        known: What was measured before; takes what is measured here.
        calibration: JSON Lines file of text.
        samples: How many of its texts to use; None for all.
        seed: Seed of the criterion ``random``.
        device: Where text runs; default: where the model is.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    known: ScoreTable
    calibration: str | None
    samples: int | None
    seed: int
    device: torch.device | None = None

    def score(self, mlp: GluMlp, criterion: str) -> Tensor:
        """Return the scores of an MLP by a criterion, shape (I,), on the CPU."""
        known, activity = self.known, None
        key = (criterion, self.seed if criterion == RANDOM else 0, mlp.name)
        if key not in known.scores:
            if criterion in ACTIVITY:
                activity = self._calibrated().activity[mlp.name]
            gate, up, down = (mlp.weight(each).contiguous() for each in NEURON_AXIS)
            scores = score_neurons(
                gate,
                up,
                criterion,
                layer=mlp.layer,
                seed=self.seed,
                down=down,
                activity=activity,
                name=mlp.name,
            )
            known.scores[key] = scores.cpu()
        return known.scores[key]

    def scores(
        self, criterion: str, mlps: Sequence[GluMlp] | None = None
    ) -> Mapping[str, Tensor]:
        """Return the scores of `mlps`, or of all, by a criterion and name of the MLP."""
        mlps = find_glu_mlps(self.model) if mlps is None else mlps
        if mlps and criterion in ACTIVITY:
            # Text runs once, before threads ask for it.
            self._calibrated()
        # Most of scoring does not hold the lock of the interpreter.
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda mlp: self.score(mlp, criterion), mlps)
            return {mlp.name: each for mlp, each in zip(mlps, found, strict=True)}

    def _calibrated(self) -> Calibration:
        known = self.known
        if known.calibration is None:
            given = (self.tokenizer, str(self.calibration), self.samples)
            with moved(self.model, self.device):
                known.calibration = calibrate(self.model, *given)
        return known.calibration

    def text(self) -> CalibrationText:
        """Return the calibration text that was asked for; see `CalibrationText.of`."""
        given = (self.model, self.tokenizer, str(self.calibration), self.samples)
        return CalibrationText.of(*given)

    def curvature(self) -> Curvature:
        """Return what an error in the output of each GLU-MLP costs."""
        known, model = self.known, self.model
        if known.curvature is None:
            mlps = find_glu_mlps(model)
            with moved(model, self.device):
                texts = enough(self.text().tokens, mlps)
                known.curvature = curvature(model, texts, mlps)
        return known.curvature

    def curves(
        self, ways: Sequence[tuple[str, int]], shares: Sequence[Number], repair: str
    ) -> Sensitivity:
        """Return by how much the loss rises when one layer is cut, for each layer and width.

        Args:
            ways: Criteria that choose the neurons, each with a seed, which counts for ``random``.
            shares: Shares of neurons to remove, in percent.
            repair: What follows a cut: none or least_squares.
        """
        key = (*ways, *shares, repair)
        if key not in self.known.curves:
            self.known.curves[key] = self._curves(ways, shares, repair)
        return self.known.curves[key]

    def _curves(
        self, ways: Sequence[tuple[str, int]], shares: Sequence[Number], repair: str
    ) -> Sensitivity:
        model, held = self.model, self._held()
        mlps = [mlp for own in held.values() for mlp in own]
        before = {n: own[0].width for n, own in held.items()}
        widths = {
            n: sorted(
                {width - math.floor(s / 100 * width) for s in shares} - {0, width},
                reverse=True,
            )
            for n, width in before.items()
        }
        # Other MLPs of a layer are cut in the same proportion.
        narrowed = {
            mlp.name: [math.ceil(Fraction(k * mlp.width, before[n])) for k in widths[n]]
            for n, own in held.items()
            for mlp in own
        }
        scores = [
            {} if name == OBS else dataclasses.replace(self, seed=seed).scores(name)
            for name, seed in ways
        ]
        minded, text = self.curvature(), self.text()
        errors = errors_of_cuts(
            *(model, text.tokens, mlps, narrowed, scores, minded.roots),
            *(repair, self.device),
        )
        curves, tokens = [], sum(each.numel() for each in text.tokens)
        for way, (name, seed) in enumerate(ways):
            for n, kept in widths.items():
                each = zip(*(errors[mlp.name][way] for mlp in held[n]), strict=True)
                # Half the squared error of a token, on average: the second-order term.
                rises = [sum(some) / 2 / tokens for some in each]
                own = (n, before[n], name, seed if name == RANDOM else None)
                curves.append(LayerCurve(*own, tuple(kept[::-1]), tuple(rises[::-1])))
        return Sensitivity(
            *(str(model.config.name_or_path), minded.loss, tuple(curves)),
            **text.as_dict(),
            repair=repair,
            device=str(self.device or model.device),
        )

    def _held(self) -> dict[int, list[GluMlp]]:
        """Return the MLPs of each layer, ascending; those to which sizes refer come first."""
        held: dict[int, list[GluMlp]] = defaultdict(list)
        found = find_glu_mlps(self.model)
        for mlp in sorted(found, key=lambda mlp: (mlp.block, mlp.kind != "expert")):
            held[mlp.block].append(mlp)
        return held
