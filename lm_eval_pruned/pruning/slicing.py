"""Pruning in memory: slice the GLU-MLPs of a model that is already loaded."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lm_eval_pruned.pruning.allocation import plan_layers
from lm_eval_pruned.pruning.argument_values import NO_REPAIR, UNIFORM
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.calibration import unless_cpu
from lm_eval_pruned.pruning.criteria import (
    CALIBRATED,
    OBS,
    as_words,
    beaten_by_chance,
    kept_set,
)
from lm_eval_pruned.pruning.layouts import (
    NEURON_AXIS,
    GluMlp,
    find_glu_mlps,
    regions_by_parameter,
    resize,
)
from lm_eval_pruned.pruning.measuring import LoadedModel, check_weights
from lm_eval_pruned.pruning.record import PruneRecord
from lm_eval_pruned.pruning.repair import (
    CutMlp,
    cut_layer_by_layer,
    tokens_per_neuron,
)
from lm_eval_pruned.pruning.stacked import refused_by_grouped_mm
from lm_eval_pruned.pruning.widths import widths_in_memory


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from lm_eval_pruned.pruning.arguments import PruneKeywords
    from lm_eval_pruned.pruning.widths import Cut

    #: The new weight of each name of a GLU-MLP, projection, and "weight" or "bias".
    Pieces = dict[tuple[str, str, str], Tensor]

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.pruning")

#: Neurons of which CUDA wants a multiple where a weight has 16 bits (NVIDIA, Matrix Multiplication
#: Background User's Guide, "Tensor Core Requirements").
_CUDA_MULTIPLE = 8


def prune_model(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **prune_arguments: Unpack[PruneKeywords],
) -> PreTrainedModel:
    """Prune the GLU-MLPs of a loaded model in place and return it.

    Gate and up go from (I, H) to (k, H), down from (H, I) to (H, k), biases of
    gate and up from (I,) to (k,), whether they are stored apart, fused or stacked
    by expert. The kept neurons keep their order, dtype and device, and the config
    gets the new width. Scores are float32 and do not depend on the device, except
    those of activations, which are measured where the model is.

    In a model with experts, sizes refer to the experts; every expert keeps its own
    best neurons, and shared experts and dense layers are narrowed in the same
    proportion, ``ceil(width * k / I)``. Routers stay as they are.

    Args:
        model: A model whose MLPs are in a known layout; see `lm_eval_pruned.pruning.layouts`.
        tokenizer: The model's tokenizer; needed for `calibration`.
        **prune_arguments: Those of `lm_eval_pruned.pruning.arguments.PruneArguments`.

    Returns:
        The same model. ``model.prune_record`` is the `PruneRecord` of what was done.

    Raises:
        ValueError: An argument is out of range, or a weight is NaN or infinite.
        UnsupportedModelError: The model cannot be pruned.

    Source: arXiv 2512.22671, section 3.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
        >>> tiny = LlamaConfig(**sizes, intermediate_size=128, num_hidden_layers=2)
        >>> model = prune_model(LlamaForCausalLM(tiny), ratio=2.0)
        >>> model.model.layers[0].mlp.gate_proj.weight.shape
        torch.Size([64, 32])
    """
    return prune_loaded(model, PruneArguments(**prune_arguments), tokenizer)


def prune_loaded(
    model: PreTrainedModel,
    arguments: PruneArguments,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Do what `prune_model` does with arguments that are together."""
    evidence = LoadedModel(model, tokenizer, arguments)
    carry_out(evidence, widths_in_memory(model).cut(arguments), whole_on_error=True)
    finish(model)
    return model


