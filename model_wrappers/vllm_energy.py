"""VLLM that measures the energy of each type of request while the harness runs it.

The counterpart of `lm_eval_pruned.model_wrappers.energy_logging` for an engine: meters read the
machine, so the processes of the engine are in them, and the engine itself tells how many
tokens it computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.models.vllm_causallms import VLLM

from lm_eval_pruned.model_wrappers.batching.token_counts import TokenCounts
from lm_eval_pruned.model_wrappers.energy_windows import EnergyWindows


if TYPE_CHECKING:
    from lm_eval_pruned.model_wrappers.energy_log import EnergyLog


class EnergyLoggingVLLM(EnergyWindows, VLLM):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """VLLM with the arguments ``energy...`` of `EnergyWindows`."""
        self.token_counts = TokenCounts()
        super().__init__(*args, **kwargs)

    def _meters(self, energy: EnergyLog) -> None:
        from vllm.platforms import current_platform

        energy.runs_on_gpu(current_platform.is_cuda_alike())
        if self.model_args.get("distributed_executor_backend") == "ray":
            energy.note("machines that Ray adds to this one are not metered")

    def _first_pass(self, energy: EnergyLog) -> None:
        with energy.set_up("warm_up"):
            super()._model_generate([[self.eot_token_id] * 8])

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
