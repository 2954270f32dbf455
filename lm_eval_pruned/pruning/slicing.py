"""Pruning in memory: slice the GLU-MLPs of a model that is already loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.alignment import warn_misaligned
from lm_eval_pruned.pruning.allocation import MEASURED_CUTS, plan_layers
from lm_eval_pruned.pruning.arguments import PruneArguments, takes_prune_arguments
from lm_eval_pruned.pruning.arrays import all_finite, gather
from lm_eval_pruned.pruning.calibration import (
    CalibrationText,
    NeuronActivity,
    calibrate,
)
from lm_eval_pruned.pruning.criteria import (
    CALIBRATED,
    RANDOM,
    kept_set,
    proves_finite,
    score_neurons,
)
from lm_eval_pruned.pruning.curves import Sensitivity
from lm_eval_pruned.pruning.dropping import drop_layers
from lm_eval_pruned.pruning.layouts import (
    NEURON_AXIS,
    GluMlp,
    count_parameters,
    find_glu_mlps,
    resize,
)
from lm_eval_pruned.pruning.measuring import (
    LENGTH,
    ScoreTable,
    depth_in_memory,
    loss_curves,
)
from lm_eval_pruned.pruning.record import PruneRecord
from lm_eval_pruned.pruning.widths import Widths, widths_in_memory


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from lm_eval_pruned.pruning.plan import PrunePlan

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.pruning")


@takes_prune_arguments
def prune_model(
    model: PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **prune_arguments: Any,
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
        ratio, ...: The arguments of `lm_eval_pruned.pruning.arguments.PruneArguments`.

    Returns:
        The same model. ``model.prune_record`` is the `PruneRecord` of what was done.

    Raises:
        ValueError: An argument is out of range, or a weight is NaN or infinite.
        UnsupportedModelError: The model cannot be pruned.

    Source: arXiv 2512.22671, section 3.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(
        ...     hidden_size=32,
        ...     intermediate_size=128,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     vocab_size=64,
        ... )
        >>> model = prune_model(LlamaForCausalLM(tiny), ratio=2.0)
        >>> model.model.layers[0].mlp.gate_proj.weight.shape
        torch.Size([64, 32])
        >>> [kept.shape for kept in model.prune_record.kept]
        [torch.Size([64]), torch.Size([64])]
    """
    return prune_loaded(model, PruneArguments(**prune_arguments), tokenizer)


