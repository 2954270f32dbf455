"""VLLM that measures the energy of each type of request while the harness runs it.

The counterpart of `lm_eval_pruned.model_wrappers.energy_logging` for an engine: meters read the
machine, so the processes of the engine are in them, and the engine itself tells how many
tokens it computed.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

from lm_eval.models.vllm_causallms import VLLM

from lm_eval_pruned.model_wrappers.batching.token_counts import TokenCounts
from lm_eval_pruned.model_wrappers.energy_arguments import open_energy_log


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval.api.instance import Instance


eval_logger = logging.getLogger("lm_eval.models.energy_logging")


class EnergyLoggingVLLM(VLLM):
    def __init__(
        self,
        *args: Any,
        energy: bool = False,
        energy_per_task: bool = False,
        energy_idle_seconds: float = 0,
        energy_country: str | None = None,
        energy_online: bool = False,
        **kwargs: Any,
    ) -> None:
        """VLLM with the arguments ``energy...`` of `EnergyLoggingHFLM`."""
        self._energy = open_energy_log(
            energy=energy,
            energy_per_task=energy_per_task,
            energy_idle_seconds=energy_idle_seconds,
            energy_country=energy_country,
            energy_online=energy_online,
        )
        self.token_counts = TokenCounts()
        self._energy_per_task = energy_per_task
        self._warmed_up = False
        super().__init__(*args, **kwargs)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        run = functools.partial(super().loglikelihood, disable_tqdm=disable_tqdm)
        return self._measured("loglikelihood", run, requests)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        run = functools.partial(
            super().loglikelihood_rolling, disable_tqdm=disable_tqdm
        )
        return self._measured("loglikelihood_rolling", run, requests)

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        run = functools.partial(super().generate_until, disable_tqdm=disable_tqdm)
        return self._measured("generate_until", run, requests)

    def set_cache_hook(self, cache_hook: Any) -> None:
        super().set_cache_hook(cache_hook)
        if self._energy is not None and cache_hook.dbdict is not None:
            self._energy.count_cache_reads(cache_hook.dbdict)

    def begin_evaluation(self) -> None:
        """Begin the readings anew, for a model that answers several evaluations."""
        if self._energy is not None:
            self._energy.begin()

    def energy_info(self) -> dict[str, Any]:
        """Return the block ``energy`` of the results, if it is on."""
        if self._energy is None:
            return {}
        self._energy.stop()
        eval_logger.info("Energy:\n%s", self._energy.as_table())
        return {"energy": self._energy.as_dict()}

    def _measured(
        self,
        request_type: str,
        run: Callable[[list[Instance]], list],
        requests: list[Instance],
    ) -> list:
        energy = self._energy
        if energy is None:
            return run(requests)
        from vllm.platforms import current_platform

        energy.runs_on_gpu(current_platform.is_cuda_alike())
        if self.model_args.get("distributed_executor_backend") == "ray":
            energy.note("machines that Ray adds to this one are not metered")
        energy.measure_idle()
        if not self._warmed_up:
            self._warmed_up = True
            with energy.set_up("warm_up"):
                super()._model_generate([[self.eot_token_id] * 8])
        with energy.window(request_type, len(requests), self):
            answers: list = [None] * len(requests)
            for task, places in self._parts(requests).items():
                part = [requests[place] for place in places]
                if task is None:
                    answers = run(part)
                    continue
                with energy.task_window(task, request_type, len(part), self):
                    for place, answer in zip(places, run(part), strict=True):
                        answers[place] = answer
        energy.record([energy.close()])
        return answers

    def _parts(self, requests: list[Instance]) -> dict[str | None, list[int]]:
        """Return the places of what is measured together, by task where that was asked for."""
        parts: dict[str | None, list[int]] = {}
        for place, request in enumerate(requests):
            task = str(request.task_name) if self._energy_per_task else None
            parts.setdefault(task, []).append(place)
        return parts

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
