"""Units of a sweep on W&B and Trackio, by the harness's own loggers: each is one run."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from lm_eval.loggers import TrackioLogger, WandbLogger


if TYPE_CHECKING:
    from lm_eval.config.evaluate_config import EvaluatorConfig

logger = logging.getLogger("lm_eval.pruned.sweep")


def check_tracking(settings: EvaluatorConfig) -> None:
    """Raise ValueError where a package is missing."""
    for package in ("wandb", "trackio"):
        given = getattr(settings, f"{package}_args")
        if given and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{package}_args was given, but {package} is not installed: run "
                f"`pip install {package}`, or leave {package}_args out."
            )


def report(label: str, results: dict[str, Any], settings: EvaluatorConfig) -> None:
    """Report the results of a unit; what fails here is a warning, for its files are whole."""
    for service, given, kind, *more in (
        ("W&B", settings.wandb_args, WandbLogger, settings.wandb_config_args),
        ("Trackio", settings.trackio_args, TrackioLogger),
    ):
        if not given:
            continue
        name = f"{given['name']} {label}" if given.get("name") else label
        try:
            # They change what they are given.
            run: Any = kind({**given, "name": name}, *map(dict, more))
            run.post_init({k: v for k, v in results.items() if k != "samples"})
            run.log_eval_result()
            if "samples" in results:
                run.log_eval_samples(results["samples"])
            (run if service == "Trackio" else run.run).finish()
        except Exception as error:  # noqa: BLE001
            what = f"{type(error).__name__}: {error}"
            logger.warning("%s was not logged to %s: %s", label, service, what)
