"""Losses of a model in memory with one layer cut at a time.

A neuron whose output is 0 is as good as removed, so nothing is sliced: what goes into the
down projections of a layer is multiplied by a mask.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from lm_eval_pruned.pruning.calibration import CalibrationText, check_observable
from lm_eval_pruned.pruning.criteria import RANDOM, kept_set
from lm_eval_pruned.pruning.sensitivity import LayerCurve, Sensitivity


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.layouts import GluMlp
    from lm_eval_pruned.pruning.plan import PrunePlan


@torch.no_grad()
def measure_in_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mlps: Sequence[GluMlp],
    plan: PrunePlan,
    scores: Mapping[str, Mapping[str, Tensor]],
    widths: Mapping[int, Sequence[int]],
) -> Sensitivity:
    """Measure the loss on calibration text with one layer cut at a time.

    Args:
        model: The unpruned model.
        tokenizer: Its tokenizer.
        mlps: Its GLU-MLPs.
        plan: Names the text, and the seed of the criterion ``random``.
        scores: Scores of the neurons by criterion and name of the GLU-MLP, each (I,).
        widths: Kept widths by number of the layer, ascending.

    Returns:
        Losses in nats per token, each text's tokens but its first predicted.

    Raises:
        ValueError: The text is not as `lm_eval_pruned.pruning.calibration.read_texts` wants
            it, or a loss is NaN or infinite.
        UnsupportedModelError: Neurons cannot be masked in the model.
    """
    file = str(plan.calibration)
    check_observable(model)
    text = CalibrationText.of(model, tokenizer, file, plan.calibration_samples)
    inputs = text.tokens
    training = model.training
    model.eval()
    try:
        unpruned = _loss(model, inputs, file)
        curves = []
        for layer, kept in widths.items():
            own = [mlp for mlp in mlps if mlp.block == layer]
            widest = max(mlp.width for mlp in own)
            for criterion, by_name in scores.items():
                losses = []
                for width in kept:
                    with _cut(own, by_name, width / widest):
                        losses.append(_loss(model, inputs, file))
                seed = plan.seed if criterion == RANDOM else None
                curves.append(
                    LayerCurve(
                        layer, widest, criterion, seed, tuple(kept), tuple(losses)
                    )
                )
    finally:
        model.train(training)
    return Sensitivity(
        str(model.config.name_or_path),
        unpruned,
        tuple(curves),
        text.path.name,
        text.sha256,
        len(text.tokens),
        text.count,
    )


@contextlib.contextmanager
def _cut(
    mlps: Sequence[GluMlp], scores: Mapping[str, Tensor], share: float
) -> Iterator[None]:
    """Let the neurons outside of the kept set be 0, `share` of each MLP's being kept."""
    handles = []
    for mlp in mlps:
        down = mlp.projection("down_proj")
        mask = torch.zeros(mlp.width, dtype=mlp.weight("down_proj").dtype)
        mask[kept_set(scores[mlp.name], max(1, round(mlp.width * share)))] = 1
        mask = mask.to(mlp.weight("down_proj").device)
        handles.append(
            down.register_forward_pre_hook(
                lambda module, arguments, mask=mask: (arguments[0] * mask,)
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _loss(model: PreTrainedModel, inputs: Sequence[Tensor], file: str) -> float:
    total, tokens = 0.0, 0
    for text in inputs:
        text = text.to(model.device)
        logits = model(input_ids=text, use_cache=False).logits
        nats = cross_entropy(logits[0, :-1].float(), text[0, 1:], reduction="sum")
        total += float(nats)
        tokens += text.shape[1] - 1
    if not tokens:
        raise ValueError(
            f"calibration={file} has no text of two tokens or more, so no loss can be measured: "
            "pass longer text."
        )
    return total / tokens
