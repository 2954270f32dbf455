"""The arguments ``energy...`` of the model types: what is wrong with them, and the log they open.

With ``energy`` off, neither codecarbon nor `energy_log` is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_pruned.model_wrappers.batching.flags import check_flag


if TYPE_CHECKING:
    from lm_eval_pruned.model_wrappers.energy_log import EnergyLog


def open_energy_log(
    *,
    energy: bool,
    energy_per_task: bool,
    energy_idle_seconds: float,
    energy_country: str | None,
    energy_online: bool,
) -> EnergyLog | None:
    """Return the log that was asked for, None without ``energy``.

    Takes the arguments of `lm_eval_pruned.model_wrappers.energy_logging.EnergyLoggingHFLM`.

    Raises:
        ValueError: An argument is out of range, or needs ``energy=true``.
    """
    for name, value in {
        "energy": energy,
        "energy_per_task": energy_per_task,
        "energy_online": energy_online,
    }.items():
        check_flag(name, value)
    if energy:
        from lm_eval_pruned.model_wrappers.energy_log import EnergyLog

        return EnergyLog.from_arguments(
            energy_idle_seconds, energy_country, energy_online
        )
    for name, given in {
        "energy_per_task": energy_per_task,
        "energy_idle_seconds": energy_idle_seconds,
        "energy_country": energy_country,
        "energy_online": energy_online,
    }.items():
        if given:
            raise ValueError(
                f"{name}={given} measures nothing by itself: pass energy=true as well, or "
                "leave it out."
            )
    return None
