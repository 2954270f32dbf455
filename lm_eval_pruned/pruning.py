"""Pruning in memory: slice the GLU-MLPs of a model that is already loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lm_eval_pruned.criteria import kept_set, score_neurons
from lm_eval_pruned.expansion import PrunePlan
from lm_eval_pruned.glu import (
    NEURON_AXIS,
    WIDTH_KEY,
    count_parameters,
    find_glu_mlps,
    text_config,
)


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lm_eval_pruned.expansion import Number


@dataclass(frozen=True)
class PruneRecord:
    """What was done to a model.

    Attributes:
        plan: The plan that was carried out.
        layers: Number of GLU-MLPs.
        parameters_before: Parameters of the unpruned model; tied ones count once.
        parameters_after: Parameters of the pruned model.
        kept: Kept neurons of every layer, each of shape (k,), int64, on the CPU;
            empty for the baseline.
    """

    plan: PrunePlan
    layers: int
    parameters_before: int
    parameters_after: int
    kept: tuple[Tensor, ...]

    @property
    def digest(self) -> str | None:
        """SHA-256 over the kept indices of all layers (little-endian int64), or None."""
        if not self.kept:
            return None
        digest = hashlib.sha256()
        for indices in self.kept:
            digest.update(indices.numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the record as the results file holds it (JSON types only)."""
        plan = self.plan
        record: dict[str, Any] = {
            "criterion": plan.criterion if plan.prunes else None,
            "asked": plan.asked,
            "multiple_of": plan.multiple_of,
            "layers": self.layers,
            "hidden_size": plan.hidden_size,
            "intermediate_size_before": plan.width_before,
            "intermediate_size_after": plan.width,
            "expansion_ratio_before": plan.ratio_before,
            "expansion_ratio_after": plan.ratio,
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "kept_digest": self.digest,
        }
        if plan.criterion == "random":
            record["seed"] = plan.seed
        return record

    def as_table(self) -> str:
        """Return the record as a short Markdown table for people."""
        plan = self.plan
        before, after = self.parameters_before, self.parameters_after
        asked = ", ".join(f"{name}={value}" for name, value in plan.asked.items())
        criterion = f"criterion={plan.criterion}" if plan.prunes else "nothing removed"
        digest = (self.digest or "none")[:12]
        return "\n".join(
            [
                "|                 |        before|         after|",
                "|-----------------|-------------:|-------------:|",
                f"|expansion ratio  |{plan.ratio_before:14.4f}|{plan.ratio:14.4f}|",
                f"|intermediate size|{plan.width_before:14,}|{plan.width:14,}|",
                f"|parameters       |{before:14,}|{after:14,}|",
                f"{asked or 'baseline'}, {criterion}, {self.layers} layers, kept digest {digest}",
            ]
        )


def prune_model(
    model: PreTrainedModel,
    *,
    ratio: Number | None = None,
    prune_percent: Number | None = None,
    intermediate_size: Number | None = None,
    multiple_of: Number = 1,
    criterion: str = "maw",
    seed: Number = 0,
) -> PreTrainedModel:
    """Prune the GLU-MLPs of a loaded model in place and return it.

    ``gate_proj`` and ``up_proj`` go from (I, H) to (k, H), ``down_proj`` from
    (H, I) to (H, k), biases of gate and up from (I,) to (k,). The kept neurons
    keep their order, dtype and device, and the config gets the new width. Scores
    are float32, computed on each layer's device.

    Args:
        model: A model with dense, separate ``gate_proj``, ``up_proj`` and
            ``down_proj``.
        ratio: Expansion ratio to keep.
        prune_percent: Share of neurons to remove, in percent.
        intermediate_size: Kept width, in neurons.
        multiple_of: Round the kept width down to a multiple of this, in neurons.
        criterion: Importance score; see `lm_eval_pruned.criteria`.
        seed: Seed of the ``random`` criterion.

    Returns:
        The same model. ``model.prune_record`` is the `PruneRecord` of what was done.

    Raises:
        ValueError: An argument is out of range, or a weight is NaN or infinite.
        UnsupportedModelError: The model cannot be pruned.

    Source: arXiv 2512.22671, section 3.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> prune_model(model, ratio=2.4).config.intermediate_size
        4916
    """
    mlps = find_glu_mlps(model)
    plan = PrunePlan.from_arguments(
        mlps[0].hidden_size,
        mlps[0].width,
        ratio=ratio,
        prune_percent=prune_percent,
        intermediate_size=intermediate_size,
        multiple_of=multiple_of,
        criterion=criterion,
        seed=seed,
    )
    return carry_out(plan, model)