def carry_out(
    evidence: LoadedModel,
    cut: Cut,
    *,
    whole_on_error: bool = False,
    scratch: Path | None = None,
) -> None:
    """Prune a model in place and write its record; see `prune_model`.

    Args:
        evidence: What settles the plan, of the model.
        cut: What to do.
        whole_on_error: Whether an error leaves the model as it was: all is scored and narrowed before
            the first MLP is changed. If not, a narrow MLP takes its place as soon as it is made,
            which takes less memory.
        scratch: Folder on whose disk narrow weights are then, in place of memory, in files that go
            with them.
    """
    model, arguments = evidence.model, cut.plan.arguments
    if arguments.calibration is not None:
        # Text tells only that something is not finite.
        check_weights(model)
    if cut.plan.is_open:
        cut = plan_layers(cut, evidence)
    plan, targets = cut.plan, cut.targets
    mlps = find_glu_mlps(model) if plan.prunes else []
    narrow_config = cut.config() if plan.prunes else None
    narrower = [mlp for mlp in mlps if targets[mlp.name] < mlp.width]
    scored = bool(mlps) and plan.criterion != OBS
    scores = evidence.scores(narrower) if scored else {}
    if arguments.calibration is None:
        check_weights(model, narrower)
    kept = {mlp.name: _kept(mlp, targets, scores) for mlp in mlps}
    waiting: list[Callable[[], None]] = []

    def take(chosen: Sequence[GluMlp], cut_mlps: Mapping[str, CutMlp]) -> None:
        kept.update({name: mlp.kept for name, mlp in cut_mlps.items()})
        for group, pieces in _narrowed(chosen, kept, cut_mlps, scratch):
            put = functools.partial(_put, group, pieces, cut_mlps, scratch)
            waiting.append(put) if whole_on_error else put()

    calibration, repaired = None, None
    if narrower and arguments.layer_by_layer:
        calibration, repaired = _cut_by_layer(evidence, cut, narrower, scores, take)
    else:
        take(mlps, {})
        if plan.criterion in CALIBRATED and scores:
            calibration = evidence.observed.measured_on
    for put in waiting:
        put()
    if narrow_config is not None:
        cut.copy_keys(narrow_config, model.config)
    done = tuple(kept.values()), calibration, repaired
    model.prune_record = PruneRecord(cut.widths, plan, *done)  # type: ignore[assignment]


def _kept(
    mlp: GluMlp, targets: Mapping[str, int], scores: Mapping[str, Tensor]
) -> Tensor:
    """Return the neurons that a GLU-MLP keeps by its scores; all of them where it has none."""
    if mlp.name in scores:
        return kept_set(scores[mlp.name], targets[mlp.name])
    return torch.arange(mlp.width, device="cpu")


def _cut_by_layer(
    evidence: LoadedModel,
    cut: Cut,
    narrower: Sequence[GluMlp],
    scores: Mapping[str, Tensor],
    take: Callable[[Sequence[GluMlp], Mapping[str, CutMlp]], None],
) -> tuple[dict[str, Any], int | None]:
    """Choose and repair neurons on calibration text; return what was read, and how many MLPs are repaired."""
    model, text, plan = evidence.model, evidence.text, cut.plan
    fewest = tokens_per_neuron(model, text.tokens, narrower, cut.targets)
    roots = evidence.curvature.roots if plan.criterion == OBS else {}
    repair = plan.arguments.repair
    changed = cut_layer_by_layer(
        evidence.moments, narrower, cut.targets, scores, roots, repair, take
    )
    calibration = text.as_dict() | unless_cpu(evidence.device or model.device)
    calibration["tokens_per_neuron"] = fewest
    return calibration, None if repair == NO_REPAIR else changed


