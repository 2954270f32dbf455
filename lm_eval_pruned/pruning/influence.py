"""Block influence: how much each decoder layer changes the hidden states of a text.

That of a layer is one minus the mean cosine similarity of what it is given and what it
returns, over all tokens of all texts. Layers of little influence can go.

Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant
Than You Expect", arXiv 2403.03853, section 2.2.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.calibration import CalibrationText
from lm_eval_pruned.pruning.depth import Depth
from lm_eval_pruned.pruning.dropping import layers_of
from lm_eval_pruned.pruning.layerwise import Call
from lm_eval_pruned.pruning.scores import ScoreTable
from lm_eval_pruned.util.progress import steps


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.arguments import PruneArguments


class _Similarities:
    """Sums cosine similarities, float32 for a token, float64 for the sum."""

    def __init__(self, layers: int):
        self._sums = [0.0] * layers
        self._counts = [0] * layers

    def add(self, layer: int, given: Tensor, returned: Tensor) -> None:
        """Take the hidden states before and after a layer, shape (texts, tokens, H)."""
        similar = torch.nn.functional.cosine_similarity(
            given.float(), returned.float().to(given.device), dim=-1
        )
        self._sums[layer] += float(similar.double().sum())
        self._counts[layer] += similar.numel()

    def influence(self) -> tuple[float, ...]:
        """Return the influence of each layer.

        Raises:
            ValueError: Some hidden state was NaN or infinite.
        """
        pairs = zip(self._sums, self._counts, strict=True)
        found = tuple(1 - total / max(count, 1) for total, count in pairs)
        for layer, value in enumerate(found):
            if value != value:  # noqa: PLR0124 - NaN
                raise ValueError(
                    f"The calibration text makes layer {layer} return NaN or infinite hidden "
                    "states: use another dtype, such as dtype=float32, or other text."
                )
        return found


@torch.no_grad()
def influence_in_memory(
    model: PreTrainedModel, texts: Sequence[Tensor]
) -> tuple[float, ...]:
    """Measure the block influence of each layer of a loaded model.

    Args:
        model: The model.
        texts: Tokens, each of shape (1, tokens), int64.

    Returns:
        The influence of each layer, from 0 (it changes no direction) to 2.
    """
    _, layers = layers_of(model)
    similarities = _Similarities(len(layers))
    given: dict[int, Tensor] = {}

    def before(layer: int) -> Callable[..., None]:
        def note(module, positional, named) -> None:
            given[layer] = Call.of(positional, named)[0].clone()

        return note

    def after(layer: int) -> Callable[..., None]:
        def compare(module, arguments, output) -> None:
            returned = output[0] if isinstance(output, tuple) else output
            similarities.add(layer, given.pop(layer), returned)

        return compare

    training = model.training
    model.eval()
    with contextlib.ExitStack() as hooks:
        hooks.callback(model.train, training)
        for number, layer in enumerate(layers):
            handle = layer.register_forward_pre_hook(before(number), with_kwargs=True)
            hooks.callback(handle.remove)
            hooks.callback(layer.register_forward_hook(after(number)).remove)
        step = hooks.enter_context(steps(len(texts), "block influence"))
        for tokens in texts:
            model(input_ids=tokens.to(model.device), use_cache=False)
            step(1)
    return similarities.influence()


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
    if tokenizer is None:
        raise ValueError(
            f"calibration={arguments.calibration} is text, and there is no tokenizer to read it "
            "with: pass tokenizer."
        )
    known = known or ScoreTable()
    if known.influence is None:
        samples: Any = arguments.calibration_samples
        text = CalibrationText.of(model, tokenizer, str(arguments.calibration), samples)
        influence = influence_in_memory(model, text.tokens)
        known.influence = influence, text.seen_by({}).as_dict()
    return Depth.of(arguments, layers, *known.influence)
