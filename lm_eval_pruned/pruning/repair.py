"""Repair: kept neurons take over what removed ones supplied, by least squares, without training.

A GLU-MLP returns ``W x`` (plus a bias), x being the activations of its neurons, W the weights of
down. With only the neurons S left, the weights of S that are closest to the old output over some
text, in the sense of least squares with a ridge, are ::

    W_S + W_R G_RS (G_SS + lambda I)^-1,    G = sum over the tokens of x x'

where R are the removed neurons, and x is divided by the size of the output where a norm follows
(`LayerMoments`). `repaired` computes them; `order_by_cost` removes the neurons
whose removal costs least after that (optimal brain surgeon), in nats: with R W in place of W, R being
the root of `Curvature`, an error of the output counts as far as it moves the model's predictions.
Repair itself is the same for any R. Each layer is repaired on what it is given in the unpruned model;
on what cut layers give it, the rise in loss is the same to 3 % (docs/measurements/price.md).

Source: Hassibi and Stork 1993, "Second order derivatives for network pruning: Optimal brain
surgeon"; Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv
2204.09656, section 3.4 (least squares over the kept); Kurtic et al. 2023, "ZipLM", arXiv
2302.04089, section 3 (blocks of columns); Wang et al. 2019, "EigenDamage", arXiv 1905.05934 (both
Kronecker factors).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.argument_values import LEAST_SQUARES, NO_REPAIR
from lm_eval_pruned.pruning.criteria import kept_set
from lm_eval_pruned.pruning.curvature import weighted
from lm_eval_pruned.pruning.layouts import text_config
from lm_eval_pruned.pruning.lending import float64
from lm_eval_pruned.pruning.moments import block_rows


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.layouts import GluMlp
    from lm_eval_pruned.pruning.moments import Moments, TextMoments

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.repair")

#: lambda, as a share of the mean of the diagonal of G. From 0.01 to 0.1 nothing changes.
RIDGE = 0.01
#: Neurons are removed in so many steps; between two of them, the costs of the others are computed
#: anew.
STEPS = 24
#: Root mean square of the relative errors of a solution with G, up to which float32 will do.
_RESIDUAL = 1e-2
#: Where fewer tokens than so many times its neurons meet an MLP, repair is known to lose.
_FEW = 5


def regularised(moments: Moments, centred: bool) -> Tensor:
    """Return G + lambda I, shape (I, I), float32; `centred` is for weights beside a bias."""
    gram = moments.gram(centred)
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) or 1.0)
    return gram


def _factor(gram: Tensor) -> Tensor:
    """Return the lower Cholesky factor, in the dtype of G where that solves with it, or in float64."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    # The same for any units of the neurons. Where neurons go together, signs that alternate are
    # what the small eigenvalues answer for.
    probe = gram.diagonal().sqrt()
    probe[::2] *= -1
    solved = torch.cholesky_solve(probe[:, None], factor)[:, 0]
    error = ((gram @ solved - probe) / probe).square().mean().sqrt()
    if failed or not error < _RESIDUAL:
        # That of float32 is let go before there is another.
        factor = float64(gram)
        factor = torch.linalg.cholesky(factor)
    return factor


def repaired(gram: Tensor, down: Tensor, kept: Tensor) -> Tensor:
    """Return the weights of down that make up for the neurons that are gone.

    Args:
        gram: G + lambda I, shape (I, I), in whose dtype it computes, or in float64 if need be.
        down: Weights of all neurons, shape (H, I), any float.
        kept: Those that stay, shape (k,), int64, ascending.

    Returns:
        Shape (H, k), in the dtype that it computed in.
    """
    gone = _others(kept, len(gram))
    factor = _factor(gram[kept[:, None], kept])
    down = down.to(factor)
    lost = gram[kept[:, None], gone].to(factor) @ down[:, gone.to(down.device)].T
    return down[:, kept.to(down.device)] + torch.cholesky_solve(lost, factor).T


def order_by_cost(gram: Tensor, down: Tensor, width: int) -> Tensor:
    """Return the `width` neurons that stay if those go whose removal costs least after repair.

    The cost of neuron j is ``|w_j|^2 / (G^-1)_jj``, w_j being its column of down. After each of
    `STEPS` steps, weights and inverse are those of the neurons that are left, repaired.

    Args:
        gram: G + lambda I, shape (I, I), in whose dtype it computes, or in float64 if need be.
        down: Weights of down, or R times those, shape (H, I), any float.
        width: Neurons to keep.

    Returns:
        Indices, shape (k,), int64, ascending, on the CPU.
    """
    ((left, _),) = removed_in_steps(gram, down, [width])
    return left


