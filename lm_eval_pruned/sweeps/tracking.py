"""Units of a sweep on W&B, Trackio and the Hub, by the harness's own loggers."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from typing import TYPE_CHECKING, Any

from lm_eval.loggers import EvaluationTracker, TrackioLogger, WandbLogger


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.config.evaluate_config import EvaluatorConfig

logger = logging.getLogger("lm_eval.pruned.sweep")


class Tracking:
    """Reports units besides the folder. Once units run, what fails here is a warning.

    Raises:
        ValueError: A package is missing, or W&B would put all units into one run.
    """

    def __init__(self, settings: EvaluatorConfig) -> None:
        self._settings = settings
        self._hub = dict(settings.hf_hub_log_args)
        for package in ("wandb", "trackio"):
            given = getattr(settings, f"{package}_args")
            if given and importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"{package}_args was given, but {package} is not installed: run "
                    f"`pip install {package}`, or leave {package}_args out."
                )
        if "id" in settings.wandb_args:
            raise ValueError(
                f"wandb_args has id={settings.wandb_args['id']}, but each unit is a run by itself: "
                "leave it out, or name what they share with group=..."
            )

    def hub_tracker(self, rank: int = 0) -> EvaluationTracker:
        """Return the harness's tracker, which sends results to the Hub if that was asked for.

        The first of a process asks the Hub whose token this is, unless the organisation
        was given. Of several processes, that of rank 0 reports.

        Raises:
            ValueError: An argument is unknown, there is no token, or the Hub refuses it or
                cannot be reached.
        """
        if rank or not self._hub:
            return EvaluationTracker()
        token = os.environ.get("HF_TOKEN") or self._hub.get("token") or ""
        try:
            tracker = EvaluationTracker(**{**self._hub, "token": token})
        except Exception as error:
            raise ValueError(
                f"hf_hub_log_args cannot be used ({type(error).__name__}: {error}): pass what the "
                "harness's EvaluationTracker takes, hub_results_org=... among it, or check token "
                "and network."
            ) from error
        self._hub["hub_results_org"] = tracker.details_repo.partition("/")[0]
        return tracker

    @contextlib.contextmanager
    def reported(
        self, configuration: str, task: str, results: dict[str, Any], tracker: Any
    ) -> Iterator[None]:
        """Report a unit to W&B and Trackio, and name it on the Hub, where the block saves it."""
        label = f"{configuration} {task}"
        settings = self._settings
        for service, given, kind, *more in (
            ("W&B", settings.wandb_args, WandbLogger, settings.wandb_config_args),
            ("Trackio", settings.trackio_args, TrackioLogger),
        ):
            if not given:
                continue
            name = f"{given['name']} {label}" if given.get("name") else label
            with _warning(f"{label} was not logged to {service}"):
                # They change what they are given.
                run: Any = kind({**given, "name": name}, *map(dict, more))
                run.post_init({k: v for k, v in results.items() if k != "samples"})
                run.log_eval_result()
                if "samples" in results:
                    run.log_eval_samples(results["samples"])
                (run if service == "Trackio" else run.run).finish()
        pushes = tracker.push_results_to_hub or tracker.push_samples_to_hub
        if pushes:
            # The harness names folders there after the checkpoint, which all configurations share.
            named = tracker.general_config_tracker
            named.model_name += f"_{configuration}"
            named.model_name_sanitized += f"_{configuration}"
        yield
        if pushes:
            with _warning(f"the card of {tracker.details_repo} was not written"):
                tracker.recreate_metadata_card()


@contextlib.contextmanager
def _warning(what: str) -> Iterator[None]:
    """Turn an error into a warning: the unit's results are whole without this."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        logger.warning("%s: %s: %s", what, type(error).__name__, error)
