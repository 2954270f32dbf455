"""The model type ``pruned-hf``: `PrefixHFLM` with narrowed GLU-MLPs."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.adapters import STAGES, check_adapter, check_kept
from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.checkpoints.configs import (
    argument_errors,
    clear_errors,
    quantising_arguments,
)
from lm_eval_pruned.checkpoints.load import load_checkpoint
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.pruning.arguments import (
    DECLARED,
    PruneArguments,
    take_prune_arguments,
)
from lm_eval_pruned.pruning.slicing import prune_loaded


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.record import PruneRecord

eval_logger = logging.getLogger("lm_eval.models.pruned_hf")


class PrunedHFLM(PrefixHFLM):
    more_arguments = DECLARED
    # HFLM's, which sets them in ways that a type checker does not follow.
    AUTO_MODEL_CLASS: Any
    _model: Any

    _healing: dict[str, Any] | None = None

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        *,
        peft: str | None = None,
        peft_stage: str | None = None,
        quantization_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """HFLM whose GLU-MLPs are narrowed while the model loads.

        At most one of `ratio`, `prune_percent` and `intermediate_size`; none of
        them evaluates the model unpruned.

        Args:
            pretrained: As in HFLM. If omitted, SmolLM2-135M-Instruct.
            peft: As in HFLM.
            peft_stage: ``after`` (default): `peft` was trained on the pruned model and
                is applied to it. ``before``: it was trained on the full model, is
                merged into it, and the result is pruned in memory.
            quantization_config: How to quantise the pruned weights, as the dict of a
                transformers quantisation config. ``load_in_8bit``, ``load_in_4bit`` and
                ``bnb_4bit_...`` work as well.
            **kwargs: The arguments of `lm_eval_pruned.pruning.arguments.PruneArguments`, and
                everything `PrefixHFLM` takes.

        Raises:
            ValueError: A size, the criterion or the model cannot be pruned as asked.
        """
        with argument_errors():
            self._prune_arguments = PruneArguments(**take_prune_arguments(kwargs))
            if peft_stage not in (None, *STAGES) or (peft_stage and peft is None):
                raise ValueError(
                    f"peft_stage={peft_stage} says when peft is applied: pass peft=ADAPTER and one of "
                    f"{', '.join(STAGES)}, or leave peft_stage out."
                )
            self.check_values({"quantization_config": quantization_config})
        self._peft_stage = peft_stage or "after"
        # HFLM passes what its config says under this name, and would pass ours beside it.
        self._quantisation = quantization_config
        super().__init__(pretrained, peft=peft, **kwargs)
        if not isinstance(self.pretrained, str):
            prune_loaded(self._model, self._prune_arguments, self.tokenizer)
        self._prune_record: PruneRecord = self.model.prune_record  # type: ignore[assignment]
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.device.type == "cpu":
            # HFLM shares documents out among processes on GPUs only.
            self._rank = accelerator.process_index
            self._world_size = accelerator.num_processes
        if self.rank == 0:
            eval_logger.info("Pruning:\n%s", self._prune_record.as_table())

    def _get_config(self, pretrained: str, **kwargs: Any) -> None:
        with argument_errors(), clear_errors(pretrained):
            super()._get_config(pretrained, **kwargs)

    def _create_model(
        self,
        pretrained: str,
        delta: str | None = None,
        peft: str | None = None,
        **kwargs: Any,
    ) -> None:
        if self._quantisation is not None:
            kwargs["quantization_config"] = self._quantisation
        merging = "delta" if delta is not None else None
        if peft is not None and self._peft_stage == "before":
            merging = "peft_stage"
        auto_class, revision = self.AUTO_MODEL_CLASS, kwargs.get("revision")

        def load(name: str, **from_pretrained: Any) -> PreTrainedModel:
            arguments = self._prune_arguments
            # HFLM drops a device_map without parallelize, and moves the model afterwards.
            placed = any(from_pretrained.get(n) for n in ("device_map", "tp_plan"))
            device = None if placed else self.device
            checkpoint = Checkpoint.of(
                name, arguments, from_pretrained, auto_class, device
            )
            if from_pretrained.get("tp_plan") is not None:
                processes = int(os.environ.get("WORLD_SIZE", "1"))
                checkpoint.check_divides(processes, "tp_plan")
            quantising = quantising_arguments(kwargs)
            if merging is not None and quantising and checkpoint.cut.plan.prunes:
                raise ValueError(
                    f"{quantising[0]} quantises the model while it loads, but it has to be pruned "
                    f"afterwards, because {merging} adds to its weights first: export the pruned "
                    "model first (lm-eval-pruned prune), or leave the quantisation out."
                )
            if peft is not None:
                check_adapter(peft, checkpoint, self._peft_stage, revision)
            if merging is not None:
                checkpoint.check_text()
                return checkpoint.with_stored_widths().load_whole()
            model = load_checkpoint(checkpoint, self.tokenizer)
            if peft is not None:
                record: PruneRecord = model.prune_record  # type: ignore[assignment]
                self._healing = check_kept(peft, record.as_dict(), revision)
            return model

        # HFLM has no hook for the one call that loads, and compares the class afterwards.
        self.AUTO_MODEL_CLASS = SimpleNamespace(from_pretrained=load)
        try:
            super()._create_model(pretrained, delta=delta, peft=peft, **kwargs)
        finally:
            self.AUTO_MODEL_CLASS = auto_class
        if merging is not None:
            # The criterion has to see the sum of the weights.
            if peft is not None:
                self._model = self._model.merge_and_unload()
            prune_loaded(self._model, self._prune_arguments, self.tokenizer)
        self._config = self._model.config

    def get_model_info(self) -> dict[str, Any]:
        """Return that of `PrefixHFLM`, ``pruning`` and ``healing``."""
        info = super().get_model_info()
        info["pruning"] = self._prune_record.as_dict()
        if self._healing is not None:
            training = self._healing.items()
            info["healing"] = {k: v for k, v in training if k != "pruning"}
        return info
