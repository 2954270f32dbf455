"""The energy of each type of request to a model, and the block ``energy`` in its results."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM

from lm_eval_pruned.energy.meter import (
    CodecarbonMeter,
    EnergyMonitor,
    MeterDescription,
    check_country,
    meters_the_machine,
)
from lm_eval_pruned.energy.readings import EnergyReading, add_up, ratio
from lm_eval_pruned.model_wrappers.batching.fast_path import TokenCounts


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    #: What was used, by section of the block, such as ``set_up``, and the names within it.
    Windows = dict[tuple[str, ...], "Usage"]

#: Version of the block under ``config.energy``; raised when a key changes its meaning.
SCHEMA_VERSION = 2
#: Tokens of the pass that comes before the first request, on which nothing is counted.
WARM_UP_TOKENS = 8

eval_logger = logging.getLogger("lm_eval.models.energy_logging")


@dataclass
class Usage:
    """What one window used, or several added up.

    Attributes:
        requests: Requests that reached the model, with the repeats of the harness.
        reading: Energy of the machine; None in a process that is not the one to meter it.
    """

    requests: int = 0
    tokens: TokenCounts = field(default_factory=TokenCounts)
    reading: EnergyReading | None = None

    @classmethod
    def sum(cls, usages: list[Usage], *, at_once: bool = False) -> Usage:
        """Add what was used one after the other, or (`at_once`) by processes side by side."""
        readings = [usage.reading for usage in usages if usage.reading is not None]
        return cls(
            sum(usage.requests for usage in usages),
            sum((usage.tokens for usage in usages), TokenCounts()),
            add_up(readings, at_once=at_once) if readings else None,
        )

    def as_dict(self, idle: EnergyReading | None) -> dict[str, Any]:
        """Return the record for the results file. None is *not measured*."""
        reading = self.reading or EnergyReading()
        total, tokens = reading.joules.total, self.tokens
        return {
            "requests": self.requests,
            "prompt_tokens": tokens.prompt,
            "generated_tokens": tokens.generated,
            "processed_tokens": tokens.processed,
            **reading.as_dict(idle),
            "joules_per_processed_token": ratio(total, tokens.processed),
            "joules_per_generated_token": ratio(total, tokens.generated),
        }


def _merged(parts: Sequence[Windows], *, at_once: bool = False) -> Windows:
    return {
        key: Usage.sum(
            [windows[key] for windows in parts if key in windows], at_once=at_once
        )
        for key in dict.fromkeys(chain(*parts))
    }


class EnergyLog:
    """The windows of one evaluation of a model, and the block they become."""

    def __init__(
        self,
        monitor: EnergyMonitor,
        idle_seconds: float = 0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.monitor = monitor
        self._idle_seconds, self._sleep = idle_seconds, sleep
        # What this process used since it last met the others, and what all used before.
        self._since: Windows = {}
        self._all: Windows = {}
        self.begin()

    def begin(self) -> None:
        """Forget the evaluation so far; what the idle machine uses stays known."""
        self._since, self._all = (
            {key: usage for key, usage in windows.items() if key[0] == "idle"}
            for windows in (self._since, self._all)
        )
        self._is_over, self._machines = False, 1

    def measure_idle(self) -> None:
        """Measure the idle machine, the first time this is called."""
        if self._idle_seconds:
            # The processes that do not meter their machine keep still as well.
            with self.window("idle"):
                self._sleep(self._idle_seconds)
            self._idle_seconds = 0

    @contextlib.contextmanager
    def window(self, *key: str, lm: Any = None, requests: int = 0) -> Iterator[None]:
        """Measure what is done in a ``with`` block; forget it where that raises.

        `key` is where the block has it; the windows around one of ``set_up`` leave out its
        energy. `lm` takes the requests, and its ``token_counts`` rise.
        """
        before = lm and replace(lm.token_counts)
        self.monitor.begin_window(" ".join(key))
        yield
        reading = self.monitor.end_window(" ".join(key), apart=key[0] == "set_up")
        tokens = lm.token_counts - before if lm else TokenCounts()
        if self._is_over:
            self.begin()
        usage = Usage(requests, tokens, reading if self.monitor.meters else None)
        self._since = _merged([self._since, {key: usage}])

    def take(self) -> Windows:
        """Return what this process used since the last call."""
        used, self._since = self._since, {}
        return used

    def add(self, processes: list[Windows]) -> None:
        """Add what all processes, side by side, used since they last met."""
        machines = [any(u.reading for u in windows.values()) for windows in processes]
        self._machines = max(self._machines, sum(machines))
        self._all = _merged([self._all, _merged(processes, at_once=True)])

    def finish(self) -> dict[str, Any]:
        """End the evaluation; return its block for the results file. None is *not measured*."""
        self.add([self.take()])
        self.monitor.stop()
        self._is_over = True
        windows = dict(self._all)
        idle = windows.pop(("idle",), Usage()).reading
        types = [usage for key, usage in windows.items() if key[0] == "request_types"]
        total = Usage.sum(types or [Usage(reading=EnergyReading(0.0))])
        readings = [r for r in (total.reading, idle) if r is not None]
        of_readings = chain(*(reading.notes for reading in readings))
        notes = [*dict.fromkeys([*self.monitor.failures, *of_readings])]
        meter = self.monitor.describe()
        block: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "status": ("partial" if notes else "ok") if meter else "not measured",
            **{entry.name: None for entry in fields(MeterDescription)},
            **(asdict(meter) if meter else {}),
            "machines": self._machines,
            "idle": idle and idle.as_dict(),
            "set_up": {},
            "request_types": {},
            # Only a part of this energy was spent on generating.
            "total": {**total.as_dict(idle), "joules_per_generated_token": None},
            "notes": notes,
        }
        block["meter"] = block.pop("name")
        for key, usage in windows.items():
            if key[0] == "request_types":
                block["request_types"][key[1]] = usage.as_dict(idle)
            else:
                reading = usage.reading or EnergyReading()
                block["set_up"].setdefault(key[1], {})[key[2]] = reading.as_dict()
        net = (block["total"].get("net_joules") or {}).get("total")
        if net is not None and net < 0:
            notes.append(
                f"net energy is negative ({net:.3g} J): the machine drew more power while it was "
                "idle, so that reading is no baseline"
            )
            eval_logger.warning("Energy: %s.", notes[-1])
            block["status"] = "partial"
        return block


class EnergyWindows(TemplateLM):
    """Measures each type of request to the model of the harness that follows among the bases."""

    token_counts: TokenCounts

    def __init__(
        self,
        *args: Any,
        energy: bool = False,
        energy_idle_seconds: float = 0,
        energy_country: str | None = None,
        **kwargs: Any,
    ) -> None:
        """A model with energy readings under ``config.energy`` of the results file.

        Args:
            *args, **kwargs: Those of the model.
            energy: Measure wall time, tokens and energy of each request type.
            energy_idle_seconds: First measure the idle machine for this many seconds, and also
                report net energy.
            energy_country: ISO 3166 alpha-3 code of the country whose carbon intensity
                turns energy into emissions, which are reported only with it.

        Raises:
            ValueError: An argument is out of range, or needs ``energy=true``.
        """
        wait, country = energy_idle_seconds, energy_country
        if type(wait) not in (int, float) or not 0 <= wait < float("inf"):
            raise ValueError(
                f"energy_idle_seconds={wait} is not a number of seconds: pass one such as 10, "
                "or 0."
            )
        for name, value in {"idle_seconds": wait, "country": country}.items():
            if value and not energy:
                raise ValueError(
                    f"energy_{name}={value} measures nothing by itself: pass energy=true as "
                    "well, or leave it out."
                )
        self._energy: EnergyLog | None = None
        if energy:
            country = None if country is None else check_country(country)
            meter = CodecarbonMeter(country) if meters_the_machine() else None
            self._energy = EnergyLog(EnergyMonitor(meter), wait)
        self._request_type = ""
        self._warmed_up = False
        super().__init__(*args, **kwargs)

    def _runs_on_gpu(self) -> bool:
        """Whether energy without that of the GPU would be no total."""
        raise NotImplementedError

    def _first_pass(self) -> None:
        """Send a few tokens through the model: the first pass ever loads kernels and weights."""
        raise NotImplementedError

    def _wait_for_accelerators(self) -> None:
        """Wait for work that was only sent off, before a meter is read."""

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._measured("loglikelihood", requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._measured("loglikelihood_rolling", requests, disable_tqdm)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list:
        return self._measured("generate_until", requests, disable_tqdm)

    def begin_evaluation(self) -> None:
        """Begin the readings anew, for a model that answers several evaluations."""
        if self._energy is not None:
            self._energy.begin()

    def energy_info(self) -> dict[str, Any]:
        """Return the block ``energy`` of the results, if it is on, and log its total."""
        if self._energy is None:
            return {}
        block = self._energy.finish()
        eval_logger.info("Energy of all requests: %s", json.dumps(block["total"]))
        return {"energy": block}

    def _measured(self, request_type: str, requests: list, disable_tqdm: bool) -> list:
        answer = partial(getattr(super(), request_type), disable_tqdm=disable_tqdm)
        energy = self._energy
        if energy is None:
            return answer(requests)
        if self._runs_on_gpu():
            energy.monitor.required.add("gpu")
        energy.measure_idle()
        self._request_type = request_type
        if not self._warmed_up:
            self._warmed_up = True
            with self._set_up("warm_up"):
                self._first_pass()
        count = len(requests)
        with energy.window("request_types", request_type, lm=self, requests=count):
            answers = answer(requests)
            # A machine is busy until its last process has finished.
            self.barrier()
            return answers

    @contextlib.contextmanager
    def _set_up(self, purpose: str) -> Iterator[None]:
        """Measure what belongs to no request, and leave it out of the requests' figures."""
        before = replace(self.token_counts)
        if self._energy is None:
            yield
        else:
            self._wait_for_accelerators()
            with self._energy.window("set_up", purpose, self._request_type):
                yield
                self._wait_for_accelerators()
        self.token_counts = before
