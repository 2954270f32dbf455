"""HFLM that measures the energy of each type of request while the harness runs it."""

from __future__ import annotations

from typing import Any

import torch

from lm_eval_pruned.model_wrappers.batching.attention_support import is_encoder_decoder
from lm_eval_pruned.model_wrappers.batching.generation import (
    count_generated,
    end_tokens,
)
from lm_eval_pruned.model_wrappers.energy_windows import WARM_UP_TOKENS, EnergyWindows
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM


class EnergyLoggingHFLM(EnergyWindows, PrefixHFLM):
    """`PrefixHFLM` with the arguments ``energy...`` of `EnergyWindows`."""

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's model information and, if it is on, ``energy``."""
        return {**super().get_model_info(), **self.energy_info()}

    def barrier(self) -> None:
        """Wait for every process; the harness does so after each type of request.

        The machines' windows close here, where all work of that type is done.
        """
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
        if is_encoder_decoder(self):
            self._model_call(tokens, attn_mask=tokens, labels=tokens)
        else:
            self._model_call(tokens)

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
        self,
        inps: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
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
        self,
        context: torch.Tensor,
        max_length: int,
        stop: list[str],
        **generation_kwargs: Any,
    ) -> torch.Tensor:
        output = super()._model_generate(context, max_length, stop, **generation_kwargs)
        if self._energy is not None:
            mask = generation_kwargs.get("attention_mask")
            prompt = context.numel() if mask is None else int(mask.sum())
            start = 1 if is_encoder_decoder(self) else context.shape[1]
            generated = count_generated(output[:, start:], end_tokens(self.model))
            self.token_counts.prompt += prompt
            self.token_counts.generated += generated
            # The last token of a row is never fed back.
            self.token_counts.processed += prompt + generated - context.shape[0]
        return output