def carry_out(plan: PrunePlan, model: PreTrainedModel) -> PreTrainedModel:
    """Prune `model` in place as `plan` says; see `prune_model`."""
    mlps = find_glu_mlps(model)
    before = count_parameters(model)
    kept = []
    if plan.prunes:
        # All layers are scored before the first is sliced: an error leaves the model whole.
        for mlp in mlps:
            weights = {p: mlp.projection(p).weight for p in NEURON_AXIS}
            kept.append(select(plan, mlp.name, mlp.layer, **weights))
        for mlp, indices in zip(mlps, kept, strict=True):
            for projection, axis in NEURON_AXIS.items():
                _narrow_linear(mlp.projection(projection), indices, axis)
            if hasattr(mlp.module, WIDTH_KEY):
                setattr(mlp.module, WIDTH_KEY, plan.width)
        setattr(text_config(model.config), WIDTH_KEY, plan.width)
    record = PruneRecord(
        plan,
        len(mlps),
        before,
        count_parameters(model),
        tuple(indices.cpu() for indices in kept),
    )
    model.prune_record = record  # type: ignore[assignment]
    return model


@torch.no_grad()
def select(
    plan: PrunePlan,
    name: str,
    layer: int,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor | None = None,
) -> Tensor:
    """Score one GLU-MLP and return its kept neurons.

    Args:
        plan: The plan.
        name: Path of the MLP in the model, for messages.
        layer: Position of the MLP in the model.
        gate_proj: Shape (I, H).
        up_proj: Shape (I, H).
        down_proj: Shape (H, I); only checked for NaN and infinity, where given.

    Returns:
        Kept neurons, shape (k,), int64, ascending, on the device of the weights.

    Raises:
        ValueError: A weight is NaN or infinite; the tensor is named.
    """
    weights = {"gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj}
    for projection, weight in weights.items():
        if weight is not None:
            check_finite(f"{name}.{projection}.weight", weight)
    scores = score_neurons(
        gate_proj, up_proj, plan.criterion, layer=layer, seed=plan.seed
    )
    return kept_set(scores, plan.width)


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError naming the tensor if it holds NaN or infinity."""
    # A finite sum proves that every term is finite; an overflowing one proves nothing.
    if weight.sum(dtype=torch.float32).isfinite():
        return
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} holds {bad} NaN or infinite values of {weight.numel()}, so its neurons "
            "cannot be ranked: use an intact checkpoint."
        )


@torch.no_grad()
def narrow(weight: Tensor, kept: Tensor, axis: int) -> Tensor:
    """Return the kept neurons of a weight or bias, contiguous.

    Args:
        weight: Any shape with I entries along `axis`.
        kept: Kept neurons, shape (k,), int64.
        axis: The axis that counts neurons.
    """
    return weight.index_select(axis, kept.to(weight.device))


def _narrow_linear(linear: nn.Linear, kept: Tensor, axis: int) -> None:
    parts = {"weight": linear.weight}
    if axis == 0:
        linear.out_features = len(kept)
        if linear.bias is not None:
            parts["bias"] = linear.bias
    else:
        linear.in_features = len(kept)
    for part, parameter in parts.items():
        sliced = narrow(parameter, kept, axis)
        setattr(
            linear, part, nn.Parameter(sliced, requires_grad=parameter.requires_grad)
        )
