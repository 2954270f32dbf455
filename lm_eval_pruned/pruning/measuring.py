"""Measuring sensitivity: the loss of a model in which one layer alone is cut.

A variant is the model with one layer cut to one width. It is the unpruned model up to
that layer, so it is born there, and its hidden states go through the layers after it
side by side with those of the other variants. A cut sets the removed columns of
``down_proj`` to zero, which computes what the narrow layer would.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from lm_eval_pruned.model_wrappers.batching.cpu_linear import fast_cpu_linears
from lm_eval_pruned.pruning.calibration import LENGTH, CalibrationText
from lm_eval_pruned.pruning.criteria import (
    CALIBRATED,
    RANDOM,
    kept_set,
    score_neurons,
)
from lm_eval_pruned.pruning.layerwise import LayeredModel, NotLayerByLayer, loss_of
from lm_eval_pruned.pruning.layouts import find_glu_mlps
from lm_eval_pruned.pruning.sensitivity import LayerCurve, Sensitivity
from lm_eval_pruned.pruning.settling import REMOVED
from lm_eval_pruned.util.progress import steps


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.calibration import NeuronActivity
    from lm_eval_pruned.pruning.layouts import GluMlp
    from lm_eval_pruned.pruning.plan import PrunePlan


@dataclass(frozen=True)
class Ranking:
    """How neurons are ranked while curves are measured.

    Attributes:
        plan: A plan with the criterion and its seed.
        known: Scores by name of the GLU-MLP, for a criterion that looks at activations;
            empty for any other.
    """

    plan: PrunePlan
    known: Mapping[str, Tensor]

    @classmethod
    def by(
        cls,
        plan: PrunePlan,
        criterion: str,
        seed: int | None,
        scores: Mapping[str, Mapping[str, Tensor]],
    ) -> Ranking:
        """Rank by `criterion`; `scores` are those of calibrated ones, by criterion."""
        plan = dataclasses.replace(plan, criterion=criterion, seed=seed or 0)
        return cls(plan, scores[criterion] if criterion in CALIBRATED else {})

    @property
    def seed(self) -> int | None:
        """Seed of the criterion ``random``; None for any other."""
        return self.plan.seed if self.plan.criterion == RANDOM else None

    def scores(self, mlp: GluMlp) -> Tensor:
        """Return the scores of an MLP whose weights are in memory, shape (I,), on the CPU."""
        if mlp.name in self.known:
            return self.known[mlp.name]
        gate, up = mlp.weight("gate_proj"), mlp.weight("up_proj")
        return score_neurons(
            gate,
            up,
            self.plan.criterion,
            layer=mlp.layer,
            seed=self.plan.seed,
            name=mlp.name,
        ).cpu()


def widths_of(mlps: Sequence[GluMlp], removed: Iterable[Fraction]) -> tuple[int, ...]:
    """Return the widths at which a layer is measured, ascending.

    Args:
        mlps: Its GLU-MLPs; sizes refer to its experts, where it has any.
        removed: Shares of neurons to remove, in percent.
    """
    before = _primary(mlps).width
    found = {before - math.floor(share / 100 * before) for share in removed}
    return tuple(sorted(width for width in found if 1 <= width < before))


@contextlib.contextmanager
def cut(
    mlps: Sequence[GluMlp], width: int, scores: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let the GLU-MLPs of a layer compute as if they were narrow, for a while.

    Args:
        mlps: Those of one layer, their weights in memory.
        width: Kept width of its primary MLP; others are cut in proportion.
        scores: Scores of the neurons, by name of the MLP.
    """
    before = _primary(mlps).width
    with contextlib.ExitStack() as undo, torch.no_grad():
        for mlp in mlps:
            own = math.ceil(Fraction(mlp.width * width, before))
            kept = kept_set(scores[mlp.name], own)
            gone = torch.ones(mlp.width, dtype=torch.bool, device="cpu")
            gone[kept] = False
            region = mlp.regions["down_proj", "weight"]
            down = region.view(mlp.parameter(region).detach())
            columns = gone.nonzero().flatten().to(down.device)
            undo.callback(down.index_copy_, 1, columns, down[:, columns])
            down.index_fill_(1, columns, 0)
        yield


