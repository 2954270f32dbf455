"""What a model in memory says of its layers: block influence, and losses with one layer cut.

Both come from ordinary forward passes over calibration text, which hooks watch.
"""

from __future__ import annotations

import contextlib
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

from lm_eval_pruned.pruning.argument_values import NO_REPAIR
from lm_eval_pruned.pruning.calibration import (
    CalibrationText,
    calibrate,
    read_texts,
    run_texts,
    unless_cpu,
)
from lm_eval_pruned.pruning.criteria import (
    ACTIVITY,
    OBS,
    RANDOM,
    check_finite,
    kept_set,
    score_neurons,
)
from lm_eval_pruned.pruning.curves import LayerCurve, Sensitivity
from lm_eval_pruned.pruning.depth import Depth, layers_of
from lm_eval_pruned.pruning.layer_by_layer import (
    LayerByLayer,
    has_to_compute,
    moved,
    returning,
)
from lm_eval_pruned.pruning.layouts import (
    NEURON_AXIS,
    find_glu_mlps,
    regions_by_parameter,
)
from lm_eval_pruned.pruning.repair import errors_after_repair


if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.arguments import PruneArguments
    from lm_eval_pruned.pruning.calibration import Calibration
    from lm_eval_pruned.pruning.layouts import GluMlp

#: Shares of a layer's neurons to remove when its loss is measured, in percent.
MEASURED_CUTS = (25, 50, 75, 87.5)
#: The loss is measured on this many tokens of so many texts by default.
LENGTH, SAMPLES = 128, 16


@dataclass
class ScoreTable:
    """What was measured of one unpruned model; it outlives the load, as weights do not.

    Attributes:
        scores: By criterion, seed and name of the GLU-MLP, shape (I,), float32, on the CPU.
        calibration: The activity of neurons, for criteria that need it.
        curves: The losses with one layer cut at a time, by the repair after it.
        influence: Block influence of each layer, and what the results file says of its text.
    """

    scores: dict[tuple[str, int, str], Tensor] = field(default_factory=dict)
    calibration: Calibration | None = None
    curves: dict[str, Sensitivity] = field(default_factory=dict)
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


