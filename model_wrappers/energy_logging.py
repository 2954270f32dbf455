"""HFLM that measures the energy of each type of request while the harness runs it.

Independent of pruning: it knows `PrefixHFLM` and `energy_log`, nothing else. With ``energy``
off, neither codecarbon nor `energy_log` is imported.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.model_wrappers.batching.attention_support import is_encoder_decoder
from lm_eval_pruned.model_wrappers.batching.generation import (
    count_generated,
    end_tokens,
)
from lm_eval_pruned.model_wrappers.energy_arguments import open_energy_log
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lm_eval.api.instance import Instance

    from lm_eval_pruned.model_wrappers.energy_log import EnergyLog

    _Run = Callable[[list[Instance]], list]

#: Tokens of the pass that comes before the first request, on which nothing is counted.
_WARM_UP_TOKENS = 8

eval_logger = logging.getLogger("lm_eval.models.energy_logging")


class EnergyLoggingHFLM(PrefixHFLM):
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
        """`PrefixHFLM` with energy readings under ``config.energy`` of the results file.

        Args:
            *args: As in `PrefixHFLM`.
            energy: Measure wall time, tokens and energy of each request type.
            energy_per_task: Run the requests of each task as a window of their own.
            energy_idle_seconds: First measure the idle machine with the model loaded,
                for so many seconds, and report net energy beside gross.
            energy_country: ISO 3166 alpha-3 code of the country whose carbon intensity
                turns energy into emissions. Without it there are no emissions.
            energy_online: Let codecarbon ask the network for the country instead.
            **kwargs: Everything `PrefixHFLM` takes.

        Raises:
            ValueError: An argument is out of range, or needs ``energy=true``.
        """
        self._energy = open_energy_log(
            energy=energy,
            energy_per_task=energy_per_task,
            energy_idle_seconds=energy_idle_seconds,
            energy_country=energy_country,
            energy_online=energy_online,
        )
        self._energy_per_task = energy_per_task
        self._warmed_up = False
        super().__init__(*args, **kwargs)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        run = partial(super().loglikelihood, disable_tqdm=disable_tqdm)
        return self._measured("loglikelihood", run, requests)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        run = partial(super().loglikelihood_rolling, disable_tqdm=disable_tqdm)
        return self._measured("loglikelihood_rolling", run, requests)

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        run = partial(super().generate_until, disable_tqdm=disable_tqdm)
        return self._measured("generate_until", run, requests)

    def get_model_info(self) -> dict[str, Any]:
        """Return HFLM's model information and, if it is on, ``energy``."""
        info = super().get_model_info()
        if self._energy is None:
            return info
        self._energy.stop()
        eval_logger.info("Energy:\n%s", self._energy.as_table())
        return {**info, "energy": self._energy.as_dict()}

    def set_cache_hook(self, cache_hook: Any) -> None:
        super().set_cache_hook(cache_hook)
        if self._energy is not None and cache_hook.dbdict is not None:
            self._energy.count_cache_reads(cache_hook.dbdict)

    def barrier(self) -> None:
        """Wait for every process; the harness does so after each type of request.

        The machines' windows close here, where all work of that type is done.
        """
        super().barrier()
        if self._energy is None or self.world_size <= 1:
            return
        shares = self.gather_object(self._energy.close(), dst=0)
        if self.rank == 0:
            self._energy.record(shares)

    def _measured(self, request_type: str, run: _Run, requests: list[Instance]) -> list:
        if self._energy is None:
            return run(requests)
        self._energy.runs_on_gpu(bool(self._accelerators()))
        self._energy.measure_idle()
        self._warm_up()
        with self._energy.window(request_type, len(requests), self):
            if not self._energy_per_task:
                answers = run(requests)
            elif self.world_size > 1:
                # Processes may hold requests of different tasks, and rolling requests
                # wait for each other.
                self._energy.note(
                    "energy per task is not measured in runs of several processes"
                )
                answers = run(requests)
            else:
                answers = self._task_by_task(self._energy, request_type, run, requests)
        if self.world_size <= 1:
            self._energy.record([self._energy.close()])
        return answers

    def _task_by_task(
        self, energy: EnergyLog, request_type: str, run: _Run, requests: list[Instance]
    ) -> list:
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(str(request.task_name), []).append(place)
        answers: list = [None] * len(requests)
        for task, indices in places.items():
            with energy.task_window(task, request_type, len(indices), self):
                part = run([requests[i] for i in indices])
            for i, answer in zip(indices, part, strict=True):
                answers[i] = answer
        return answers

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        with self._set_up("batch_size_search"):
            return super()._detect_batch_size(*args, **kwargs)

    def _warm_up(self) -> None:
        """Send a few tokens through the model: the first pass ever loads kernels and weights."""
        if self._warmed_up:
            return
        self._warmed_up = True
        with self._set_up("warm_up"):
            tokens = torch.ones(
                (1, min(_WARM_UP_TOKENS, self.max_length)),
                dtype=torch.long,
                device=self.device,
            )
            if is_encoder_decoder(self):
                self._model_call(tokens, attn_mask=tokens, labels=tokens)
            else:
                self._model_call(tokens)

    @contextlib.contextmanager
    def _set_up(self, purpose: str) -> Iterator[None]:
        """Measure what no request asked for apart from the requests, and count none of it."""
        if self._energy is None:
            yield
            return
        self._wait_for_accelerators()
        before = replace(self.token_counts)
        with self._energy.set_up(purpose):
            yield
            self._wait_for_accelerators()
        self.token_counts = before

    def _accelerators(self) -> set[torch.device]:
        return {
            parameter.device
            for parameter in self.model.parameters()
            if parameter.device.type not in ("cpu", "meta")
        }

    def _wait_for_accelerators(self) -> None:
        """Let work that was only sent off be done before a meter is read."""
        for device in self._accelerators():
            torch.accelerator.synchronize(device)

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
        if self._energy is None:
            return super()._model_generate(
                context, max_length, stop, **generation_kwargs
            )
        output = super()._model_generate(context, max_length, stop, **generation_kwargs)
        mask = generation_kwargs.get("attention_mask")
        prompt = context.numel() if mask is None else int(mask.sum())
        start = 1 if is_encoder_decoder(self) else context.shape[1]
        generated = count_generated(output[:, start:], end_tokens(self.model))
        self.token_counts.prompt += prompt
        self.token_counts.generated += generated
        # The last token of a row is never fed back.
        self.token_counts.processed += prompt + generated - context.shape[0]
        return output