def measure(
    model: LayeredModel | PreTrainedModel,
    texts: Sequence[Tensor],
    ranking: Ranking,
    removed: Sequence[Fraction],
) -> tuple[float, tuple[LayerCurve, ...]]:
    """Measure the curves of one criterion, with a bar on a terminal; see `measure_by_layer`.

    Args:
        model: The unpruned model; whole, where it cannot be run layer by layer.
        texts: Tokens of each, shape (1, tokens), two or more.
        ranking: How neurons are ranked.
        removed: Shares of neurons to remove, in percent.
    """
    seed = "" if ranking.seed is None else f", seed {ranking.seed}"
    what = f"sensitivity by {ranking.plan.criterion}{seed}"
    if isinstance(model, LayeredModel):
        with steps(len(model) * len(texts), what) as step:
            return measure_by_layer(model, texts, ranking, removed, step)
    count = len({mlp.block for mlp in find_glu_mlps(model)})
    with steps(count * len(texts), what) as step:
        return measure_in_full(model, texts, ranking, removed, step)


def layered(
    model: PreTrainedModel, tokens: Tensor
) -> tuple[LayeredModel | PreTrainedModel, str | None]:
    """Return a model in memory as one that is run layer by layer, or itself and why it is not.

    Args:
        model: The model.
        tokens: A text to try it on, shape (1, tokens).
    """
    try:
        layers = LayeredModel(model)
        layers.check(tokens.to(layers.device))
    except NotLayerByLayer as reason:
        return model, f"in memory, each cut in full, because {reason}"
    return layers, None


def measure_by_layer(
    layers: LayeredModel,
    texts: Sequence[Tensor],
    ranking: Ranking,
    removed: Sequence[Fraction],
    step: Callable[[int], None],
) -> tuple[float, tuple[LayerCurve, ...]]:
    """Measure the curves of one criterion in one pass over the layers.

    There are hidden states for each token and variant, in the model's dtype; texts go
    through the layers in as many blocks as `lm_eval_pruned.pruning.layerwise.HIDDEN_BYTES` ask for.

    Args:
        layers: The unpruned model.
        texts: Tokens of each, shape (1, tokens), two or more.
        ranking: How neurons are ranked.
        removed: Shares of neurons to remove, in percent.
        step: Called with the layers that a text and its variants went through, out of
            ``len(texts) * len(layers)``.

    Returns:
        The loss of the unpruned model, in nats per token, and one curve for each layer
        that has GLU-MLPs.
    """
    widths = [widths_of(mlps, removed) if mlps else () for mlps in layers.mlps]
    sums: dict[tuple[int, int] | None, float] = defaultdict(float)
    for block in layers.blocks(texts, 1 + sum(map(len, widths))):
        batches = [tokens.to(layers.device) for tokens in _batches(block)]
        hidden, calls = layers.enter_all(batches)
        states: dict[tuple[int, int] | None, list[Tensor]] = {None: hidden}

        def through(
            layer: int, hidden: list[Tensor], calls: list = calls
        ) -> list[Tensor]:
            return [
                layers.run(layer, each, call[layer])
                for each, call in zip(hidden, calls, strict=True)
            ]

        for layer, mlps in enumerate(layers.mlps):
            with fast_cpu_linears(layers.model):
                born: dict[tuple[int, int] | None, list[Tensor]] = {}
                if widths[layer]:
                    scores = {mlp.name: ranking.scores(mlp) for mlp in mlps}
                for width in widths[layer]:
                    with cut(mlps, width, scores):
                        born[layer, width] = through(layer, states[None])
                for variant, before in states.items():
                    states[variant] = through(layer, before)
                states |= born
            step(len(block))
        with fast_cpu_linears(layers.model):
            for variant in list(states):
                for tokens, last in zip(batches, states.pop(variant), strict=True):
                    sums[variant] += layers.loss(tokens, last)
    return _curves(dict(enumerate(layers.mlps)), widths, sums, texts, ranking)


