"""Repair: kept neurons take over what removed ones supplied, by least squares, without training.

A GLU-MLP returns ``W x`` (plus a bias), x being the activations of its neurons, W the weights of
down. With only the neurons S left, the weights of S that are closest to the old output over some
text, in the sense of least squares with a ridge, are ::

    W_S + W_R G_RS (G_SS + lambda I)^-1,    G = sum over the tokens of x x'

where R are the removed neurons. `repaired` computes them; `order_by_cost` removes the neurons
whose removal costs least after that (optimal brain surgeon). Layers are cut one after the other,
each on the inputs that the cut ones give it, so that errors do not add up unseen.

Source: Hassibi and Stork 1993, "Second order derivatives for network pruning: Optimal brain
surgeon"; Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv
2204.09656, section 3.4 (least squares over the kept); Kurtic et al. 2023, "ZipLM", arXiv
2302.04089, section 3 (blocks of columns).
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.argument_values import LEAST_SQUARES, NO_REPAIR
from lm_eval_pruned.pruning.calibration import check_observable, progress_bar
from lm_eval_pruned.pruning.criteria import kept_set
from lm_eval_pruned.pruning.curvature import weighted
from lm_eval_pruned.pruning.layer_by_layer import LayerByLayer, Replay
from lm_eval_pruned.pruning.layouts import text_config
from lm_eval_pruned.pruning.moments import LayerMoments, Moments
from lm_eval_pruned.pruning.stacked import one_by_one


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.layouts import GluMlp

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.repair")

#: lambda, as a share of the mean of the diagonal of G. From 0.01 to 0.1 nothing changes.
RIDGE = 0.01
#: Neurons are removed in so many steps; between two of them, the costs of the others are computed
#: anew.
STEPS = 24
#: Where fewer tokens than so many times its neurons meet an MLP, repair is known to lose.
_FEW = 5
#: So many texts run through a layer together.
_TOGETHER = 8


def regularised(moments: Moments, centred: bool) -> Tensor:
    """Return G + lambda I, shape (I, I), float64; `centred` is for weights beside a bias."""
    gram = moments.scatter.double() if centred else moments.uncentred()
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) or 1.0)
    return gram


def repaired(gram: Tensor, down: Tensor, kept: Tensor) -> Tensor:
    """Return the weights of down that make up for the neurons that are gone.

    Args:
        gram: G + lambda I, shape (I, I), float64.
        down: Weights of all neurons, shape (H, I), any float.
        kept: Those that stay, shape (k,), int64, ascending.

    Returns:
        Shape (H, k), float64.
    """
    gone = _others(kept, len(gram))
    own, taken_over = gram[kept][:, kept], gram[kept][:, gone]
    down = down.to(gram)
    lost = taken_over @ down[:, gone].T
    return down[:, kept] + torch.cholesky_solve(lost, torch.linalg.cholesky(own)).T


def order_by_cost(gram: Tensor, down: Tensor, width: int) -> Tensor:
    """Return the `width` neurons that stay if those go whose removal costs least after repair.

    The cost of neuron j is ``|w_j|^2 / (G^-1)_jj``, w_j being its column of down. After each of
    `STEPS` steps, weights and inverse are those of the neurons that are left, repaired.

    Args:
        gram: G + lambda I, shape (I, I), float64.
        down: Weights of down, shape (H, I), any float.
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
    root: Tensor | None = None,
) -> Iterator[tuple[Tensor, float]]:
    """Yield for each of some widths which neurons stay, and the error of the output after repair.

    The error is the sum over tokens of the squared distance, with the ridge: what `repaired` makes
    as small as it can be. Takes what `order_by_cost` takes, and

    Args:
        widths: Neurons to keep, descending.
        scores: Shape (I,): those of the highest stay, as `kept_set` has it, whatever it costs.
        root: Shape (H, H): errors are multiplied by it before they are squared, as the loss minds
            them (see `Curvature`). Which neurons stay does not depend on it.
    """
    if root is not None:
        root = root.to(gram)
    # On a CPU this takes a third of the time of `torch.cholesky_inverse`.
    inverse = torch.cholesky_solve(
        torch.eye(len(gram), dtype=gram.dtype, device=gram.device),
        torch.linalg.cholesky(gram),
    )
    left = torch.arange(len(gram), device=gram.device)
    weights, error = down.to(gram).T, 0.0
    if scores is not None:
        ranked = scores.to(gram.device).sort(descending=True, stable=True).indices
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
            rows = inverse[going]
            own = torch.linalg.cholesky(rows[:, going])
            both = torch.cat([rows[:, staying], weights[going]], 1)
            both = torch.linalg.solve_triangular(own, both, upper=False)
            across, taken = both.split([len(staying), weights.shape[1]], 1)
            minded = taken if root is None else taken @ root.T
            error += float(minded.square().sum())
            weights = weights[staying] - across.T @ taken
            inverse = inverse.index_select(0, staying).index_select(1, staying)
            inverse.addmm_(across.T, across, alpha=-1)
            left = left[staying]
        yield left.cpu(), error


