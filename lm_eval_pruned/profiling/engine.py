"""A model in vLLM, as far as a profile asks for it.

Times are those of a client of the engine: they hold what its scheduler and the way to its
processes take. Memory is in other processes, so it is not measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval_pruned.profiling.prompts import Batch


class EngineModel:
    """Loads like `lm_eval_pruned.load_pruned`, through the model type ``pruned-vllm``.

    vLLM chooses the device itself, and the dtype where it is None.
    """

    def __init__(self, pretrained: str, *, device: str, dtype: Any, **given: Any):
        import torch
        from lm_eval.api.registry import get_model

        self._lm: Any = get_model("pruned-vllm")(
            pretrained,
            dtype=dtype or "auto",
            # A prompt that was seen before would cost nothing.
            enable_prefix_caching=False,
            # They hold the time of the first token.
            disable_log_stats=False,
            **given,
        )
        self.config = self._lm.model.llm_engine.model_config.hf_config
        self.device = torch.device(device)

    def get_memory_footprint(self) -> int:
        """Return the bytes of weights and buffers in all processes of the engine."""
        return sum(self._lm.model.collective_rpc("model_bytes"))

    def close(self) -> None:
        """End the engine."""
        self._lm.close()

    def timed_generation(
        self,
        batch: Batch,
        max_new_tokens: int,
        *,
        fixed: bool,
        clock: Callable[[], float],
    ) -> dict[str, Any]:
        """Generate greedily; see `lm_eval_pruned.profiling.measure.generate`."""
        from vllm import SamplingParams, TokensPrompt

        settings = SamplingParams(
            temperature=0, max_tokens=max_new_tokens, ignore_eos=fixed, detokenize=False
        )
        prompts = [
            TokensPrompt(prompt_token_ids=ids[mask.bool()].tolist())
            for ids, mask in zip(batch.ids, batch.mask, strict=True)
        ]
        start = clock()
        outputs = self._lm.model.generate(prompts, settings, use_tqdm=False)
        total = clock() - start
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        return {
            "rows": len(outputs),
            "prompt_tokens": int(batch.mask.sum()),
            "output_tokens": sum(lengths),
            "steps": max(lengths),
            "first": max(output.metrics.first_token_latency for output in outputs),
            "total": total,
        }
