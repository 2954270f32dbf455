"""The energy readings of one evaluation of a model, and the block in the results."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.energy.codecarbon_meter import CodecarbonMeter, check_country
from lm_eval_pruned.energy.monitor import EnergyMonitor, meters_the_machine
from lm_eval_pruned.energy.readings import EnergyReading, Joules, add_up, scale_idle
from lm_eval_pruned.model_wrappers.batching.token_counts import TokenCounts
from lm_eval_pruned.model_wrappers.energy_share import (
    Share,
    added,
    added_idle,
    added_set_up,
)
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


#: Version of the block under ``config.energy``; raised when a key changes its meaning.
SCHEMA_VERSION = 2

eval_logger = logging.getLogger("lm_eval.models.energy_logging")


class EnergyLog:
    """The readings of one evaluation of a model, and the block they become.

    Whoever adds to it calls `begin_if_over` first.

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
        self.begin_if_over()
        base = type(answers)
        log = self

        class CountingReads(base):  # type: ignore[misc, valid-type]
            def __getitem__(self, key: Any) -> Any:
                answer = super().__getitem__(key)
                log.begin_if_over()
                log._unreported_cached += 1
                return answer

        try:
            answers.__class__ = CountingReads
        except TypeError:
            self.note("answers from the cache could not be counted")

    def begin(self) -> None:
        """Forget the evaluation so far; what the idle machine uses stays known."""
        self._over = False
        self.cached, self.machines, self._unreported_cached = 0, 1, 0
        self.request_types, self.tasks, self._notes = {}, {}, []

    def begin_if_over(self) -> None:
        """Forget an evaluation that `stop` ended: a model may be evaluated many times."""
        if self._over:
            self.begin()

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
        types[request_type] = added(types.get(request_type), share)

    def record(self, shares: list[Share]) -> None:
        """Add what the processes did side by side."""
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
            set_up=added_set_up(busy, at_once=True),
            idle_joules=added_idle([s for s in busy if s.reading is not None]),
        )
        self.request_types[request_type] = added(
            self.request_types.get(request_type), whole
        )

    def stop(self) -> None:
        """End the evaluation: stop the meter."""
        self.cached += self._unreported_cached
        self._unreported_cached = 0
        if self.monitor is not None:
            self.monitor.stop()
        self._over = True

    def as_dict(self) -> dict[str, Any]:
        """Return the block for the results file. None is *not measured*."""
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
                name: share.as_dict() for name, share in self.request_types.items()
            },
            "total": self.total().as_dict(),
        }
        if self.tasks:
            block["tasks"] = {
                task: {name: share.as_dict() for name, share in types.items()}
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
        shares = list(self.request_types.values())
        readings = [share.reading for share in shares if share.reading is not None]
        return Share(
            None,
            sum(share.requests for share in shares),
            sum((share.tokens for share in shares), TokenCounts()),
            add_up(readings) if len(readings) == len(shares) else None,
            idle_joules=added_idle(shares),
        )

    def as_table(self) -> str:
        """Return the readings as a Markdown table; ``n/m`` is not measured."""

        def written(values: Iterable[float | None]) -> Iterator[str]:
            return ("n/m" if each is None else f"{each:,.4g}" for each in values)

        columns = ["requests", "number", "prompt tokens", "generated", "processed"]
        columns += ["seconds", "CPU J", "GPU J", "RAM J", "total J", "mean W"]
        columns += ["J/processed token", "J/generated token"]
        rows = []
        for name, share in (*self.request_types.items(), ("total", self.total())):
            record = share.as_dict()
            joules = record["joules"] or {}
            figures = [
                record["seconds"],
                *(joules.get(part) for part in ("cpu", "gpu", "ram", "total")),
                record["mean_watts"],
                record["joules_per_processed_token"],
                record["joules_per_generated_token"],
            ]
            tokens = share.tokens
            counts = (share.requests, tokens.prompt, tokens.generated, tokens.processed)
            rows.append([name, *(f"{n:,}" for n in counts), *written(figures)])
        for purpose, readings in self._set_up_as_dict().items():
            for name, reading in readings.items():
                joules = reading["joules"]
                figures = [
                    reading["seconds"],
                    *(joules[part] for part in ("cpu", "gpu", "ram", "total")),
                    reading["mean_watts"],
                ]
                what = f"{purpose.replace('_', ' ')} before {name}, in no other row"
                rows.append([what, *[""] * 4, *written(figures), *[""] * 2])
        lines = [markdown_table(columns, rows)]
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
