"""The model type ``pruned-hf``: the harness's ``hf`` with narrowed GLU-MLPs, and its energy."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.checkpoints.adapters import STAGES, check_adapter, check_kept
from lm_eval_pruned.checkpoints.configs import (
    argument_errors,
    clear_errors,
    quantising_arguments,
)
from lm_eval_pruned.checkpoints.load import check_divides, load_request
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.model_wrappers.batching.answer_paths import AnswerPaths
from lm_eval_pruned.model_wrappers.batching.attention_support import is_encoder_decoder
from lm_eval_pruned.model_wrappers.batching.generation import (
    count_generated,
    end_tokens,
)
from lm_eval_pruned.model_wrappers.energy_windows import WARM_UP_TOKENS, EnergyWindows
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM, check_arguments
from lm_eval_pruned.pruning.arguments import DECLARED, PruneArguments
from lm_eval_pruned.pruning.slicing import prune_loaded


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.record import PruneRecord

eval_logger = logging.getLogger("lm_eval.models.pruned_hf")


class EnergyLoggingHFLM(EnergyWindows, PrefixHFLM):
    """`PrefixHFLM` with the arguments ``energy...`` of `EnergyWindows`."""

    @property
    def keeps_tokens(self) -> bool:  # type: ignore[override]
        """Whether tokens go over to the next model, which spares it time and energy."""
        return self._energy is None

    def barrier(self) -> None:
        """Wait for all processes, as the harness does after each type of request; end its windows."""
        super().barrier()
        if self._energy is not None and self.world_size > 1:
            used = self.gather_object(self._energy.take(), dst=0)
            if self.rank == 0:
                self._energy.add(used)

    def _runs_on_gpu(self) -> bool:
        return bool(self._accelerators())

    def _first_pass(self) -> None:
        size = (1, min(WARM_UP_TOKENS, self.max_length))
        tokens = torch.ones(size, dtype=torch.long, device=self.device)
        decoded = tokens if is_encoder_decoder(self) else None
        self._model_call(tokens, attn_mask=decoded, labels=decoded)

    def _accelerators(self) -> set[torch.device]:
        devices = {parameter.device for parameter in self.model.parameters()}
        return {each for each in devices if each.type not in ("cpu", "meta")}

    def _wait_for_accelerators(self) -> None:
        for device in self._accelerators():
            torch.accelerator.synchronize(device)

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        with self._set_up("batch_size_search"):
            return super()._detect_batch_size(*args, **kwargs)

    def _model_call(
        self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None
    ) -> torch.Tensor:
        # What an encoder reads; `_select_cont_toks` sees the decoder's part.
        if self._energy is not None and attn_mask is not None:
            self.token_counts.processed += int(attn_mask.sum())
        return super()._model_call(inps, attn_mask=attn_mask, labels=labels)

    def _select_cont_toks(
        self,
        logits: torch.Tensor,
        contlen: int | None = None,
        inplen: int | None = None,
    ) -> torch.Tensor:
        # HFLM calls this once for each row that it sent through the model, with the
        # row's length before padding (the decoder's, in an encoder-decoder model).
        if self._energy is not None:
            self.token_counts.processed += inplen or contlen or 0
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        output = super()._model_generate(context, max_length, stop, **options)
        if self._energy is not None:
            mask = options.get("attention_mask")
            prompt = context.numel() if mask is None else int(mask.sum())
            start = 1 if is_encoder_decoder(self) else context.shape[1]
            generated = count_generated(output[:, start:], end_tokens(self.model))
            self.token_counts.prompt += prompt
            self.token_counts.generated += generated
            # The last token of a row is never fed back.
            self.token_counts.processed += prompt + generated - context.shape[0]
        return output


class PrunedHFLM(EnergyLoggingHFLM):
    # HFLM's, which sets them in ways that a type checker does not follow.
    AUTO_MODEL_CLASS: Any
    _model: Any

    _prune_record: PruneRecord
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
            **kwargs: The arguments of `lm_eval_pruned.pruning.arguments.PruneArguments`,
                everything HFLM takes, ``prefix_sharing`` and ``slot_refilling`` of
                `PrefixHFLM`, and the arguments ``energy...`` of `EnergyWindows`.

        Raises:
            ValueError: A size, the criterion or the model cannot be pruned as asked.
        """
        with argument_errors():
            self._prune_arguments = PruneArguments.taken_from(kwargs)
            if peft_stage not in (None, *STAGES) or (peft_stage and peft is None):
                raise ValueError(
                    f"peft_stage={peft_stage} says when peft is applied: pass peft=ADAPTER and one of "
                    f"{', '.join(STAGES)}, or leave peft_stage out."
                )
        self._peft_stage = peft_stage or "after"
        # HFLM passes what its config says under this name, and would pass ours beside it.
        check_arguments(type(self), {"quantization_config": quantization_config})
        self._quantisation = quantization_config
        super().__init__(pretrained, peft=peft, **kwargs)
        if not isinstance(self.pretrained, str):
            self._prune_in_memory()
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.device.type == "cpu":
            # HFLM shares documents out among processes on GPUs only.
            self._rank = accelerator.process_index
            self._world_size = accelerator.num_processes
        if self.rank == 0:
            eval_logger.info("Pruning:\n%s", self._prune_record.as_table())

    @classmethod
    def argument_names(cls) -> set[str]:
        """Return the names of all arguments but those that HFLM hands on to transformers."""
        return super().argument_names() | {*DECLARED}

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
            request = LoadRequest.resolve(
                auto_class, name, self._prune_arguments, from_pretrained
            )
            if from_pretrained.get("tp_plan") is not None:
                processes = int(os.environ.get("WORLD_SIZE", "1"))
                check_divides(request, processes, "tp_plan")
            quantising = quantising_arguments(kwargs)
            if merging is not None and quantising and request.plan.changes_model:
                raise ValueError(
                    f"{quantising[0]} quantises the model while it loads, but it has to be pruned "
                    f"afterwards, because {merging} adds to its weights first: export the pruned "
                    "model first (lm-eval-pruned prune), or leave the quantisation out."
                )
            if peft is not None:
                check_adapter(peft, request, self._peft_stage, revision)
            if merging is not None:
                request.check_text()
                return request.load()[0]
            model = load_request(request, self.tokenizer)
            self._note_pruning(model)
            if peft is not None:
                pruned = self._prune_record.as_dict()
                self._healing = check_kept(peft, pruned, revision)
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
            self._prune_in_memory()

    def _prune_in_memory(self) -> None:
        asked = self._prune_arguments
        self._note_pruning(prune_loaded(self._model, asked, self.tokenizer))

    def _note_pruning(self, model: PreTrainedModel) -> None:
        self._prune_record = model.prune_record  # type: ignore[assignment]
        self._config = model.config

    def begin_evaluation(self) -> None:
        """Begin the records in the results anew."""
        super().begin_evaluation()
        self.answer_paths = AnswerPaths()

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's model information, ``energy``, ``pruning`` and ``healing``."""
        info = {**super().get_model_info(), **self.energy_info()}
        info["pruning"] = self._prune_record.as_dict()
        if self._healing is not None:
            told = self._healing.items()
            info["healing"] = {name: v for name, v in told if name != "pruning"}
        return info
