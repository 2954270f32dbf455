"""What a model in memory says of its layers: block influence, and losses with one layer cut.

Both come from ordinary forward passes over calibration text, which hooks watch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from lm_eval_pruned.pruning.calibration import CalibrationText, calibrate, run_texts
from lm_eval_pruned.pruning.criteria import (
    CALIBRATED,
    RANDOM,
    kept_set,
    score_neurons,
)
from lm_eval_pruned.pruning.curves import LayerCurve, Sensitivity
from lm_eval_pruned.pruning.depth import Depth
from lm_eval_pruned.pruning.dropping import layers_of
from lm_eval_pruned.pruning.layouts import NEURON_AXIS, find_glu_mlps


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.arguments import PruneArguments
    from lm_eval_pruned.pruning.calibration import Calibration
    from lm_eval_pruned.pruning.layouts import GluMlp

    #: A call of a layer: its number, what it returned, and what it left in the mappings that it
    #: was given by name.
    Call = tuple[int, Any, dict[str, dict[Any, Any]]]

#: Shares of a layer's neurons to remove when its loss is measured, in percent.
MEASURED_CUTS = (25, 50, 75, 87.5)
#: The loss is measured on this many tokens of each text by default.
LENGTH = 128


@dataclass
class ScoreTable:
    """What was measured of one unpruned model; it outlives the load, as weights do not.

    The widths of a sweep are cut by one scoring: which neurons are kept at any width follows
    from the same scores.

    Attributes:
        scores: By criterion, seed and name of the GLU-MLP, shape (I,), float32, on the CPU.
        calibration: The text behind the scores, for criteria that need one.
        curves: The losses with one layer cut at a time.
        influence: Block influence of each layer, and what the results file says of its text.
    """

    scores: dict[tuple[str, int, str], Tensor] = field(default_factory=dict)
    calibration: Calibration | None = None
    curves: Sensitivity | None = None
    influence: tuple[Sequence[float], Mapping[str, Any]] | None = None


#: The tables of several loads, by what identifies the model, its text and what decides.
KnownScores = dict[Hashable, ScoreTable]


def block_influence(
    model: PreTrainedModel, texts: Sequence[Tensor]
) -> tuple[float, ...]:
    """Measure how much each decoder layer changes the hidden states of some texts.

    The influence of a layer is one minus the mean cosine similarity of what it is given and
    what it returns, over all tokens of all texts. Layers of little influence can go.

    Args:
        model: The model.
        texts: Tokens, each of shape (1, tokens), int64.

    Returns:
        The influence of each layer, from 0 (it changes no direction) to 2: float32 for a
        token, float64 for the sum.

    Raises:
        ValueError: Some hidden state was NaN or infinite.

    Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant
    Than You Expect", arXiv 2403.03853, section 2.2.
    """
    _, layers = layers_of(model)
    sums, counts = [0.0] * len(layers), [0] * len(layers)

    def compare(number: int) -> Callable[..., None]:
        def add(module, positional, named, output) -> None:
            given = positional[0] if positional else named["hidden_states"]
            returned = output[0] if isinstance(output, tuple) else output
            similar = cosine_similarity(
                given.float(), returned.float().to(given.device), dim=-1
            )
            sums[number] += float(similar.double().sum())
            counts[number] += similar.numel()

        return add

    hooks = [
        layer.register_forward_hook(compare(number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    run_texts(model, texts, "block influence", hooks)
    found = tuple(1 - s / max(n, 1) for s, n in zip(sums, counts, strict=True))
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
) -> Depth | None:
    """Return which layers of a loaded model stay.

    Args:
        model: The model.
        arguments: What the user asked for.
        tokenizer: What reads the text that decides, if one does.
        known: Influence from before; takes what is measured here.

    Raises:
        ValueError: The layers or the text are wrong, or there is no tokenizer.
        UnsupportedModelError: Layers of this model cannot be dropped.
    """
    layers = len(layers_of(model)[1])
    if not arguments.measures_depth:
        return Depth.of(arguments, layers)
    known = known or ScoreTable()
    if known.influence is None:
        samples: Any = arguments.calibration_samples
        text = CalibrationText.of(model, tokenizer, str(arguments.calibration), samples)
        known.influence = block_influence(model, text.tokens), text.as_dict()
    return Depth.of(arguments, layers, *known.influence)


@dataclass(frozen=True)
class LoadedModel:
    """What a model in memory says of its neurons and layers, each thing measured once.

    Attributes:
        model: The unpruned model.
        tokenizer: Its tokenizer; needed where text is read.
        known: What was measured before; takes what is measured here.
        calibration: JSON Lines file of text, for criteria that look at activations, and for losses.
        samples: How many of its texts to use; None for all.
        seed: Seed of the criterion ``random``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    known: ScoreTable
    calibration: str | None
    samples: int | None
    seed: int

    def score(self, mlp: GluMlp, criterion: str) -> Tensor:
        """Return the scores of an MLP by a criterion, shape (I,), on the CPU."""
        known = self.known
        key = (criterion, self.seed if criterion == RANDOM else 0, mlp.name)
        if key not in known.scores:
            activity = None
            if criterion in CALIBRATED:
                if known.calibration is None:
                    known.calibration = calibrate(
                        self.model, self.tokenizer, str(self.calibration), self.samples
                    )
                activity = known.calibration.activity[mlp.name]
            gate, up, down = map(mlp.weight, NEURON_AXIS)
            known.scores[key] = score_neurons(
                gate,
                up,
                criterion,
                layer=mlp.layer,
                seed=self.seed,
                down=down,
                activity=activity,
                name=mlp.name,
            ).cpu()
        return known.scores[key]

    def scores(self, criterion: str) -> Mapping[str, Tensor]:
        """Return the scores of all MLPs by a criterion, by name of the MLP."""
        mlps = find_glu_mlps(self.model)
        return {mlp.name: self.score(mlp, criterion) for mlp in mlps}

    def curves(self, criteria: Sequence[str]) -> Sensitivity:
        """Return the losses with one layer cut at a time, by each of `criteria`.

        Raises:
            ValueError: The text is not as `lm_eval_pruned.pruning.calibration.read_texts` wants
                it, or there is no tokenizer.
        """
        if self.known.curves is None:
            text = CalibrationText.of(
                self.model,
                self.tokenizer,
                str(self.calibration),
                self.samples,
                LENGTH,
                shortest=2,
            )
            removed = [Fraction(str(share)) for share in MEASURED_CUTS]
            found = [self.losses(text, criterion, removed) for criterion in criteria]
            curves = tuple(curve for each in found for curve in each.curves)
            self.known.curves = dataclasses.replace(
                found[0], curves=curves, **text.as_dict()
            )
        return self.known.curves

    def losses(
        self, text: CalibrationText, criterion: str, removed: Sequence[Fraction]
    ) -> Sensitivity:
        """Measure the loss with one layer alone cut by a criterion, for each layer and width.

        Up to the layer that is cut, such a model is the unpruned one. So for every text the
        layers in front of it return what they returned in the unpruned model, and only the
        others compute. The loss of a token is float32, its sum float64.

        Args:
            text: What the loss is measured on, two tokens or more of each text.
            criterion: Canonical name.
            removed: Shares of neurons to remove, in percent.
        """
        model, scores = self.model, self.scores(criterion)
        seed = self.seed if criterion == RANDOM else None
        held: dict[int, list[GluMlp]] = defaultdict(list)
        for mlp in find_glu_mlps(model):
            held[mlp.block].append(mlp)
        modules = {
            model.get_submodule(mlp.stack): n
            for n, mlps in held.items()
            for mlp in mlps
        }
        before = {number: _primary(mlps).width for number, mlps in held.items()}
        widths = {
            n: sorted(
                {k for s in removed if 1 <= (k := w - math.floor(s / 100 * w)) < w}
            )
            for n, w in before.items()
        }
        sums: dict[tuple[int, int] | None, float] = defaultdict(float)

        def measure(tokens: Tensor) -> None:
            with _watched(modules) as calls:
                sums[None] += _loss(model, tokens)
            order = [number for number, _, _ in calls]
            for number, mlps in held.items():
                first = order.index(number) if number in order else len(order)
                for width in widths[number]:
                    with _cut(mlps, width, scores), _watched(modules, calls[:first]):
                        sums[number, width] += _loss(model, tokens)

        named = criterion if seed is None else f"{criterion}, seed {seed}"
        run_texts(model, text.tokens, f"sensitivity by {named}", run=measure)
        count = sum(tokens.numel() - 1 for tokens in text.tokens)
        curves = (
            LayerCurve(
                number,
                before[number],
                criterion,
                seed,
                tuple(widths[number]),
                tuple(sums[number, width] / count for width in widths[number]),
            )
            for number in sorted(held)
        )
        name = str(model.config.name_or_path)
        return Sensitivity(name, sums[None] / count, tuple(curves), **text.as_dict())


