"""Pruning while loading: the full model never exists in memory.

`load_pruned` asks transformers for a model with a narrowed config. While it
loads, a `Session` stands in for the checkpoint: the entries of the GLU-MLPs are
`NarrowedTensor`s, which look like tensors of the kept width. Everything else that
transformers does with a checkpoint (shards, renamed keys, ``device_map``, dtype casts,
quantising while loading, tensor parallelism) sees a checkpoint that was always narrow.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.evidence import settled_request, with_depth
from lm_eval_pruned.checkpoints.layers import observe
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.checkpoints.route import clear_errors, with_stored_widths
from lm_eval_pruned.checkpoints.session import Session
from lm_eval_pruned.pruning.alignment import warn_misaligned
from lm_eval_pruned.pruning.arguments import PruneArguments, takes_prune_arguments
from lm_eval_pruned.pruning.layouts import count_parameters
from lm_eval_pruned.pruning.record import PruneRecord
from lm_eval_pruned.pruning.scores import ScoreTable
from lm_eval_pruned.pruning.slicing import (
    carry_out,
    choose_experts_implementation,
    score_loaded,
    warn_inexpressible,
)


if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.scores import KnownScores

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.loading")


@takes_prune_arguments
def load_pruned(
    pretrained: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    auto_class: type | None = None,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Load a model whose GLU-MLPs are narrowed while its checkpoint is read.

    Gate and up come out as (k, H) instead of (I, H), down as (H, k). Checkpoints
    that cannot be pruned while they load (GGUF, ``.bin``, a release of transformers
    that loads in a way not known here) are loaded in full and pruned in memory, with
    identical weights and a warning. What sizes mean in a model with experts is said
    in `lm_eval_pruned.prune_model`.

    A checkpoint whose layers differ in width loads with the widths that its config has
    for single layers (``per_layer_config``, ``block_configs``), or else with those of its
    tensors; sizes then prune from there: layers that
    are narrower than ``ratio`` or ``intermediate_size`` ask stay as they are, and
    ``prune_percent`` is a share of each layer's own width.

    Args:
        pretrained: Folder or Hub name of the model.
        ratio, ...: The arguments of `lm_eval_pruned.pruning.arguments.PruneArguments`.
        tokenizer: What reads calibration text; default: the tokenizer of `pretrained`.
        device: Where to load to; default: the CPU. Only the kept neurons go there:
            scores are computed on the CPU.
        dtype: Weight dtype; default: the one the checkpoint is stored in. Neurons are ranked
            by the weights as they are stored, and calibration text runs in the dtype that the
            checkpoint names, so the kept neurons do not depend on it.
        auto_class: The transformers class to load with; default
            `AutoModelForCausalLM`.
        **from_pretrained: Anything else ``from_pretrained`` takes.

    Returns:
        The model, in evaluation mode. ``model.prune_record`` says what was done.

    Raises:
        ValueError: An argument is out of range, or a weight is NaN or infinite.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The checkpoint is missing, incomplete or damaged.

    Source: arXiv 2512.22671, section 3.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(
        ...     hidden_size=32,
        ...     intermediate_size=128,
        ...     num_hidden_layers=2,
        ...     num_attention_heads=4,
        ...     vocab_size=64,
        ... )
        >>> with TemporaryDirectory() as folder:
        ...     LlamaForCausalLM(tiny).save_pretrained(folder)
        ...     model = load_pruned(folder, prune_percent=40)
        >>> model.config.intermediate_size
        77
        >>> model.model.layers[0].mlp.down_proj.weight.shape
        torch.Size([32, 77])
        >>> model.prune_record.parameters_before, model.prune_record.parameters_after
        (37024, 27232)
    """
    import transformers

    prune_arguments = PruneArguments.taken_from(from_pretrained)
    auto_class = auto_class or transformers.AutoModelForCausalLM
    if dtype is not None:
        from_pretrained["dtype"] = dtype
    if device is not None:
        if from_pretrained.get("device_map") is not None:
            raise ValueError(
                f"device={device} and device_map={from_pretrained['device_map']} both say where "
                "to load: pass one."
            )
        from_pretrained["device_map"] = {"": device}
    return load_with_arguments(
        auto_class,
        pretrained,
        prune_arguments,
        from_pretrained,
        tokenizer=tokenizer,
    )


def load_with_arguments(
    auto_class: type,
    pretrained: str,
    prune_arguments: PruneArguments,
    from_pretrained: dict[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inspect: Callable[[LoadRequest], None] | None = None,
    known_scores: KnownScores | None = None,
) -> PreTrainedModel:
    """Load and prune; `load_pruned` with its arguments in groups.

    Args:
        auto_class: The transformers class to load with.
        pretrained: Folder or Hub name of the model.
        prune_arguments: What to prune.
        from_pretrained: Keyword arguments of ``auto_class.from_pretrained``.
        tokenizer: What reads calibration text; default: that of `pretrained`.
        inspect: Called with what is about to be loaded, before weights are read; may
            raise.
        known_scores: Scores of earlier loads; takes those of this one.
    """

    def load(request: LoadRequest) -> PreTrainedModel:
        if inspect is not None:
            inspect(request)
        return _load(request, tokenizer, known_scores)

    request = LoadRequest.resolve(
        auto_class, pretrained, prune_arguments, from_pretrained
    )
    return with_stored_widths(with_depth(request, tokenizer, known_scores), load)


def _load(
    request: LoadRequest,
    tokenizer: PreTrainedTokenizerBase | None,
    known_scores: KnownScores | None,
) -> PreTrainedModel:
    known = ScoreTable()
    if known_scores is not None and (key := request.scores_key()) is not None:
        known = known_scores.setdefault(key, known)
    request, known, declined = settled_request(request, known, tokenizer)
    plan, widths = request.plan, request.widths
    targets = widths.targets(plan)
    narrowed = widths.narrowed_config(targets)
    before = widths.parameters_before
    session = Session(plan, widths, targets, known)
    session.declined = declined or request.unreadable()
    if session.declined is None and request.needs_scores(known):
        session.declined = observe(request, known, tokenizer)
    if session.declined is None:
        with contextlib.closing(session), clear_errors(session, request):
            model = request.load(
                narrowed if session.changes_model else widths.original,
                checkpoint=session,
            )
            session.check_filled(model)
            if session.changes_model:
                widths.describe_layers(model.config, targets)
            choose_experts_implementation(model)
            model.prune_record = PruneRecord.of(  # type: ignore[assignment]
                plan,
                widths,
                before,
                count_parameters(model),
                session.kept(),
                known.calibration if plan.prunes else None,
            )
            warn_inexpressible(widths, targets)
            warn_misaligned(model, plan, widths, targets)
            return model
    request.check_prunable_in_memory(session.declined)
    if plan.changes_model:
        logger.warning(
            "%s is loaded in full and pruned in memory, because %s.",
            request.pretrained,
            session.declined,
        )
    if plan.prunes and plan.calibration is not None and tokenizer is None:
        tokenizer = request.load_tokenizer()
    scored = not plan.is_open and known.covers(request.ranked)
    if plan.prunes and request.rounds and not scored:
        stored = request.in_stored_dtype()
        if plan.calibration is None:
            stored = stored.unplaced()
        score_loaded(plan, stored.load_whole(), tokenizer, known)
    return carry_out(plan, request.load_whole(), tokenizer=tokenizer, known=known)