@torch.no_grad()
def measure_in_full(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    ranking: Ranking,
    removed: Sequence[Fraction],
    step: Callable[[int], None],
) -> tuple[float, tuple[LayerCurve, ...]]:
    """Measure the same with a whole forward pass for every variant; see `measure_by_layer`."""
    by_layer: dict[int, list[GluMlp]] = defaultdict(list)
    for mlp in find_glu_mlps(model.eval()):
        by_layer[mlp.block].append(mlp)

    def summed() -> float:
        total = 0.0
        for tokens in texts:
            tokens = tokens.to(model.device)
            with fast_cpu_linears(model):
                logits = model(input_ids=tokens, use_cache=False).logits
            total += loss_of(logits[:, :-1], tokens[:, 1:])
        return total

    widths = [
        widths_of(by_layer[layer], removed) if layer in by_layer else ()
        for layer in range(max(by_layer) + 1)
    ]
    sums: dict[tuple[int, int] | None, float] = {None: summed()}
    for layer, mlps in by_layer.items():
        scores = {mlp.name: ranking.scores(mlp) for mlp in mlps}
        for width in widths[layer]:
            with cut(mlps, width, scores):
                sums[layer, width] = summed()
        step(len(texts))
    return _curves(by_layer, widths, sums, texts, ranking)


def measure_loaded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: PrunePlan,
    scores: Mapping[str, Mapping[str, Tensor]],
) -> Sensitivity:
    """Measure the curves by which `plan` is settled, of a model that is in memory.

    Args:
        model: The unpruned model.
        tokenizer: Its tokenizer.
        plan: Names the text, how many of it, and the seed of ``random``.
        scores: Scores of the neurons, by criterion and name of the GLU-MLP, each (I,).

    Raises:
        ValueError: The text is not as `lm_eval_pruned.pruning.calibration.read_texts` wants it.
    """
    file, removed = str(plan.calibration), [Fraction(str(each)) for each in REMOVED]
    text = CalibrationText.of(model, tokenizer, file, plan.calibration_samples, LENGTH)
    text.check_predictable()
    training = model.training
    model.eval()
    curves: list[LayerCurve] = []
    measured, how = layered(model, text.tokens[0])
    try:
        for criterion, by_name in scores.items():
            asked = dataclasses.replace(plan, criterion=criterion)
            ranking = Ranking(asked, by_name)
            loss, found = measure(measured, text.tokens, ranking, removed)
            curves += found
    finally:
        model.train(training)
    return Sensitivity(
        str(model.config.name_or_path),
        loss,
        tuple(curves),
        text.path.name,
        text.sha256,
        len(text.tokens),
        text.count,
        how or "in memory",
    )


def scores_of_activity(
    plan: PrunePlan, mlp: GluMlp, activity: NeuronActivity, criteria: Iterable[str]
) -> dict[str, Tensor]:
    """Return the scores of an MLP by each of `criteria`, all of which look at activations."""
    gate, up, down = (
        mlp.weight(each) for each in ("gate_proj", "up_proj", "down_proj")
    )
    return {
        criterion: score_neurons(
            gate, up, criterion, down=down, activity=activity, name=mlp.name
        ).cpu()
        for criterion in criteria
    }


def _curves(
    by_layer: Mapping[int, Sequence[GluMlp]],
    widths: Sequence[tuple[int, ...]],
    sums: Mapping[tuple[int, int] | None, float],
    texts: Sequence[Tensor],
    ranking: Ranking,
) -> tuple[float, tuple[LayerCurve, ...]]:
    count = sum(tokens.numel() - 1 for tokens in texts)
    curves = tuple(
        LayerCurve(
            layer,
            _primary(mlps).width,
            ranking.plan.criterion,
            ranking.seed,
            widths[layer],
            tuple(sums[layer, width] / count for width in widths[layer]),
        )
        for layer, mlps in sorted(by_layer.items())
        if mlps
    )
    return sums[None] / count, curves


def _primary(mlps: Sequence[GluMlp]) -> GluMlp:
    return next((mlp for mlp in mlps if mlp.kind == "expert"), mlps[0])


def _batches(texts: Sequence[Tensor]) -> list[Tensor]:
    """Stack texts of equal length, in order of length."""
    ordered = sorted(texts, key=torch.Tensor.numel)
    return [
        torch.cat(list(group))
        for _, group in itertools.groupby(ordered, key=torch.Tensor.numel)
    ]