def samples_for_losses(file: str, samples: int | None) -> int:
    """Return on how many texts of a file losses are measured: by default at most `SAMPLES`."""
    return samples or min(SAMPLES, len(read_texts(file)))


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

    def text(self, samples: int | None = None, **bounds: int) -> CalibrationText:
        """Return calibration text, by default all that was asked for; see `CalibrationText.of`."""
        file, samples = str(self.calibration), samples or self.samples
        return CalibrationText.of(self.model, self.tokenizer, file, samples, **bounds)

    def curves(self, criterion: str, repair: str = NO_REPAIR) -> Sensitivity:
        """Return the losses with one layer cut at a time by a criterion; see `losses`."""
        if repair not in self.known.curves:
            samples = samples_for_losses(str(self.calibration), self.samples)
            text = self.text(samples, longest=LENGTH, shortest=2)
            removed = [Fraction(str(share)) for share in MEASURED_CUTS]
            measured = self.losses(text, criterion, removed, repair)
            self.known.curves[repair] = dataclasses.replace(measured, **text.as_dict())
        return self.known.curves[repair]

    def losses(
        self,
        text: CalibrationText,
        criterion: str,
        removed: Sequence[Fraction],
        repair: str = NO_REPAIR,
    ) -> Sensitivity:
        """Measure the loss with a single layer cut by a criterion, for each layer and width.

        Up to the layer that is cut, such a model is the unpruned one. So for every text the
        layers in front of it return what they returned in the unpruned model, and only the
        others compute. The loss of a token is float32, its sum float64. `removed` are shares of
        neurons, in percent. With `repair`, see `_repaired`.
        """
        model, held = self.model, self._held()
        before = {n: mlps[0].width for n, mlps in held.items()}
        widths = {
            n: sorted(
                {width - math.floor(s / 100 * width) for s in removed} - {0, width}
            )
            for n, width in before.items()
        }
        count = sum(tokens.numel() - 1 for tokens in text.tokens)
        measure = self._sums if repair == NO_REPAIR else self._repaired
        with moved(model, self.device):
            sums, ran_on = measure(text, criterion, held, widths), str(model.device)
        seed = self.seed if criterion == RANDOM else None
        curves = []
        for n, kept in widths.items():
            means = tuple(sums[n, width] / count for width in kept)
            own = n, before[n], criterion, seed, tuple(kept), means
            curves.append(LayerCurve(*own))
        name = str(model.config.name_or_path)
        return Sensitivity(
            *(name, sums[None] / count, tuple(curves)),
            **text.as_dict(),
            repair=repair,
            device=ran_on,
        )

    def _held(self) -> dict[int, list[GluMlp]]:
        """Return the MLPs of each layer, ascending; those to which sizes refer come first."""
        held: dict[int, list[GluMlp]] = defaultdict(list)
        found = find_glu_mlps(self.model)
        for mlp in sorted(found, key=lambda mlp: (mlp.block, mlp.kind != "expert")):
            held[mlp.block].append(mlp)
        return held

    def _sums(
        self,
        text: CalibrationText,
        criterion: str,
        held: Mapping[int, Sequence[GluMlp]],
        widths: Mapping[int, Sequence[int]],
    ) -> dict[tuple[int, int] | None, float]:
        """Return the loss of all tokens by layer and width, and under None that of the whole model."""
        model, scores = self.model, self.scores(criterion)
        before = {n: mlps[0].width for n, mlps in held.items()}
        stacks = {n: model.get_submodule(mlps[0].stack) for n, mlps in held.items()}
        sums: dict[tuple[int, int] | None, float] = defaultdict(float)
        outputs: dict[nn.Module, Any] = {}

        def record(module, positional, named, output) -> None:
            if not has_to_compute(named):
                outputs[module] = output

        def measure(tokens: Tensor) -> None:
            sums[None] += text_loss(model, tokens)
            order = list(outputs.items())
            for number, mlps in held.items():
                calls = [module for module, _ in order]
                cut = stacks[number]
                in_front = dict(order[: calls.index(cut)] if cut in calls else ())
                for width in widths[number]:
                    with _cut(mlps, Fraction(width, before[number]), scores, in_front):
                        sums[number, width] += text_loss(model, tokens)

        seed = self.seed if criterion == RANDOM else None
        named = criterion if seed is None else f"{criterion}, seed {seed}"
        hooks = dict.fromkeys(stacks.values(), record)
        run_texts(model, text.tokens, f"sensitivity by {named}", hooks, measure)
        return sums

    def _repaired(
        self,
        text: CalibrationText,
        criterion: str,
        held: Mapping[int, Sequence[GluMlp]],
        widths: Mapping[int, Sequence[int]],
    ) -> dict[tuple[int, int] | None, float]:
        """Return what `_sums` returns, with each layer repaired by least squares after its cut.

        The rise of the loss is measured with half of a layer's neurons. At other widths it is taken
        to be in proportion to the squared error of the layer's output.
        """
        model = self.model
        scores = {} if criterion == OBS else self.scores(criterion)
        walk = LayerByLayer(model, text.tokens)
        rises: dict[int, float] = {}

        def total() -> float:
            return sum(walk.finish(lambda tokens: text_loss(model, tokens)))

        whole = total()

        def look(number: int) -> None:
            stack = model.get_submodule(held[number][0].stack)
            while walk.layers[walk.passed] is not stack:
                walk.go_on(walk.run())
            rises[number] = total() - whole

        mlps = [mlp for own in held.values() for mlp in own]
        steps: dict[int, list[int]] = {}
        own_steps, halves = {}, {}
        for number, own in held.items():
            before = own[0].width
            half = before - before // 2
            steps[number] = sorted({*widths[number], half}, reverse=True)
            for mlp in own:
                share = Fraction(mlp.width, before)
                own_steps[mlp.name] = [math.ceil(k * share) for k in steps[number]]
                halves[mlp.name] = math.ceil(half * share)
        texts = self.text().tokens
        errors = errors_after_repair(
            model, texts, mlps, own_steps, halves, scores, look
        )
        sums: dict[tuple[int, int] | None, float] = {None: whole}
        for number, own in held.items():
            each = zip(*(errors[mlp.name] for mlp in own), strict=True)
            error = dict(zip(steps[number], map(sum, each), strict=True))
            known = error[own[0].width - own[0].width // 2]
            scale = max(rises[number], 0.0) / known if known else 0.0
            for width in widths[number]:
                sums[number, width] = whole + scale * error[width]
        return sums


@contextlib.contextmanager
def _cut(
    mlps: Sequence[GluMlp],
    share: Fraction,
    scores: Mapping[str, Tensor],
    returned: Mapping[nn.Module, Any],
) -> Iterator[None]:
    """Let GLU-MLPs compute as if they kept a share of their neurons, with columns of down at zero.

    Layers of which is known what they `returned` do so without computing.
    """
    with contextlib.ExitStack() as undo:
        for mlp in mlps:
            gone = torch.ones(mlp.width, dtype=torch.bool, device="cpu")
            gone[kept_set(scores[mlp.name], math.ceil(mlp.width * share))] = False
            down = mlp.weight("down_proj").detach()
            columns = gone.nonzero().flatten().to(down.device)
            undo.callback(down.index_copy_, 1, columns, down[:, columns])
            down.index_fill_(1, columns, 0)
        undo.enter_context(returning(returned))
        yield
