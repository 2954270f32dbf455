"""Loading a pruned model: whole in the stored dtype, pruned in memory, then cast and placed.

Engines that build models by themselves ask here which widths they can have, and for the tensors.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.request import (
    LoadRequest,
    as_stored,
    asked_of,
    stored_once,
)
from lm_eval_pruned.pruning.allocation import plan_layers
from lm_eval_pruned.pruning.argument_values import UNIFORM
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.measuring import (
    LoadedModel,
    check_weights,
    depth_in_memory,
)
from lm_eval_pruned.pruning.record import PruneRecord
from lm_eval_pruned.pruning.slicing import carry_out, finished


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.checkpoints.request import Rounded
    from lm_eval_pruned.pruning.plan import PrunePlan


def load_pruned(
    pretrained: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    auto_class: type | None = None,
    **arguments: Any,
) -> PreTrainedModel:
    """Load a model whose GLU-MLPs are narrowed while its checkpoint is read.

    Gate and up come out as (k, H) instead of (I, H), down as (H, k). Neurons are ranked by
    the weights as they are stored. For what sizes mean in a model with experts, see
    `lm_eval_pruned.prune_model`.

    Several threads may load pruned models. If one of them calls ``from_pretrained`` of stock
    transformers meanwhile, loads of models with tied weights can fail until Python is started anew,
    and a model can get the dtype of the other: transformers changes the whole process while it loads.

    If layers already differ in width, those narrower than the requested ``ratio`` or
    ``intermediate_size`` keep their width, and ``prune_percent`` is a share of each layer's own
    width.

    Args:
        pretrained: Folder or Hub name of the model.
        tokenizer: What reads calibration text; default: the tokenizer of `pretrained`.
        device: Where to load to; default: the CPU. Scores of weights are computed on the CPU, and
            only the kept neurons go there, unless calibration text runs there.
        dtype: Weight dtype; default: as for ``from_pretrained``, that of config.json, else of the
            first tensor.
        auto_class: The transformers class to load with; default
            `AutoModelForCausalLM`.
        **arguments: Those of `lm_eval_pruned.pruning.arguments.PruneArguments`, and anything else
            that ``from_pretrained`` takes.

    Returns:
        The model, in evaluation mode. ``model.prune_record`` says what was done.

    Raises:
        ValueError: An argument is out of range, or a weight is NaN or infinite.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The checkpoint is missing, incomplete or damaged.
        RuntimeError: Another thread disturbed the load, as above.

    Source: arXiv 2512.22671, section 3.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
        >>> tiny = LlamaConfig(**sizes, intermediate_size=128, num_hidden_layers=2)
        >>> with TemporaryDirectory() as folder:
        ...     LlamaForCausalLM(tiny).save_pretrained(folder)
        ...     model = load_pruned(folder, prune_percent=40)
        >>> model.model.layers[0].mlp.down_proj.weight.shape
        torch.Size([32, 77])
        >>> model.prune_record.parameters_before, model.prune_record.parameters_after
        (37024, 27232)
    """
    import transformers

    prune_arguments = PruneArguments.taken_from(arguments)
    if dtype is not None:
        arguments["dtype"] = dtype
    if device is not None:
        if arguments.get("device_map") is not None:
            raise ValueError(
                f"device={device} and device_map={arguments['device_map']} both say where to "
                "load: pass one."
            )
        arguments["device_map"] = {"": device}
    request = LoadRequest.resolve(
        auto_class or transformers.AutoModelForCausalLM,
        pretrained,
        prune_arguments,
        arguments,
    )
    return load_request(request, tokenizer)


def load_request(
    request: LoadRequest, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """Load the model of a request, prune it, then cast and place what is left.

    Args:
        request: What is to be loaded.
        tokenizer: What reads calibration text; default: that of the model.
    """
    asked = request.prune_arguments
    request.check_text()
    if not (request.plan.changes_model or asked.measures_depth):
        model, widths = request.load()
        plan = widths.plan(asked)
        # Layers that are wider than the config says may have to be narrowed.
        if not plan.changes_model:
            check_weights(model)
            record = PruneRecord.of(plan, widths, ())
            model.prune_record = record  # type: ignore[assignment]
            return finished(model, widths)
    return Stored.of(request, tokenizer).placed()


@dataclass(frozen=True)
class Stored(LoadedModel):
    """A model as it is stored, with all its layers, and what is to become of it.

    Attributes:
        request: What was loaded, with the widths that its tensors have and the plan for them.
        rounded: What the dtype of `model` rounded; see `LoadRequest.load_stored`.
    """

    request: LoadRequest = field(kw_only=True)
    rounded: Sequence[Rounded] = field(kw_only=True)

    @classmethod
    def of(
        cls,
        request: LoadRequest,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Stored:
        """Load the model of `request`, as it is stored; takes what `load_request` takes."""
        asked, content = request.prune_arguments, request.content_key()
        device = request.device()
        model, widths, rounded = request.load_stored()
        if asked.calibration is not None and tokenizer is None:
            tokenizer = request.load_tokenizer()
        if widths is not request.widths.whole or asked.measures_depth:
            # The tensors, or the text, say something else than the config.
            if asked.drop_layers is not None:
                depth = depth_in_memory(model, asked, tokenizer, device, content)
                widths = widths.without_layers(depth)
            plan = widths.plan(asked)
            request = dataclasses.replace(request, widths=widths, plan=plan)
        plan = request.plan
        if content is not None and plan.depth is not None:
            content = (content, plan.depth.kept)
        samples: Any = asked.calibration_samples
        return cls(
            model,
            tokenizer,
            asked.calibration,
            samples,
            plan.seed,
            device,
            content,
            request=request,
            rounded=rounded,
        )

    def settled(self) -> PrunePlan:
        """Return the plan with what scores or losses decide."""
        return plan_layers(self.request.plan, self.request.widths, self)

    def narrowed(self) -> PreTrainedModel:
        """Prune the model in place and return it, in the dtype in which it was loaded."""
        request = self.request
        return carry_out(self, request.plan, request.widths, whole_on_error=False)

    def pruned(self) -> PreTrainedModel:
        """Prune the model in place and return it, with tensors as they are stored."""
        model = self.narrowed()
        as_stored(self.rounded)
        return model

    def placed(self) -> PreTrainedModel:
        """Prune the model, then cast and place what is left as the user asked."""
        widths = self.request.widths
        model = self.request.placed(self.narrowed(), widths, self.rounded)
        return finished(model, widths)


def tensors_of(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model under the keys that its checkpoint has for them.

    Source: `transformers.PreTrainedModel.save_pretrained`, which renames them in the same way.
    """
    from transformers.core_model_loading import revert_weight_conversion

    yield from revert_weight_conversion(model, stored_once(model)).items()