@dataclass(frozen=True)
class CutMlp:
    """What is left of a GLU-MLP.

    Attributes:
        kept: Its kept neurons, shape (k,), int64, ascending, on the CPU.
        down: The weights of down for them, shape (H, k), where the model is.
        bias: The bias of down, shape (H,), if it has one.
        repaired: Whether they make up for the neurons that are gone.
    """

    kept: Tensor
    down: Tensor
    bias: Tensor | None
    repaired: bool


def tokens_per_neuron(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    mlps: Sequence[GluMlp],
    targets: Mapping[str, int],
) -> float:
    """Return how many tokens there are for each kept neuron of the MLP that has the fewest.

    A router is taken to send as many tokens to each expert. A warning says where they are few.
    """
    experts = Counter(mlp.stack for mlp in mlps if mlp.kind == "expert")
    chosen: Any = getattr(text_config(model.config), "num_experts_per_tok", None)
    tokens = sum(text.numel() for text in texts)

    def share(mlp: GluMlp) -> float:
        routed = mlp.kind == "expert" and chosen is not None
        return min(1.0, chosen / experts[mlp.stack]) if routed else 1.0

    fewest = min(tokens * share(mlp) / targets[mlp.name] for mlp in mlps)
    logger.log(
        logging.WARNING if fewest < _FEW else logging.INFO,
        "The calibration text has %.1f tokens for each kept neuron. In SmolLM2-135M the loss rose 1.5 "
        "times as much with 4.0 as with 36, and twice as much with 2.1: pass more text with "
        "calibration.",
        fewest,
    )
    return round(fewest, 1)


def cut_layer_by_layer(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    mlps: Sequence[GluMlp],
    targets: Mapping[str, int],
    scores: Mapping[str, Tensor],
    repair: str,
    device: torch.device | str | None = None,
) -> dict[str, CutMlp]:
    """Choose and repair the neurons of some GLU-MLPs, one layer after the other.

    The model stays as it is. An MLP whose activations cannot be observed, or that sees fewer tokens
    than it keeps neurons, is not repaired.

    Args:
        model: The model, with all its neurons.
        texts: Calibration text, each of shape (1, tokens), int64.
        mlps: Those to cut.
        targets: Kept width of each by name.
        scores: Scores of each by name; those without any go by `order_by_cost`.
        repair: ``none`` or ``least_squares``.
        device: Where texts run and matrices are; see `LayerByLayer`.

    Returns:
        What is left of each MLP, by name.

    Raises:
        ValueError: An activation is NaN or infinite.
        UnsupportedModelError: See `check_observable`, without scores.
    """
    left: dict[str, CutMlp] = {}
    home = model.device

    def cut(own: Sequence[GluMlp], moments: LayerMoments) -> None:
        for mlp in own:
            name = mlp.name
            left[name] = _cut(
                *(mlp, moments.of(mlp), targets[name], scores.get(name)),
                *(repair, home),
            )

    _visit(model, texts, mlps, scores, cut, "repair", device)
    done = sum(mlp.repaired for mlp in left.values())
    if done < len(mlps) and repair != NO_REPAIR:
        logger.warning(
            "repair=%s: %d of %d GLU-MLPs are repaired; the others keep their weights, because "
            "their activations cannot be observed or the calibration text has fewer tokens for "
            "them than they keep neurons.",
            repair,
            done,
            len(mlps),
        )
    return left


