"""A model in vLLM, as far as a profile asks for it; times are those of a client of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import BatchEncoding


class EngineModel:
    """Loads like `lm_eval_pruned.load_pruned`; vLLM chooses the device itself."""

    #: None: what it allocates is in other processes.
    device = None

    def __init__(self, pretrained: str, *, device: str, dtype: Any, **given: Any):
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
        self.close = self._lm.close

    def get_memory_footprint(self) -> int:
        """Return the bytes of weights and buffers in all processes of the engine."""
        return sum(self._lm.model.collective_rpc("model_bytes"))

    def timed_generation(
        self,
        batch: BatchEncoding,
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
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        prompts = [
            TokensPrompt(prompt_token_ids=row[kept].tolist()) for row, kept in rows
        ]
        start = clock()
        outputs = self._lm.model.generate(prompts, settings, use_tqdm=False)
        total = clock() - start
        lengths = [len(output.outputs[0].token_ids) for output in outputs]
        return {
            "rows": len(outputs),
            "prompt_tokens": int(batch["attention_mask"].sum()),
            "output_tokens": sum(lengths),
            "steps": max(lengths),
            "first": max(output.metrics.first_token_latency for output in outputs),
            "total": total,
        }
