"""VLLM that measures the energy of each type of request while the harness runs it.

Meters read the machine, so the processes of the engine are in them, and the engine itself
tells how many tokens it computed.
"""

from __future__ import annotations

from typing import Any

from lm_eval.models.vllm_causallms import VLLM

from lm_eval_pruned.model_wrappers.batching.token_counts import TokenCounts
from lm_eval_pruned.model_wrappers.energy_windows import (
    WARM_UP_TOKENS,
    EnergyLog,
    EnergyWindows,
)


class EnergyLoggingVLLM(EnergyWindows, VLLM):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """VLLM with the arguments ``energy...`` of `EnergyWindows`."""
        self.token_counts = TokenCounts()
        super().__init__(*args, **kwargs)

    def _meters(self, energy: EnergyLog) -> None:
        from vllm.platforms import current_platform

        if current_platform.is_cuda_alike():
            energy.monitor.required.add("gpu")
        if self.model_args.get("distributed_executor_backend") == "ray":
            energy.note("machines that Ray adds to this one are not metered")

    def _first_pass(self) -> None:
        self._model_generate([[self.eot_token_id] * WARM_UP_TOKENS])

    def _model_generate(
        self,
        requests: list[list[int]],
        generate: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        outputs = super()._model_generate(requests, generate, *args, **kwargs)
        counts = self.token_counts
        for tokens, output in zip(requests, outputs, strict=True):
            counts.prompt += len(tokens)
            counts.processed += len(tokens) - (output.num_cached_tokens or 0)
            if generate:
                generated = len(output.outputs[0].token_ids)
                counts.generated += generated
                # The last token is never fed back.
                counts.processed += max(generated - 1, 0)
        return outputs
