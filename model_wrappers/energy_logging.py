"""HFLM that measures the energy of each type of request while the harness runs it.

Independent of pruning: it knows HFLM and `lm_eval_pruned.energy.monitor`, nothing else. With
``energy`` off, neither codecarbon nor `lm_eval_pruned.energy.monitor` is imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from lm_eval_pruned.model_wrappers.batching.flags import check_flag
from lm_eval_pruned.model_wrappers.batching.generation import (
    count_generated,
    end_tokens,
)
from lm_eval_pruned.model_wrappers.batching.token_counts import TokenCounts


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lm_eval.api.instance import Instance

    from lm_eval_pruned.energy.monitor import EnergyMonitor, EnergyReading, Joules

#: Version of the block under ``config.energy``; raised when a key changes its meaning.
SCHEMA_VERSION = 2
#: Tokens of the pass that comes before the first request, on which nothing is counted.
_WARM_UP_TOKENS = 8

eval_logger = logging.getLogger("lm_eval.models.energy_logging")


class EnergyLoggingHFLM(HFLM):
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
        """HFLM with energy readings under ``config.energy`` of the results file.

        Args:
            *args: As in HFLM.
            energy: Measure wall time, tokens and energy of each request type.
            energy_per_task: Run the requests of each task as a window of their own.
            energy_idle_seconds: First measure the idle machine with the model loaded,
                for so many seconds, and report net energy beside gross.
            energy_country: ISO 3166 alpha-3 code of the country whose carbon intensity
                turns energy into emissions. Without it there are no emissions.
            energy_online: Let codecarbon ask the network for the country instead.
            **kwargs: Everything HFLM takes.

        Raises:
            ValueError: An argument is out of range, or needs ``energy=true``.
        """
        for name, value in {
            "energy": energy,
            "energy_per_task": energy_per_task,
            "energy_online": energy_online,
        }.items():
            check_flag(name, value)
        #: Running totals since the model was loaded; HFLM's tokens count if ``energy``.
        self.token_counts = TokenCounts()
        self._energy_per_task = energy_per_task
        self._energy: EnergyLog | None = None
        self._warmed_up = False
        if energy:
            self._energy = EnergyLog.from_arguments(
                energy_idle_seconds, energy_country, energy_online
            )
        else:
            for name, given in {
                "energy_per_task": energy_per_task,
                "energy_idle_seconds": energy_idle_seconds,
                "energy_country": energy_country,
                "energy_online": energy_online,
            }.items():
                if given:
                    raise ValueError(
                        f"{name}={given} measures nothing by itself: pass energy=true as well, "
                        "or leave it out."
                    )
        super().__init__(*args, **kwargs)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        return self._measured(
            "loglikelihood", super().loglikelihood, requests, disable_tqdm
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        return self._measured(
            "loglikelihood_rolling",
            super().loglikelihood_rolling,
            requests,
            disable_tqdm,
        )

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        return self._measured(
            "generate_until", super().generate_until, requests, disable_tqdm
        )

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

    def _measured(
        self,
        request_type: str,
        run: Callable[..., list],
        requests: list[Instance],
        disable_tqdm: bool,
    ) -> list:
        if self._energy is None:
            return run(requests, disable_tqdm=disable_tqdm)
        self._energy.runs_on_gpu(bool(self._accelerators()))
        self._energy.measure_idle()
        self._warm_up()
        with self._energy.window(request_type, len(requests), self):
            if not self._energy_per_task:
                answers = run(requests, disable_tqdm=disable_tqdm)
            elif self.world_size > 1:
                # Processes may hold requests of different tasks, and rolling requests
                # wait for each other.
                self._energy.note(
                    "energy per task is not measured in runs of several processes"
                )
                answers = run(requests, disable_tqdm=disable_tqdm)
            else:
                answers = self._task_by_task(request_type, run, requests, disable_tqdm)
        if self.world_size <= 1:
            self._energy.record([self._energy.close()])
        return answers

    def _task_by_task(
        self,
        request_type: str,
        run: Callable[..., list],
        requests: list[Instance],
        disable_tqdm: bool,
    ) -> list:
        assert self._energy is not None
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(str(request.task_name), []).append(place)
        answers: list = [None] * len(requests)
        for task, indices in places.items():
            with self._energy.task_window(task, request_type, len(indices), self):
                part = run([requests[i] for i in indices], disable_tqdm=disable_tqdm)
            for i, answer in zip(indices, part, strict=True):
                answers[i] = answer
        return answers

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        # Its passes belong to no request, and their tokens are counted nowhere.
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
            if self.backend == "seq2seq":
                self._model_call(tokens, attn_mask=tokens, labels=tokens)
            else:
                self._model_call(tokens)

    @contextlib.contextmanager
    def _set_up(self, purpose: str) -> Iterator[None]:
        """Measure what no request asked for apart from the requests."""
        if self._energy is None:
            yield
            return
        self._wait_for_accelerators()
        with self._energy.set_up(purpose):
            yield
            self._wait_for_accelerators()

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

    def _loglikelihood_tokens(self, requests: list, *args: Any, **kwargs: Any) -> list:
        if self._energy is None:
            return super()._loglikelihood_tokens(requests, *args, **kwargs)
        counts = self.token_counts
        counts.prompt += sum(
            min(len(context) + len(continuation), self.max_length + 1)
            for _, context, continuation in requests
        )
        if self.backend == "seq2seq":
            # The encoder reads each context; `_select_cont_toks` sees the decoder's part.
            counts.processed += sum(
                min(len(context), self.max_length) for _, context, _ in requests
            )
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

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
        counts = self.token_counts
        before = counts.processed
        output = super()._model_generate(context, max_length, stop, **generation_kwargs)
        mask = generation_kwargs.get("attention_mask")
        prompt = context.numel() if mask is None else int(mask.sum())
        start = context.shape[1] if self.backend == "causal" else 1
        generated = count_generated(output[:, start:], end_tokens(self.model))
        counts.prompt += prompt
        counts.generated += generated
        if counts.processed == before:
            # The last token of a row is never fed back.
            counts.processed += prompt + generated - context.shape[0]
        return output


@dataclass
class Share:
    """What one process did in one window, or in several added up.

    Attributes:
        request_type: ``loglikelihood``, ``loglikelihood_rolling`` or ``generate_until``;
            None if the process had nothing to do.
        requests: Requests that reached the model, with the repeats of the harness.
        tokens: Tokens of these requests.
        reading: Energy of the machine; None in a process that is not the one to meter it.
        cached: Answers from the harness's cache since the last share.
        set_up: What was measured apart, by purpose: ``warm_up``, ``batch_size_search``.
        idle: The idle reading of the machine; None without one.
        idle_joules: What the machine would have used in the time of `reading` if idle;
            None without an idle reading.
    """

    request_type: str | None = None
    requests: int = 0
    tokens: TokenCounts = field(default_factory=TokenCounts)
    reading: EnergyReading | None = None
    cached: int = 0
    set_up: dict[str, EnergyReading] = field(default_factory=dict)
    idle: EnergyReading | None = None
    idle_joules: Joules | None = None


class EnergyLog:
    """The readings of one evaluation of a model, and the block they become.

    The first request after the block was asked for begins the next evaluation.

    Args:
        monitor: Measures this machine; None in a process that is not the one to do so.
        idle_seconds: How long to measure the idle machine first, in seconds.
        sleep: Waits for so many seconds; for tests.
    """

    def __init__(
        self,
        monitor: EnergyMonitor | None,
        idle_seconds: float = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.monitor = monitor
        self.machines = 1
        self.cached = 0
        self.request_types: dict[str, Share] = {}
        self.tasks: dict[str, dict[str, Share]] = {}
        self._idle_seconds = idle_seconds
        self._idle: EnergyReading | None = None
        self._idle_machines: list[EnergyReading] = []
        self._apart: dict[str, EnergyReading] = {}
        self._sleep = sleep
        self._pending = Share()
        self._unreported_cached = 0
        self._notes: list[str] = []
        self._over = False

    @classmethod
    def from_arguments(
        cls, idle_seconds: Any, country: str | None, online: bool
    ) -> EnergyLog:
        """Check the arguments and start codecarbon in the background.

        Raises:
            ValueError: An argument is out of range.
        """
        from lm_eval_pruned.energy.codecarbon_meter import (
            CodecarbonMeter,
            check_country,
        )
        from lm_eval_pruned.energy.monitor import EnergyMonitor

        if (
            isinstance(idle_seconds, bool)
            or not isinstance(idle_seconds, (int, float))
            or not 0 <= idle_seconds < float("inf")
        ):
            raise ValueError(
                f"energy_idle_seconds={idle_seconds} is no time to wait: pass a number of "
                "seconds, such as 10, or 0."
            )
        if country is not None and online:
            raise ValueError(
                f"energy_country={country} and energy_online={online} both say where the "
                "machine is: pass one."
            )
        if country is not None:
            country = check_country(country)
        if not meters_the_machine():
            return cls(None, idle_seconds)
        monitor = EnergyMonitor(CodecarbonMeter(country, online))
        monitor.start_in_background()
        return cls(monitor, idle_seconds)

    def note(self, text: str) -> None:
        """Add a sentence to the block, once, and to the log."""
        if text not in self._notes:
            self._notes.append(text)
            eval_logger.warning("Energy: %s.", text)

    def count_cache_reads(self, answers: Any) -> None:
        """Count the answers that are read from the harness's cache.

        Its `CachingLM` keeps such requests to itself, so reading is the one thing that
        can be seen of them.
        """
        base = type(answers)
        log = self

        class CountingReads(base):  # type: ignore[misc, valid-type]
            def __getitem__(self, key: Any) -> Any:
                answer = super().__getitem__(key)
                log._begin()
                log._unreported_cached += 1
                return answer

        try:
            answers.__class__ = CountingReads
        except TypeError:
            self.note("answers from the cache could not be counted")

    def begin(self) -> None:
        """Forget the requests so far; what the idle machine uses stays known."""
        self.cached = self._unreported_cached = 0
        self.request_types, self.tasks = {}, {}

    def runs_on_gpu(self, yes: bool) -> None:
        """Say whether the model does: energy without that of the GPU is then no total."""
        if yes and self.monitor is not None:
            self.monitor.required.add("gpu")

    def measure_idle(self) -> None:
        """Measure the idle machine, the first time this is called."""
        seconds, self._idle_seconds = self._idle_seconds, 0
        if not seconds:
            return
        if self.monitor is None:
            # The other processes of a machine keep still as well.
            self._sleep(seconds)
            return
        self.monitor.begin_window("idle")
        self._sleep(seconds)
        self._idle = self.monitor.end_window("idle")
        self._idle_machines = [self._idle]

    @contextlib.contextmanager
    def set_up(self, purpose: str) -> Iterator[None]:
        """Measure something that is in no window of requests."""
        from lm_eval_pruned.energy.monitor import add_up

        if self.monitor is None:
            yield
            return
        self.monitor.begin_window(purpose)
        try:
            yield
        finally:
            reading = self.monitor.end_window(purpose, apart=True)
        before = self._apart.get(purpose)
        self._apart[purpose] = add_up([before, reading]) if before else reading

    @contextlib.contextmanager
    def window(self, request_type: str, requests: int, lm: Any) -> Iterator[None]:
        """Measure the requests of one type; `close` ends the window."""
        self._begin()
        if self._pending.request_type is not None:
            self.record([self.close()])
        before = replace(lm.token_counts)
        if self.monitor is not None:
            self.monitor.begin_window(request_type)
        try:
            yield
        except BaseException:
            self._apart = {}
            if self.monitor is not None:
                self.monitor.end_window(request_type)
            raise
        self._pending = Share(request_type, requests, lm.token_counts - before)

    def close(self) -> Share:
        """End the window of this process and return its share."""
        share, self._pending = self._pending, Share()
        share.cached, self._unreported_cached = self._unreported_cached, 0
        if self.monitor is not None and share.request_type is not None:
            share.reading = self.monitor.end_window(share.request_type)
            share.set_up, self._apart = self._apart, {}
            share.idle, share.idle_joules = self._idle, self._as_if_idle(share.reading)
        return share

    def _as_if_idle(self, reading: EnergyReading | None) -> Joules | None:
        from lm_eval_pruned.energy.monitor import scale_idle

        if self._idle is None or reading is None:
            return None
        return scale_idle(self._idle, reading.seconds)

    @contextlib.contextmanager
    def task_window(
        self, task: str, request_type: str, requests: int, lm: Any
    ) -> Iterator[None]:
        """Measure the requests of one type of one task."""
        before = replace(lm.token_counts)
        name = f"{task} {request_type}"
        if self.monitor is not None:
            self.monitor.begin_window(name)
        reading = None
        try:
            yield
        finally:
            if self.monitor is not None:
                reading = self.monitor.end_window(name)
        types = self.tasks.setdefault(task, {})
        share = Share(
            request_type,
            requests,
            lm.token_counts - before,
            reading,
            idle_joules=self._as_if_idle(reading),
        )
        types[request_type] = _added(types.get(request_type), share)

    def record(self, shares: list[Share]) -> None:
        """Add what the processes did side by side."""
        from lm_eval_pruned.energy.monitor import add_up

        self.cached += sum(share.cached for share in shares)
        busy = [share for share in shares if share.request_type is not None]
        if not busy:
            return
        readings = [share.reading for share in busy if share.reading is not None]
        self.machines = max(self.machines, len(readings))
        request_type = busy[0].request_type
        assert request_type is not None
        idle = [share.idle for share in busy if share.idle is not None]
        if idle:
            self._idle_machines = idle
        whole = Share(
            request_type,
            sum(share.requests for share in busy),
            sum((share.tokens for share in busy), TokenCounts()),
            add_up(readings, at_once=True) if readings else None,
            set_up=_added_set_up(busy, at_once=True),
            idle_joules=_added_idle([s for s in busy if s.reading is not None]),
        )
        self.request_types[request_type] = _added(
            self.request_types.get(request_type), whole
        )

    def stop(self) -> None:
        """End the evaluation: stop the meter. A later request begins another one."""
        self.cached += self._unreported_cached
        self._unreported_cached = 0
        if self.monitor is not None:
            self.monitor.stop()
        self._over = True

    def _begin(self) -> None:
        """Forget an evaluation that is over: a model may be evaluated many times."""
        if self._over:
            self._over = False
            self.request_types, self.tasks = {}, {}
            self.cached, self.machines, self._notes = 0, 1, []

    def as_dict(self) -> dict[str, Any]:
        """Return the block for the results file. None is *not measured*."""
        from lm_eval_pruned.energy.monitor import EnergyReading

        idle = self.idle
        meter = self.monitor.describe() if self.monitor is not None else None
        failures = self.monitor.failures if self.monitor is not None else []
        block: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "status": self._status(meter is not None),
            "meter": meter and meter.name,
            "scope": meter and meter.scope,
            "resolution_seconds": meter and meter.resolution_seconds,
            "sources": meter
            and {
                name: {"kind": source.kind, "description": source.description}
                for name, source in meter.sources.items()
            },
            "hardware": meter and meter.hardware,
            "country": meter and meter.country,
            "machines": self.machines,
            "cached_answers": self.cached,
            "idle": idle and idle.as_dict(),
            "set_up": self._set_up_as_dict(),
            "request_types": {
                name: self._as_dict(share) for name, share in self.request_types.items()
            },
            "total": self._as_dict(self.total()),
        }
        if self.tasks:
            block["tasks"] = {
                task: {name: self._as_dict(share) for name, share in types.items()}
                for task, types in self.tasks.items()
            }
        negative = [
            name
            for name, record in block["request_types"].items()
            if any(
                joules is not None and joules < 0
                for joules in (record.get("net_joules") or {}).values()
            )
        ]
        if negative:
            self.note(
                f"net energy of {', '.join(negative)} is negative: the machine drew more while "
                "it was measured as idle, so that reading is no baseline"
            )
        notes = [*failures, *self._notes]
        if self.monitor is None:
            notes.append("another process of this machine meters it")
        for reading in (idle, *(s.reading for s in self.request_types.values())):
            notes += reading.notes if isinstance(reading, EnergyReading) else ()
        block["notes"] = list(dict.fromkeys(notes))
        return block

    @property
    def idle(self) -> EnergyReading | None:
        """All machines together at idle; None where that was not asked for."""
        from lm_eval_pruned.energy.monitor import add_up

        machines = self._idle_machines
        return add_up(machines, at_once=True) if machines else None

    def _set_up_as_dict(self) -> dict[str, dict[str, Any]]:
        block: dict[str, dict[str, Any]] = {}
        for name, share in self.request_types.items():
            for purpose, reading in share.set_up.items():
                block.setdefault(purpose, {})[name] = reading.as_dict()
        return block

    def _status(self, metered: bool) -> str:
        if not metered or self.monitor is None:
            return "not measured"
        readings = [self.total().reading]
        if self._idle_machines:
            readings.append(self.idle)
        whole = all(r is not None and r.joules.total is not None for r in readings)
        return "partial" if self.monitor.failures or not whole else "ok"

    def total(self) -> Share:
        """Return all request types added up."""
        from lm_eval_pruned.energy.monitor import add_up

        shares = list(self.request_types.values())
        readings = [share.reading for share in shares if share.reading is not None]
        return Share(
            None,
            sum(share.requests for share in shares),
            sum((share.tokens for share in shares), TokenCounts()),
            add_up(readings) if len(readings) == len(shares) else None,
            idle_joules=_added_idle(shares),
        )

    def as_table(self) -> str:
        """Return the readings as a Markdown table; ``n/m`` is not measured."""
        columns = (
            "requests|number|prompt tokens|generated|processed|seconds|CPU J|GPU J|RAM J"
            "|total J|mean W|J/processed token|J/generated token"
        )
        lines = [f"|{columns}|", "|---" + "|--:" * columns.count("|") + "|"]
        rows = [*self.request_types.items(), ("total", self.total())]
        for name, share in rows:
            record = self._as_dict(share)
            joules = record["joules"] or {}
            figures = [
                record["seconds"],
                *(joules.get(part) for part in ("cpu", "gpu", "ram", "total")),
                record["mean_watts"],
                record["joules_per_processed_token"],
                record["joules_per_generated_token"],
            ]
            lines.append(
                f"|{name}|{share.requests:,}|{share.tokens.prompt:,}|{share.tokens.generated:,}"
                f"|{share.tokens.processed:,}|"
                + "|".join("n/m" if f is None else f"{f:,.4g}" for f in figures)
                + "|"
            )
        for purpose, readings in self._set_up_as_dict().items():
            for name, reading in readings.items():
                joules = reading["joules"]
                figures = [
                    reading["seconds"],
                    *(joules[part] for part in ("cpu", "gpu", "ram", "total")),
                    reading["mean_watts"],
                ]
                lines.append(
                    f"|{purpose.replace('_', ' ')} before {name}, in no other row|||||"
                    + "|".join("n/m" if f is None else f"{f:,.4g}" for f in figures)
                    + "|||"
                )
        meter = self.monitor.describe() if self.monitor is not None else None
        if meter is not None:
            lines += [
                f"{name.upper()}: {source.kind}, {source.description}."
                for name, source in meter.sources.items()
            ]
        if self.cached:
            lines.append(
                f"{self.cached:,} answers came from the cache and cost nothing."
            )
        return "\n".join(lines)

    def _as_dict(self, share: Share) -> dict[str, Any]:
        from lm_eval_pruned.energy.monitor import EnergyReading, ratio, subtract

        reading = share.reading or EnergyReading(None)
        tokens = share.tokens
        total = reading.joules.total
        record = {
            "requests": share.requests,
            "prompt_tokens": tokens.prompt,
            "generated_tokens": tokens.generated,
            "processed_tokens": tokens.processed,
            **reading.as_dict(),
            "joules_per_processed_token": ratio(total, tokens.processed),
            "joules_per_generated_token": ratio(total, tokens.generated)
            if share.request_type == "generate_until"
            else None,
        }
        if share.idle_joules is not None:
            record["idle_joules"] = share.idle_joules.as_dict()
            record["net_joules"] = subtract(reading.joules, share.idle_joules).as_dict()
        return record


def meters_the_machine() -> bool:
    """Whether this process is the one that meters its machine: the first of its launcher."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name]) == 0
    return True


def _added(share: Share | None, more: Share) -> Share:
    from lm_eval_pruned.energy.monitor import add_up

    if share is None:
        return more
    known = share.reading is not None and more.reading is not None
    return Share(
        more.request_type,
        share.requests + more.requests,
        share.tokens + more.tokens,
        add_up([share.reading, more.reading]) if known else None,  # type: ignore[list-item]
        set_up=_added_set_up([share, more]),
        idle_joules=_added_idle([share, more]),
    )


def _added_set_up(
    shares: list[Share], *, at_once: bool = False
) -> dict[str, EnergyReading]:
    from lm_eval_pruned.energy.monitor import add_up

    purposes = dict.fromkeys(name for share in shares for name in share.set_up)
    return {
        name: add_up(
            [share.set_up[name] for share in shares if name in share.set_up],
            at_once=at_once,
        )
        for name in purposes
    }


def _added_idle(shares: list[Share]) -> Joules | None:
    from lm_eval_pruned.energy.monitor import Joules, add_joules

    known = [share.idle_joules for share in shares]
    if all(joules is None for joules in known):
        return None
    return add_joules(joules or Joules() for joules in known)