def prune_loaded(
    model: PreTrainedModel,
    arguments: PruneArguments,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Do what `prune_model` does with arguments that are together."""
    widths = widths_in_memory(model)
    if arguments.drop_layers is not None:
        if arguments.measures_depth:
            # What is wrong with the arguments is refused before text runs.
            widths.plan(arguments)
        widths = widths.without_layers(depth_in_memory(model, arguments, tokenizer))
    plan, known = widths.plan(arguments), ScoreTable()
    evidence = LoadedModel(plan, model, tokenizer, known)
    return finished(carry_out(plan, model, widths, evidence, known), widths)


def carry_out(
    plan: PrunePlan,
    model: PreTrainedModel,
    widths: Widths,
    evidence: LoadedModel,
    known: ScoreTable,
) -> PreTrainedModel:
    """Prune `model` in place as `plan` says; see `prune_model`.

    Args:
        plan: The plan.
        model: A loaded model.
        widths: Its widths, those of the layers that stay.
        evidence: What the plan is settled by.
        known: Scores of the same model from before; takes those that it lacks.
    """
    before = count_parameters(model)
    # An error leaves the model whole.
    with contextlib.ExitStack() as on_error:
        if widths.depth is not None:
            drop_layers(model, widths.depth, widths.remembered, on_error)
        _narrow_layers(plan, model, widths, evidence, known, before)
        on_error.pop_all()
    return model


def _narrow_layers(
    plan: PrunePlan,
    model: PreTrainedModel,
    widths: Widths,
    evidence: LoadedModel,
    known: ScoreTable,
    before: int,
) -> None:
    """Narrow the layers of a model, and write its record."""
    mlps = find_glu_mlps(model)
    kept: dict[str, Tensor] = {}
    plan = plan_layers(plan, widths, evidence)
    targets = widths.targets(plan)
    if plan.prunes:
        narrowed_config = widths.narrowed_config(targets)
        # All layers are scored before the first is sliced: an error leaves the model whole.
        for mlp in mlps:
            kept[mlp.name] = (
                kept_set(
                    evidence.score(mlp, plan.criterion_of(mlp.block)), targets[mlp.name]
                )
                if targets[mlp.name] < mlp.width
                else torch.arange(mlp.width, device="cpu")
            )
        groups = [
            list(group)
            for _, group in itertools.groupby(mlps, key=lambda mlp: mlp.path)
        ]
        # numpy copies without holding the interpreter's lock.
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda group: _narrow_together(group, kept), groups))
        widths.copy_keys(narrowed_config, model.config)
        widths.describe_layers(model.config, targets)
    record = PruneRecord.of(
        plan,
        widths,
        before,
        count_parameters(model),
        tuple(indices.cpu() for indices in kept.values()),
        known.calibration if plan.prunes else None,
    )
    model.prune_record = record  # type: ignore[assignment]


#: What is said of a model whose widths its config has in ``per_layer_config`` alone.
NOT_IN_STOCK = (
    "the saved config has the widths in per_layer_config, from which transformers up to 5.24 "
    "builds no MLPs, so stock transformers cannot open this model before a release that does; "
    "--model pruned-hf and load_pruned can."
)


def warn_inexpressible(widths: Widths, targets: Mapping[str, int]) -> None:
    """Tell the user if only this package can open the model once it is saved."""
    if widths.opens_in_stock(targets):
        return
    names = widths.inexpressible(targets)
    logger.warning(
        "%s keeps a width of its own, which %s in the config cannot express: %s",
        names[0] if len(names) == 1 else f"Each of {len(names)} GLU-MLPs",
        widths.keys[names[0]],
        NOT_IN_STOCK,
    )


def finished(model: PreTrainedModel, widths: Widths) -> PreTrainedModel:
    """Have a model run with its widths, on its device and in its dtype, and tell what they cost.

    Args:
        model: A model with its record, where it is going to stay.
        widths: The widths that its unpruned MLPs have.
    """
    record: PruneRecord = model.prune_record  # type: ignore[assignment]
    plan, targets = record.plan, widths.targets(record.plan)
    choose_experts_implementation(model)
    warn_inexpressible(widths, targets)
    warn_misaligned(model, plan, widths, targets)
    return model


#: Bytes to which torch's grouped matrix product wants every row of the experts aligned.
_GROUPED_ALIGNMENT = 16


def choose_experts_implementation(model: PreTrainedModel) -> None:
    """Let experts run one by one where their width rules out the grouped product.

    transformers runs stacked experts in one `torch.nn.functional.grouped_mm` by
    default, which refuses rows that are no multiple of 16 bytes.
    """
    if getattr(model.config, "_experts_implementation", None) != "grouped_mm":
        return
    for mlp in find_glu_mlps(model):
        region = mlp.regions["down_proj", "weight"]
        size = mlp.parameter(region).element_size()
        if region.expert is not None and mlp.width * size % _GROUPED_ALIGNMENT:
            model.set_experts_implementation("eager")
            multiple = _GROUPED_ALIGNMENT // size
            logger.warning(
                "The experts of %d neurons run one by one, because torch's grouped matrix product "
                "needs a multiple of %d: add multiple_of=%d for speed. Stock transformers opens "
                "the saved model with experts_implementation=eager.",
                mlp.width,
                multiple,
                multiple,
            )
            return


@dataclass(frozen=True)
class LoadedModel:
    """What a model in memory says of its neurons and layers, each thing measured once.

    Attributes:
        plan: Names the text, how many of its texts, and the seed of ``random``.
        model: The unpruned model.
        tokenizer: Its tokenizer; needed where text is read.
        known: What was measured before; takes what is measured here.
    """

    plan: PrunePlan
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    known: ScoreTable

    def score(self, mlp: GluMlp, criterion: str) -> Tensor:
        """Return the scores of an MLP by a criterion, shape (I,), on the CPU."""
        plan, known = self.plan, self.known
        key = (criterion, plan.seed if criterion == RANDOM else 0, mlp.name)
        if key not in known.scores:
            activity = None
            if criterion in CALIBRATED:
                if known.calibration is None:
                    file, samples = str(plan.calibration), plan.calibration_samples
                    known.calibration = calibrate(
                        self.model, self.tokenizer, file, samples
                    )
                activity = known.calibration.activity[mlp.name]
            gate, up, down = (mlp.weight(projection) for projection in NEURON_AXIS)
            known.scores[key] = score(
                plan, mlp.name, mlp.layer, gate, up, down, activity, criterion
            ).cpu()
        return known.scores[key]

    def scores(self, criterion: str) -> Mapping[str, Tensor]:
        """Return the scores of all MLPs by a criterion, by name of the MLP."""
        mlps = find_glu_mlps(self.model)
        return {mlp.name: self.score(mlp, criterion) for mlp in mlps}

    def losses(
        self, text: CalibrationText, criterion: str, removed: Sequence[Fraction]
    ) -> Sensitivity:
        """Measure the losses with one layer cut at a time by a criterion.

        Args:
            text: What the loss is measured on.
            criterion: Canonical name.
            removed: Shares of neurons to remove, in percent.
        """
        loss, curves = loss_curves(
            self.model,
            text.tokens,
            self.scores(criterion),
            removed,
            criterion,
            self.plan.seed if criterion == RANDOM else None,
        )
        name = str(self.model.config.name_or_path)
        return Sensitivity(name, loss, curves, **text.as_dict())

    def curves(self, criteria: Sequence[str]) -> Sensitivity:
        """Return the losses with one layer cut at a time, by each of `criteria`.

        Raises:
            ValueError: The text is not as `lm_eval_pruned.pruning.calibration.read_texts` wants
                it, or there is no tokenizer.
        """
        if self.known.curves is None:
            file, samples = str(self.plan.calibration), self.plan.calibration_samples
            text = CalibrationText.of(self.model, self.tokenizer, file, samples, LENGTH)
            text.check_predictable()
            removed = [Fraction(str(share)) for share in MEASURED_CUTS]
            found = [self.losses(text, criterion, removed) for criterion in criteria]
            curves = tuple(curve for each in found for curve in each.curves)
            self.known.curves = dataclasses.replace(found[0], curves=curves)
        return self.known.curves


def _narrow_together(mlps: list[GluMlp], kept: dict[str, Tensor]) -> None:
    """Narrow GLU-MLPs that may share parameters."""
    if all(len(kept[mlp.name]) == mlp.width for mlp in mlps):
        return
    pieces = {}
    for mlp in mlps:
        for projection, part in mlp.regions:
            axis = NEURON_AXIS[projection] if part == "weight" else 0
            pieces[mlp.name, projection, part] = narrow(
                mlp.weight(projection, part), kept[mlp.name], axis
            )
    resize(mlps, pieces)


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
    weights = {"down_proj": down_proj, "gate_proj": gate_proj, "up_proj": up_proj}

    def check(*projections: str) -> None:
        for projection in projections:
            weight = weights[projection]
            if weight is not None:
                check_finite(f"{name}.{projection}.weight", weight)

    check("down_proj")
    if not proves_finite(criterion):
        check("gate_proj", "up_proj")
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
        check("gate_proj", "up_proj")
    return scores


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError naming the tensor if it holds NaN or infinity.

    Args:
        name: What the message calls it.
        weight: Any shape.
    """
    if all_finite(weight):
        return
    bad = int((~weight.isfinite()).sum())
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
    return gather(weight, kept, axis)