def finish(model: PreTrainedModel, device: torch.device | None = None) -> None:
    """Have a pruned model run on `device`, by default where it is, and tell what its widths cost there."""
    record: PruneRecord = model.prune_record  # type: ignore[assignment]
    plan, targets = record.plan, record.targets
    if plan.prunes and (plan.arguments.allocation, plan.arguments.repair) == (
        UNIFORM,
        NO_REPAIR,
    ):
        spares_first = plan.layers == tuple(range(1, record.layers))
        method = plan.criterion + ", skip_layers=0" * spares_first
        if plan.layers is None or spares_first:
            _tell_once(beaten_by_chance(method, 1 - plan.width / plan.width_before))
    if (refused := refused_by_grouped_mm(model)) is not None:
        width, multiple = refused
        model.set_experts_implementation("eager")
        logger.warning(
            "The experts of %d neurons run one by one, because torch's grouped matrix product "
            "needs a multiple of %d: add multiple_of=%d for speed. Stock transformers opens the "
            "saved model with experts_implementation=eager.",
            width,
            multiple,
            multiple,
        )
    if names := record.inexpressible:
        logger.warning(
            "%s keeps a width that %s in the config cannot express, and transformers up to 5.24 "
            "cannot build MLPs of several widths: open the saved model with --model pruned-hf or "
            "load_pruned.",
            names[0] if len(names) == 1 else f"Each of {len(names)} GLU-MLPs",
            record.widths.keys[names[0]],
        )
    quantised = getattr(model.config, "quantization_config", None) is not None
    kind = (device or model.device).type
    if kind == "cuda" and model.dtype.itemsize == 2 and not quantised:
        kept = (targets[n] for n in targets if targets[n] < record.widths.actual[n])
        if odd := next((width for width in kept if width % _CUDA_MULTIPLE), 0):
            logger.warning(
                "%d neurons are not a multiple of %d, so CUDA's kernels for 16-bit weights are "
                "slower: add multiple_of=%d.",
                odd,
                _CUDA_MULTIPLE,
                math.lcm(_CUDA_MULTIPLE, plan.multiple_of),
            )


@functools.cache
def _tell_once(sentence: str | None) -> None:
    if sentence is not None:
        logger.warning(sentence)


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


def _narrowed(
    mlps: Sequence[GluMlp],
    kept: Mapping[str, Tensor],
    cut: Mapping[str, CutMlp],
    scratch: Path | None,
) -> Iterator[tuple[list[GluMlp], Pieces]]:
    """Yield GLU-MLPs by the module that they share, with the weights of their kept neurons."""
    by_path = itertools.groupby(mlps, key=lambda mlp: mlp.path)
    groups = [list(group) for _, group in by_path]
    pieces = functools.partial(_pieces, kept=kept, cut=cut)
    if scratch is not None:
        # Threads are faster than a disk, and what waits for it would fill the memory.
        yield from zip(groups, map(pieces, groups), strict=True)
        return
    # Copying holds no lock of the interpreter: without threads, a load of a 1B model takes two
    # thirds longer on two cores.
    with ThreadPoolExecutor() as pool:
        yield from zip(groups, pool.map(pieces, groups), strict=True)


@torch.no_grad()
def _pieces(
    mlps: Sequence[GluMlp], kept: Mapping[str, Tensor], cut: Mapping[str, CutMlp]
) -> Pieces:
    """Return the weights of kept neurons, down as it was `cut`; empty where all are kept."""
    pieces: Pieces = {}
    if all(len(kept[mlp.name]) == mlp.width for mlp in mlps):
        return pieces
    for mlp in mlps:
        for projection, part in mlp.regions:
            weight = mlp.weight(projection, part)
            if (projection, part) == ("down_proj", "weight") and mlp.name in cut:
                piece = cut[mlp.name].down.to(weight.device)
            else:
                axis = NEURON_AXIS[projection] if part == "weight" else 0
                piece = narrow(weight, kept[mlp.name], axis)
            pieces[mlp.name, projection, part] = piece
    return pieces


@torch.no_grad()
def _put(
    mlps: Sequence[GluMlp],
    pieces: Pieces,
    cut: Mapping[str, CutMlp],
    scratch: Path | None,
) -> None:
    """Give GLU-MLPs that share a module their narrow weights, and the repaired bias of down."""
    if not pieces:
        return
    resize(mlps, pieces)
    if scratch is not None:
        _map(mlps, scratch)
    for mlp in mlps:
        if mlp.name in cut and (bias := cut[mlp.name].bias) is not None:
            stored: Any = mlp.down_bias
            stored.copy_(bias)


def _map(mlps: Sequence[GluMlp], scratch: Path) -> None:
    """Have the weights of GLU-MLPs mapped from a file, which has no name any more.

    Raises:
        SafetensorError: The disk is full.
    """
    entries = regions_by_parameter(mlps).items()
    weights = {name: mlp.parameter(region) for name, [(mlp, _, region), *_] in entries}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        file = Path(folder, "narrow")
        save_file({name: weight.data for name, weight in weights.items()}, file)
        for name, stored in load_file(file).items():
            weights[name].data = stored
