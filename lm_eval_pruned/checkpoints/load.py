"""Loading a pruned model: whole as it is stored, cut in memory, then cast and placed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.pruning.argument_values import exact
from lm_eval_pruned.pruning.arguments import PruneArguments, take_prune_arguments
from lm_eval_pruned.pruning.measuring import LoadedModel, check_weights
from lm_eval_pruned.pruning.record import PruneRecord
from lm_eval_pruned.pruning.slicing import carry_out, finish


if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.arguments import Number
    from lm_eval_pruned.pruning.curves import Sensitivity


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

    prune_arguments = PruneArguments(**take_prune_arguments(arguments))
    if dtype is not None:
        arguments["dtype"] = dtype
    if device is not None:
        if arguments.get("device_map") is not None:
            raise ValueError(
                f"device={device} and device_map={arguments['device_map']} both say where to "
                "load: pass one."
            )
        arguments["device_map"] = {"": device}
    auto_class = auto_class or transformers.AutoModelForCausalLM
    checkpoint = Checkpoint.of(pretrained, prune_arguments, arguments, auto_class)
    return load_checkpoint(checkpoint, tokenizer)


def load_checkpoint(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedModel:
    """Load the model of a checkpoint, prune it, then cast and place what is left.

    `tokenizer` reads calibration text; default: that of the model.
    """
    checkpoint.check_text()
    checkpoint = checkpoint.with_stored_widths()
    cut = checkpoint.cut
    if cut.plan.prunes:
        stored = stored_model(checkpoint, tokenizer)
        carry_out(stored, cut)
        model = checkpoint.place(stored.model)
    else:
        model = checkpoint.load_whole()
        check_weights(model)
        model.prune_record = PruneRecord(cut.widths, cut.plan)  # type: ignore[assignment]
    finish(model)
    return model


def stored_model(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None = None
) -> LoadedModel:
    """Load the unpruned model of `Checkpoint.with_stored_widths`, with what reads its text.

    `tokenizer` is that of `load_checkpoint`.
    """
    arguments, device = checkpoint.cut.plan.arguments, checkpoint.device()
    # Only what text says is kept for later loads.
    content = checkpoint.content_key() if arguments.calibration else None
    model = checkpoint.load_stored()
    if arguments.calibration is not None and tokenizer is None:
        tokenizer = checkpoint.load_tokenizer()
    return LoadedModel(model, tokenizer, arguments, device, content)


def measure_sensitivity(
    checkpoint: Checkpoint, prune_percents: Iterable[Number] = (10, 25, 50)
) -> Sensitivity:
    """Return what cutting a single layer costs, for each layer and width.

    Args:
        checkpoint: The model, and how it is cut: its arguments have ``allocation=sensitivity``, and
            any size, which does not count.
        prune_percents: Shares of neurons to remove, as ``prune_percent`` counts.

    Raises:
        ValueError: An argument is out of range, the text cannot be used, or the
            checkpoint is damaged.
        UnsupportedModelError: Layers of the model cannot be compared.
        OSError: A file of the checkpoint is missing.
    """
    shares = sorted({exact("prune_percents", p, "25") for p in prune_percents})
    if not shares or not 0 < shares[0] <= shares[-1] < 100:
        raise ValueError(
            f"prune_percents={' '.join(f'{float(s):g}' for s in shares)} leaves nothing to measure: "
            "name shares between 0 and 100, such as 10 25 50."
        )
    checkpoint.check_text()
    stored = stored_model(checkpoint.with_stored_widths())
    check_weights(stored.model)
    return stored.curves(shares)