def removed_in_steps(
    gram: Tensor,
    down: Tensor,
    widths: Sequence[int],
    scores: Tensor | None = None,
) -> Iterator[tuple[Tensor, float]]:
    """Yield for each of some widths which neurons stay, and the error of the output after repair.

    The error is the sum over tokens of the squared distance, with the ridge: what `repaired` makes
    as small as it can be.

    Args:
        gram, down: As for `order_by_cost`.
        widths: Neurons to keep, descending.
        scores: Shape (I,): those of the highest stay, as `kept_set` has it, whatever it costs.
    """
    factor = _factor(gram)
    # From the first step on, its lower triangle alone holds. LAPACK's rows are columns.
    inverse = torch.cholesky_inverse(factor, out=factor).mT
    left = torch.arange(len(gram), device=inverse.device)
    weights, error = down.to(inverse).T, 0.0
    if scores is not None:
        ranked = scores.to(inverse.device).sort(descending=True, stable=True).indices
        worth = torch.empty_like(ranked)
        worth[ranked] = -left
    most = math.ceil((len(left) - widths[-1]) / STEPS)
    for width in widths:
        while (excess := len(left) - width) > 0:
            if scores is None:
                costs = weights.square().sum(1) / inverse.diagonal()
            else:
                costs = worth[left]
            order = costs.sort(stable=True).indices
            going, staying = order[: min(most, excess)], order[min(most, excess) :]
            staying = staying.sort().values
            below = torch.arange(len(left), device=inverse.device) <= going[:, None]
            rows = torch.where(below, inverse[going], inverse[:, going].T)
            pivots = torch.linalg.cholesky(rows[:, going])
            both = torch.cat([rows[:, staying], weights[going]], 1)
            both = torch.linalg.solve_triangular(pivots, both, upper=False)
            across, taken = both.split([len(staying), weights.shape[1]], 1)
            error += float(taken.square().sum())
            weights = weights[staying] - across.T @ taken
            inverse = _shrink(inverse, staying, across)
            left = left[staying]
        yield left.cpu(), error


def _shrink(inverse: Tensor, staying: Tensor, across: Tensor) -> Tensor:
    """Return rows and columns of a symmetric matrix, less across' across, in its memory.

    Of both, the lower triangle alone holds. `staying` ascends, so that a row moves to where none is
    that still has to move.
    """
    for start, stop in block_rows(len(staying)):
        rows = inverse.index_select(0, staying[start:stop])
        rows = rows.index_select(1, staying[:stop])
        rows.addmm_(across[:, start:stop].T, across[:, :stop], alpha=-1)
        inverse[start:stop, :stop] = rows
    return inverse[: len(staying), : len(staying)]


@dataclass(frozen=True)
class CutMlp:
    """What is left of a GLU-MLP.

    Attributes:
        kept: Its kept neurons, shape (k,), int64, ascending, on the CPU.
        down: The weights of down for them, shape (H, k), where the model is.
        bias: The bias of down, shape (H,), if it has one.
    """

    kept: Tensor
    down: Tensor
    bias: Tensor | None


def tokens_per_neuron(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    mlps: Sequence[GluMlp],
    targets: Mapping[str, int],
) -> float:
    """Return how many tokens there are for each kept neuron of the MLP that has the fewest.

    A router is taken to send as many tokens to each expert. A warning says where they are few.
    """
    experts = Counter(mlp.layer_path for mlp in mlps if mlp.kind == "expert")
    chosen: Any = getattr(text_config(model.config), "num_experts_per_tok", None)
    tokens = sum(text.numel() for text in texts)

    def share(mlp: GluMlp) -> float:
        routed = mlp.kind == "expert" and chosen is not None
        return min(1.0, chosen / experts[mlp.layer_path]) if routed else 1.0

    fewest = min(tokens * share(mlp) / targets[mlp.name] for mlp in mlps)
    logger.log(
        logging.WARNING if fewest < _FEW else logging.INFO,
        "The calibration text has %.1f tokens for each kept neuron. In SmolLM2-135M the loss rose 1.3 "
        "times as much with 4 as with 36, and 1.7 times as much with 2: pass more text with "
        "calibration.",
        fewest,
    )
    return round(fewest, 1)