def errors_of_cuts(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    mlps: Sequence[GluMlp],
    widths: Mapping[str, Sequence[int]],
    scores: Sequence[Mapping[str, Tensor]],
    roots: Mapping[str, Tensor],
    repair: str,
    device: torch.device | str | None = None,
) -> dict[str, list[list[float]]]:
    """Return what cutting each GLU-MLP alone does to its output, for each of `scores` and widths.

    It is the sum over tokens of the squared error, as the loss minds it. The model stays as it is. Takes what `cut_layer_by_layer` takes, and

    Args:
        widths: Widths of each by name, in neurons, descending.
        scores: Several ways to choose neurons.
    """
    errors: dict[str, list[list[float]]] = {}

    def look(own: Sequence[GluMlp], moments: LayerMoments) -> None:
        for mlp in own:
            seen, name = _checked(mlp, moments.of(mlp)), mlp.name
            down, gram = mlp.weight("down_proj").detach(), _gram(mlp, seen)
            lost = None
            if repair != LEAST_SQUARES:
                minded = weighted(roots[name], down)
                lost = seen.uncentred() * (minded.T @ minded)
            # Where no token was, nothing is lost.
            errors[name] = [
                _errors(gram, down, widths[name], by.get(name), roots[name], lost)
                if seen.tokens
                else [0.0] * len(widths[name])
                for by in scores
            ]

    _visit(model, texts, mlps, {}, look, "costs of cuts", device)
    return errors


def _visit(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    mlps: Sequence[GluMlp],
    scores: Mapping[str, Tensor],
    cut: Callable[[Sequence[GluMlp], LayerMoments], None],
    what: str,
    device: torch.device | str | None = None,
) -> None:
    """Let `cut` change the GLU-MLPs of one layer after the other, as texts arrive there.

    The texts go on with what it changed; the model ends as it was.
    """
    if any(mlp.name not in scores for mlp in mlps):
        check_observable(model, stacked=True)
    # What experts are given does not tell padding apart.
    together = _TOGETHER if all(mlp.kind == "dense" for mlp in mlps) else 1
    walk = LayerByLayer(model, texts, device, together)
    by_stack: dict[nn.Module, list[GluMlp]] = defaultdict(list)
    for mlp in mlps:
        by_stack[model.get_submodule(mlp.stack)].append(mlp)
    last = max(walk.layers.index(layer) for layer in by_stack)
    bar = progress_bar(last + 1, what)
    with torch.no_grad(), one_by_one(model, mlps), bar:
        for layer in walk.layers[: last + 1]:
            own = by_stack.get(layer, [])
            downs = [each for mlp in own for each in _down_of(mlp)]
            with walk.layer_lent(downs):
                if own:
                    replay = _replay(walk, model, own)
                    moments = LayerMoments(walk, replay, own)
                    chosen = any(mlp.name not in scores for mlp in own)
                    if chosen and not moments.observed:
                        check_observable(model)
                    cut(own, moments)
                    # What was removed changes what the layer returns.
                    walk.go_on(replay.again())
                else:
                    walk.go_on(walk.run())
            bar.update()


