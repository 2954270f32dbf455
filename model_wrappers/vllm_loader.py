"""The vLLM loader ``pruned``: GLU-MLPs are narrowed while vLLM reads the checkpoint.

Every process of vLLM calls `register` (entry-point group ``vllm.general_plugins``).
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader import (
    DefaultModelLoader,
    get_model_loader,
    register_model_loader,
)

from lm_eval_pruned.checkpoints.checkpoint import Checkpoint, tensors_of
from lm_eval_pruned.checkpoints.load import stored_model
from lm_eval_pruned.pruning.arguments import PruneArguments, take_prune_arguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError, text_config
from lm_eval_pruned.pruning.slicing import carry_out


if TYPE_CHECKING:
    from collections.abc import Generator

    from torch import Tensor, nn
    from transformers import PreTrainedModel

#: Name of the loader: ``--load-format pruned``.
LOAD_FORMAT = "pruned"


def engine_checkpoint(
    pretrained: str, arguments: PruneArguments, processes: int, **source: Any
) -> Checkpoint:
    """Return what an engine is to load, after everything that can be refused without its weights.

    `processes` share each MLP; `source` are the arguments of ``from_pretrained`` that name files.
    """
    checkpoint = Checkpoint.of(pretrained, arguments, source, AutoModelForCausalLM)
    checkpoint = checkpoint.with_stored_widths()
    check_buildable(checkpoint)
    if checkpoint.cut.plan.prunes:
        checkpoint.check_divides(processes, "tensor_parallel_size")
        checkpoint.check_text()
    return checkpoint


def check_buildable(checkpoint: Checkpoint) -> None:
    """Refuse what no engine can build from a config, except dense MLPs, which are rebuilt."""
    cut, plan, widths = checkpoint.cut, checkpoint.cut.plan, checkpoint.cut.widths
    if plan.is_open:
        raise UnsupportedModelError(
            f"allocation={plan.arguments.allocation} derives the widths from losses, but an engine "
            "needs them before it loads any weight: use --model pruned-hf, or export the pruned "
            "model first (lm-eval-pruned prune)."
        )
    experts = {mlp.name for mlp in widths.mlps if mlp.kind == "expert"}
    for name in cut.inexpressible:
        if name in experts:
            raise UnsupportedModelError(
                f"{plan.as_written() or 'The checkpoint'} gives {name} another width than the "
                f"other experts, but an engine builds all of them from {widths.keys[name]} in the "
                "config: prune all layers alike, or use --model pruned-hf."
            )


class PrunedModelLoader(DefaultModelLoader):
    """vLLM's own loader, which sees a checkpoint that was always narrow.

    ``model_loader_extra_config`` holds the arguments that `lm_eval_pruned.load_pruned`
    takes for pruning; what else is in it goes to vLLM's loader.
    """

    def __init__(self, load_config: Any) -> None:
        others = dict(load_config.model_loader_extra_config)
        self._prune_arguments = PruneArguments(**take_prune_arguments(others))
        super().__init__(
            dataclasses.replace(
                load_config, load_format="auto", model_loader_extra_config=others
            )
        )
        self._checkpoint: Checkpoint | None = None
        self._pruned: PreTrainedModel | None = None

    def load_model(
        self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any
    ) -> nn.Module:
        if model_config is not vllm_config.model_config:
            # A draft model, whose widths are none of this request.
            loader = get_model_loader(self.load_config)
            return loader.load_model(vllm_config, model_config, *args, **kwargs)
        checkpoint = engine_checkpoint(
            model_config.model,
            self._prune_arguments,
            vllm_config.parallel_config.tensor_parallel_size,
            revision=model_config.revision,
            trust_remote_code=model_config.trust_remote_code,
            cache_dir=self.load_config.download_dir,
        )
        if checkpoint.cut.plan.prunes:
            if self.load_config.safetensors_load_strategy == "prefetch":
                self._read_ahead(model_config)
            stored = stored_model(checkpoint)
            carry_out(stored, checkpoint.cut)
            self._pruned = stored.model
            checkpoint.as_stored(self._pruned)
        self._checkpoint = checkpoint
        narrow_config(checkpoint, model_config.hf_config)
        return super().load_model(vllm_config, model_config, *args, **kwargs)

    def _read_ahead(self, model_config: Any) -> None:
        """Have vLLM read the files into the page cache, from which transformers maps them."""
        source = self.Source(model_config.model, model_config.revision)
        weights = self._get_weights_iterator(source)
        # It starts reading all files, each process its share, when it is asked for a tensor.
        next(weights, None)
        weights.close()

    def create_model(
        self, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any
    ) -> nn.Module:
        model = super().create_model(vllm_config, model_config, *args, **kwargs)
        if self._checkpoint is not None:
            with set_current_vllm_config(vllm_config):
                build_odd_widths(self._checkpoint, model)
        return model

    def get_all_weights(
        self, model_config: Any, model: nn.Module
    ) -> Generator[tuple[str, Tensor], None, None]:
        if self._pruned is None:
            yield from super().get_all_weights(model_config, model)
            return
        pruned, self._pruned = self._pruned, None
        model.prune_record = pruned.prune_record
        yield from tensors_of(pruned)
        for source in getattr(model, "secondary_weights", ()):
            yield from self._get_weights_iterator(source)


def narrow_config(checkpoint: Checkpoint, config: Any) -> None:
    """Write the kept widths into the config that vLLM builds its model from."""
    cut, widths = checkpoint.cut, checkpoint.cut.widths
    narrowed = cut.config()
    if config.model_type != narrowed.model_type:
        # The class is handed the part of the config that is of text.
        config = text_config(config)
    for key in set(widths.keys.values()):
        try:
            value = key.get(config)
        except AttributeError:
            value = None
        # A model that is loaded again finds the config narrow.
        if value not in (key.get(widths.config), key.get(narrowed)):
            raise ValueError(
                f"vLLM's config of {checkpoint.pretrained} says {key}={value}, but the checkpoint's "
                f"says {key.get(widths.config)}: leave that out of hf_overrides, because the "
                "kept width is derived."
            )
    cut.copy_keys(narrowed, config)
    # vLLM looks up compiled code by a hash of all that is in its config.
    config.odd_widths = {name: cut.targets[name] for name in cut.inexpressible}


def build_odd_widths(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Rebuild the MLPs whose width the config of vLLM's `model` cannot hold, before it has weights."""
    cut, modules = checkpoint.cut, dict(model.named_modules())
    paths = {mlp.name: mlp.path for mlp in cut.widths.mlps}
    for name in cut.inexpressible:
        mlp = modules.get(paths[name])
        children = dict(mlp.named_children()) if mlp is not None else {}
        linears = {n: c for n, c in children.items() if isinstance(c, LinearBase)}
        if not linears or any(linear.quant_config for linear in linears.values()):
            raise UnsupportedModelError(
                f"{name} would have another width than its config says, which {type(model).__name__} "
                "of vLLM cannot build, or cannot build quantised: prune all layers alike, or use --model pruned-hf."
            )
        for child, linear in linears.items():
            setattr(mlp, child, _of_width(linear, cut.targets[name]))


def _of_width(linear: LinearBase, width: int) -> LinearBase:
    """Return a projection like `linear` from or to `width` neurons, without weights."""
    taken = inspect.signature(type(linear).__init__).parameters.keys()
    same = {name: getattr(linear, name) for name in taken - {"self", "bias"}}
    if isinstance(linear, RowParallelLinear):
        same["input_size"] = width
    elif isinstance(linear, MergedColumnParallelLinear):
        same["output_sizes"] = [width] * len(linear.output_sizes)
    else:
        same["output_size"] = width
    return type(linear)(bias=linear.has_bias, **same)


class PruneRecordExtension:
    """What a worker of vLLM reports about its model; see ``worker_extension_cls`` there."""

    def pruned_record(self) -> dict[str, Any]:
        """Return what was pruned, as results hold it and as a table for people."""
        record = self.get_model().prune_record  # type: ignore[attr-defined]
        return {"record": record.as_dict(), "table": record.as_table()}


def register() -> None:
    """Make the loader known to this process of vLLM."""
    register_model_loader(LOAD_FORMAT)(PrunedModelLoader)