def cut_layer_by_layer(
    text: TextMoments,
    mlps: Sequence[GluMlp],
    targets: Mapping[str, int],
    scores: Mapping[str, Tensor],
    roots: Mapping[str, Tensor],
    repair: str,
    take: Callable[[Sequence[GluMlp], Mapping[str, CutMlp]], None],
) -> int:
    """Choose and repair the neurons of some GLU-MLPs, one layer after the other.

    The model stays as it is, unless `take` changes it. An MLP whose activations cannot be observed,
    or that sees fewer tokens than it keeps neurons, is not repaired.

    Args:
        text: The calibration text, and the model with all its neurons.
        mlps: Those to cut.
        targets: Kept width of each by name.
        scores: Scores of each by name; those without any go by `order_by_cost`.
        roots: Those of `Curvature`, of each MLP without scores.
        repair: ``none`` or ``least_squares``.
        take: Given the MLPs of a layer, and what is left of each by name, when no text needs the
            layer any more.

    Returns:
        How many MLPs were repaired.

    Raises:
        ValueError: An activation is NaN or infinite.
        UnsupportedModelError: See `check_observable`, without scores.
    """
    cut_mlps: dict[str, CutMlp] = {}
    repaired_mlps, home = 0, text.model.device

    def cut(mlp: GluMlp, moments: Moments) -> None:
        nonlocal repaired_mlps
        name, width = mlp.name, targets[mlp.name]
        down, bias = mlp.weight("down_proj").detach(), mlp.down_bias
        solves = repair == LEAST_SQUARES and moments.tokens >= width
        if solves or name not in scores:
            gram = regularised(moments, centred=bias is not None)
        if name in scores:
            kept = kept_set(scores[name], width)
        else:
            kept = order_by_cost(gram, weighted(roots[name], down), width)
        here = kept.to(down.device)
        left = repaired(gram, down, here) if solves else down[:, here]
        if solves and bias is not None:
            mean = moments.mean
            lost = float64(down) @ mean - float64(left) @ mean[kept.to(mean.device)]
            bias = (bias.detach() + lost.to(bias)).to(home)
        cut_mlps[name] = CutMlp(kept, left.to(home, down.dtype), bias)
        repaired_mlps += solves

    def leave(layer: Sequence[GluMlp]) -> None:
        take(layer, {mlp.name: cut_mlps.pop(mlp.name) for mlp in layer})

    chosen = any(mlp.name not in scores for mlp in mlps)
    text.visit(mlps, cut, "repair", leave=leave, chosen=chosen)
    if repaired_mlps < len(mlps) and repair != NO_REPAIR:
        logger.warning(
            "repair=%s: %d of %d GLU-MLPs are repaired; the others keep their weights, because "
            "their activations cannot be observed or the calibration text has fewer tokens for "
            "them than they keep neurons.",
            repair,
            repaired_mlps,
            len(mlps),
        )
    return repaired_mlps


def errors_of_cuts(
    text: TextMoments,
    mlps: Sequence[GluMlp],
    widths: Mapping[str, Sequence[int]],
    scores: Mapping[str, Tensor],
    roots: Mapping[str, Tensor],
    repair: str,
) -> dict[str, list[float]]:
    """Return what cutting each GLU-MLP alone does to its output, at each of some widths.

    It is the sum over tokens of the squared error, as the loss minds it. The model stays as it is.
    Takes what `cut_layer_by_layer` takes, and

    Args:
        widths: Widths of each by name, in neurons, descending.
        roots: Those of `Curvature`.
    """
    errors: dict[str, list[float]] = {}

    def measure(mlp: GluMlp, moments: Moments) -> None:
        name, kept = mlp.name, widths[mlp.name]
        if not moments.tokens:
            # Nothing is lost.
            errors[name] = [0.0] * len(kept)
            return
        gram = regularised(moments, centred=mlp.down_bias is not None)
        minded = weighted(roots[name], mlp.weight("down_proj").detach())
        steps_down = removed_in_steps(gram, minded, kept, scores.get(name))
        if repair == LEAST_SQUARES:
            errors[name] = [error for _, error in steps_down]
            return
        # Entry (i, j) is what neurons i and j lose together.
        lost = moments.gram(centred=False) * (minded.T @ minded)
        removed = [_others(left, mlp.width).to(lost.device) for left, _ in steps_down]
        errors[name] = [float(lost[rows][:, rows].sum()) for rows in removed]

    text.visit(mlps, measure, "costs of cuts")
    return errors


def _others(kept: Tensor, width: int) -> Tensor:
    """Return the indices below `width` that are not `kept`, ascending."""
    gone = torch.ones(width, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero().flatten()