def check_buildable(request: LoadRequest) -> None:
    """Refuse what no engine can build from a config, except dense MLPs, which are rebuilt."""
    widths, plan = request.widths, request.plan
    why = None
    if request.prune_arguments.drop_layers is not None:
        why = "drop_layers removes layers that an engine looks for in the checkpoint"
    elif plan.is_open:
        why = (
            f"allocation={plan.allocation} derives the widths from losses, but an engine needs "
            "them before it loads any weight"
        )
    if why is not None:
        raise UnsupportedModelError(
            f"{why}: use --model pruned-hf, or export the pruned model first (lm-eval-pruned "
            "prune)."
        )
    experts = {mlp.name for mlp in widths.mlps if mlp.kind == "expert"}
    for name in widths.inexpressible(widths.targets(plan)):
        if name in experts:
            raise UnsupportedModelError(
                f"{asked_of(plan) or 'The checkpoint'} gives {name} another width than the "
                f"other experts, but an engine builds all of them from {widths.keys[name]} in the "
                "config: prune all layers alike, or use --model pruned-hf."
            )


def check_divides(request: LoadRequest, processes: int, argument: str) -> None:
    """Refuse widths that do not divide among the processes that `argument` asked for."""
    plan, targets = request.plan, request.widths.targets(request.plan)
    odd = [f"{n} {width} neurons" for n, width in targets.items() if width % processes]
    # What an allocation finds is not known yet.
    if plan.prunes and plan.allocation != UNIFORM and plan.multiple_of % processes:
        odd = [f"each layer multiples of {plan.multiple_of} neurons"]
    if odd:
        raise ValueError(
            f"{asked_of(plan) or 'The checkpoint'} gives {odd[0]}, which cannot be divided among "
            f"the {processes} processes of {argument}: pass "
            f"multiple_of={math.lcm(processes, plan.multiple_of)}, or use a number of processes "
            "that divides it."
        )
