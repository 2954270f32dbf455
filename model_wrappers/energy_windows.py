"""What model types with energy readings are built on: their arguments and their windows.

Independent of what computes. With ``energy`` off, neither codecarbon nor `energy_log` is
imported.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.model_wrappers.batching.flags import check_flag


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval.api.instance import Instance

    # The mixin's neighbour among the bases, whose methods it calls.
    from lm_eval.api.model import TemplateLM as _Neighbour

    from lm_eval_pruned.model_wrappers.batching.token_counts import TokenCounts
    from lm_eval_pruned.model_wrappers.energy_log import EnergyLog

    _Run = Callable[[list[Instance]], list]
else:
    _Neighbour = object

eval_logger = logging.getLogger("lm_eval.models.energy_logging")


class EnergyWindows(_Neighbour):
    """Measures each type of request in a window of its own.

    It comes before a model of the harness among the bases. Whoever derives from both counts
    tokens, and says what `_meters` and `_first_pass` do.

    Attributes:
        token_counts: Totals since the model was loaded.
    """

    token_counts: TokenCounts

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
        """A model with energy readings under ``config.energy`` of the results file.

        Args:
            *args: As in the model.
            energy: Measure wall time, tokens and energy of each request type.
            energy_per_task: Run the requests of each task as a window of their own.
            energy_idle_seconds: First measure the idle machine with the model loaded,
                for so many seconds, and report net energy beside gross.
            energy_country: ISO 3166 alpha-3 code of the country whose carbon intensity
                turns energy into emissions. Without it there are no emissions.
            energy_online: Let codecarbon ask the network for the country instead.
            **kwargs: Everything the model takes.

        Raises:
            ValueError: An argument is out of range, or needs ``energy=true``.
        """
        flags = {
            "energy": energy,
            "energy_per_task": energy_per_task,
            "energy_online": energy_online,
        }
        for name, value in flags.items():
            check_flag(name, value)
        self._energy: EnergyLog | None = None
        if energy:
            from lm_eval_pruned.model_wrappers.energy_log import EnergyLog

            self._energy = EnergyLog.from_arguments(
                energy_idle_seconds, energy_country, energy_online
            )
        for name, given in {
            **flags,
            "energy_idle_seconds": energy_idle_seconds,
            "energy_country": energy_country,
        }.items():
            if given and not energy:
                raise ValueError(
                    f"{name}={given} measures nothing by itself: pass energy=true as well, or "
                    "leave it out."
                )
        self._energy_per_task = energy_per_task
        self._warmed_up = False
        super().__init__(*args, **kwargs)

    def _meters(self, energy: EnergyLog) -> None:
        """Tell `energy` what the model runs on, before its first window."""
        raise NotImplementedError

    def _first_pass(self, energy: EnergyLog) -> None:
        """Send a few tokens through the model: the first pass ever loads kernels and weights."""
        raise NotImplementedError

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

    def set_cache_hook(self, cache_hook: Any) -> None:
        super().set_cache_hook(cache_hook)
        if self._energy is not None and cache_hook.dbdict is not None:
            self._energy.count_cache_reads(cache_hook.dbdict)

    def begin_evaluation(self) -> None:
        """Begin the readings anew, for a model that answers several evaluations."""
        if self._energy is not None:
            self._energy.begin()

    def count_kept_answers(self, count: int) -> None:
        """Count answers that an earlier process computed and paid the energy for."""
        if self._energy is not None:
            self._energy.begin_if_over()
            self._energy.cached += count

    def energy_info(self) -> dict[str, Any]:
        """Return the block ``energy`` of the results, if it is on."""
        if self._energy is None:
            return {}
        self._energy.stop()
        eval_logger.info("Energy:\n%s", self._energy.as_table())
        return {"energy": self._energy.as_dict()}

    def _measured(self, request_type: str, run: _Run, requests: list[Instance]) -> list:
        energy = self._energy
        if energy is None:
            return run(requests)
        energy.begin_if_over()
        self._meters(energy)
        energy.measure_idle()
        self._warm_up()
        with energy.window(request_type, len(requests), self):
            answers: list = [None] * len(requests)
            for task, places in self._parts(energy, requests).items():
                part = [requests[place] for place in places]
                if task is None:
                    answers = run(part)
                    continue
                with energy.task_window(task, request_type, len(part), self):
                    for place, answer in zip(places, run(part), strict=True):
                        answers[place] = answer
        if self.world_size <= 1:
            energy.record([energy.close()])
        return answers

    def _warm_up(self) -> None:
        if self._energy is not None and not self._warmed_up:
            self._warmed_up = True
            self._first_pass(self._energy)

    def _parts(
        self, energy: EnergyLog, requests: list[Instance]
    ) -> dict[str | None, list[int]]:
        """Return the places of what is measured together, by task where that was asked for."""
        per_task = self._energy_per_task
        if per_task and self.world_size > 1:
            # Processes may hold requests of different tasks, and rolling requests
            # wait for each other.
            energy.note("energy per task is not measured in runs of several processes")
            per_task = False
        if not per_task:
            return {None: list(range(len(requests)))}
        parts: dict[str | None, list[int]] = {}
        for place, request in enumerate(requests):
            parts.setdefault(str(request.task_name), []).append(place)
        return parts
