"""The neurons of one GLU-MLP: scored as a plan asks, from weights that are checked, and narrowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from lm_eval_pruned.pruning.criteria import as_words, proves_finite, score_neurons
from lm_eval_pruned.pruning.layouts import NEURON_AXIS, GluMlp, resize


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lm_eval_pruned.pruning.calibration import NeuronActivity
    from lm_eval_pruned.pruning.plan import PrunePlan


@torch.no_grad()
def score(
    plan: PrunePlan,
    name: str,
    layer: int,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor | None = None,
    activity: NeuronActivity | None = None,
    criterion: str | None = None,
) -> Tensor:
    """Score the neurons of one GLU-MLP.

    Args:
        plan: The plan.
        name: Path of the MLP in the model, for messages.
        layer: Position of the MLP in the model.
        gate_proj: Shape (I, H).
        up_proj: Shape (I, H).
        down_proj: Shape (H, I); checked for NaN and infinity where given, and scored
            by the criteria that look at activations.
        activity: What the neurons did on calibration text, for the same criteria.
        criterion: Canonical name of the criterion of the MLP's layer; default: that of
            the plan.

    Returns:
        Scores, shape (I,), float32; see `lm_eval_pruned.pruning.criteria.score_neurons`.

    Raises:
        ValueError: A weight is NaN or infinite; the tensor is named.
    """
    criterion = criterion or plan.criterion

    def check(**weights: Tensor) -> None:
        for projection, weight in weights.items():
            check_finite(f"{name}.{projection}.weight", weight)

    if down_proj is not None:
        check(down_proj=down_proj)
    if not proves_finite(criterion):
        check(gate_proj=gate_proj, up_proj=up_proj)
    scores = score_neurons(
        gate_proj,
        up_proj,
        criterion,
        layer=layer,
        seed=plan.seed,
        down=down_proj,
        activity=activity,
    )
    if proves_finite(criterion) and not scores.isfinite().all():
        check(gate_proj=gate_proj, up_proj=up_proj)
    return scores


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError naming the tensor if it holds NaN or infinity.

    Args:
        name: What the message calls it.
        weight: Any shape.
    """
    # A finite sum proves that every term is finite; one that overflows proves nothing.
    if weight.sum().isfinite():
        return
    if bad := int((~weight.isfinite()).sum()):
        raise ValueError(
            f"{name} holds {bad} NaN or infinite values of {weight.numel()}, so its neurons "
            "cannot be ranked: use an intact checkpoint."
        )


@torch.no_grad()
def narrow(weight: Tensor, kept: Tensor, axis: int) -> Tensor:
    """Return the kept neurons of a weight or bias.

    Args:
        weight: Any shape with I entries along `axis`.
        kept: Kept neurons, shape (k,), int64, ascending.
        axis: The axis that counts neurons.

    Returns:
        A contiguous tensor; `weight` itself where all neurons are kept.
    """
    if len(kept) == weight.shape[axis]:
        return weight.contiguous()
    words = as_words(weight)
    if words is None or axis == 0:
        return weight.index_select(axis, kept.to(weight.device))
    narrowed = weight.new_empty(len(weight), len(kept))
    # The other modes check all indices first, or copy the result.
    np.take(words, kept.numpy(), axis=1, out=as_words(narrowed), mode="clip")
    return narrowed


def narrow_mlps(mlps: Sequence[GluMlp], kept: Mapping[str, Tensor]) -> None:
    """Narrow GLU-MLPs in place.

    Args:
        mlps: The MLPs; those that share a parameter go together.
        kept: The kept neurons of each, by name, shape (k,), int64, ascending.
    """
    if any(len(kept[mlp.name]) < mlp.width for mlp in mlps):
        pieces = {
            (mlp.name, projection, part): narrow(
                mlp.weight(projection, part),
                kept[mlp.name],
                NEURON_AXIS[projection] if part == "weight" else 0,
            )
            for mlp in mlps
            for projection, part in mlp.regions
        }
        resize(mlps, pieces)