def _primary(mlps: Sequence[GluMlp]) -> GluMlp:
    """Return an MLP of a layer that has the width to which sizes refer."""
    return next((mlp for mlp in mlps if mlp.kind == "expert"), mlps[0])


def _loss(model: PreTrainedModel, tokens: Tensor) -> float:
    """Return the summed loss of all tokens but the first of a text, in nats."""
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    losses = cross_entropy(logits.float(), tokens[0, 1:], reduction="none")
    return float(losses.double().sum())


@contextlib.contextmanager
def _cut(
    mlps: Sequence[GluMlp], width: int, scores: Mapping[str, Tensor]
) -> Iterator[None]:
    """Let the GLU-MLPs of a layer compute as if they were narrow, for a while.

    The removed columns of down are zero meanwhile. `width` is that of the layer's primary MLP;
    others are cut in proportion.
    """
    before = _primary(mlps).width
    with contextlib.ExitStack() as undo:
        for mlp in mlps:
            own = math.ceil(Fraction(mlp.width * width, before))
            gone = torch.ones(mlp.width, dtype=torch.bool, device="cpu")
            gone[kept_set(scores[mlp.name], own)] = False
            region = mlp.regions["down_proj", "weight"]
            down = region.view(mlp.parameter(region).detach())
            columns = gone.nonzero().flatten().to(down.device)
            undo.callback(down.index_copy_, 1, columns, down[:, columns])
            down.index_fill_(1, columns, 0)
        yield


@contextlib.contextmanager
def _watched(
    modules: Mapping[nn.Module, int], calls: Iterable[Call] = ()
) -> Iterator[list[Call]]:
    """Note the calls of layers, given by module and number, in their order.

    The first ones return what they did in `calls`, without computing, and are not noted.
    """
    noted: list[Call] = []
    waiting = iter(calls)

    def instead_of(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
        def call(*positional, **named) -> Any:
            # Layers that share keys and values hand them on in a mapping.
            for _, output, shared in waiting:
                for name, entries in shared.items():
                    named[name].update(entries)
                return output
            output = forward(*positional, **named)
            given = named.items()
            shared = {n: dict(v) for n, v in given if isinstance(v, MutableMapping)}
            noted.append((number, output, shared))
            return output

        return call

    with contextlib.ExitStack() as undo:
        for module, number in modules.items():
            undo.callback(vars(module).update, dict(vars(module)))
            undo.callback(vars(module).pop, "forward")
            vars(module)["forward"] = instead_of(module.forward, number)
        yield noted