def _replay(
    walk: LayerByLayer, model: PreTrainedModel, own: Sequence[GluMlp]
) -> Replay:
    down = own[0].projection("down_proj")
    alone = len(own) == 1 and down is not None and own[0].kind == "dense"
    fits = alone and Replay.fits(walk, model, down)
    return Replay(walk, {mlp.module for mlp in own}, down if fits else None)


def _cut(
    mlp: GluMlp,
    moments: Moments | None,
    width: int,
    scores: Tensor | None,
    repair: str,
    home: torch.device,
) -> CutMlp:
    """Choose neurons, then `_change` the weights; return what is left."""
    moments, gram = _checked(mlp, moments), torch.empty(0)
    if scores is None or (repair == LEAST_SQUARES and moments.tokens >= width):
        gram = _gram(mlp, moments)
    if scores is None:
        kept = order_by_cost(gram, mlp.weight("down_proj").detach(), width)
    else:
        kept = kept_set(scores, width)
    done = _change(mlp, moments, gram, kept, repair)
    down, bias = mlp.weight("down_proj").detach(), _bias(mlp)
    down = down.index_select(1, kept.to(down.device)).to(home)
    return CutMlp(kept, down, None if bias is None else bias.clone(), done)


def _errors(
    gram: Tensor,
    down: Tensor,
    widths: Sequence[int],
    scores: Tensor | None,
    root: Tensor,
    lost: Tensor | None,
) -> list[float]:
    """Return the error at each width, after repair, or without it where `lost` is known.

    Entry (i, j) of that is what neurons i and j lose together, of shape (I, I).
    """
    if lost is None:
        steps_down = removed_in_steps(gram, down, widths, scores, root)
        return [error for _, error in steps_down]
    if scores is None:
        sets = [left for left, _ in removed_in_steps(gram, down, widths)]
    else:
        sets = [kept_set(scores, width) for width in widths]
    gone = [_others(kept.to(lost.device), len(lost)) for kept in sets]
    return [float(lost[each][:, each].sum()) for each in gone]


def _checked(mlp: GluMlp, moments: Moments | None) -> Moments:
    if moments is None:
        return Moments.none(mlp.width, mlp.weight("down_proj").device)
    if not moments.scatter.isfinite().all():
        raise ValueError(
            f"The calibration text makes {mlp.name} produce NaN or infinite activations: use "
            "another dtype, such as dtype=float32, or other text."
        )
    return moments


def _gram(mlp: GluMlp, moments: Moments) -> Tensor:
    return regularised(moments, centred=_bias(mlp) is not None)


def _change(
    mlp: GluMlp, moments: Moments, gram: Tensor, kept: Tensor, repair: str
) -> bool:
    """Set the columns of removed neurons to 0, and the others to repaired ones.

    Returns whether the MLP was repaired.
    """
    down, bias = mlp.weight("down_proj").detach(), _bias(mlp)
    solves = repair == LEAST_SQUARES and moments.tokens >= len(kept)
    here, gone = kept.to(down.device), _others(kept, mlp.width).to(down.device)
    before = down.clone()
    if solves:
        down[:, here] = repaired(gram, before, here).to(down.dtype)
    down[:, gone] = 0
    if bias is not None and solves:
        bias += ((before.double() - down.double()) @ moments.mean).to(bias)
    return solves


def _down_of(mlp: GluMlp) -> list[Tensor]:
    """Return the parameters that a repair writes to."""
    bias = getattr(mlp.projection("down_proj"), "bias", None)
    weight = mlp.parameter(mlp.regions["down_proj", "weight"])
    return [weight] if bias is None else [weight, bias]


def _bias(mlp: GluMlp) -> Tensor | None:
    """Return the bias of down, shape (H,), where it is a module with one."""
    bias: Any = getattr(mlp.projection("down_proj"), "bias", None)
    return None if bias is None else bias.detach()


def _others(kept: Tensor, width: int) -> Tensor:
    """Return the indices below `width` that are not `kept`, ascending."""
    gone = torch.ones(width, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero().flatten()
