"""Where the units of a sweep are reported besides its folder: W&B, Trackio, the Hub.

The harness's own loggers do it, in the order in which ``lm_eval run`` calls them; what is
ours are the names. Once units run, what fails here is a warning.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.loggers import EvaluationTracker

logger = logging.getLogger("lm_eval.pruned.sweep")


class Tracking:
    """Reports units as the settings of a sweep ask for it.

    Args:
        settings: The harness's reading of the options.

    Raises:
        ValueError: A package is missing, or an argument is unknown or of no use.
    """

    def __init__(self, settings: EvaluatorConfig) -> None:
        from lm_eval.loggers import EvaluationTracker

        self._settings = settings
        self._hub = dict(settings.hf_hub_log_args)
        for package in ("wandb", "trackio"):
            option = f"{package}_args"
            # The harness takes the step out.
            given = {k: v for k, v in getattr(settings, option).items() if k != "step"}
            if getattr(settings, option):
                try:
                    init = importlib.import_module(package).init
                except (ImportError, AttributeError) as error:
                    raise ValueError(
                        f"{option} was given, but {package} cannot be imported ({error}): run "
                        f"`pip install {package}`, or leave {option} out."
                    ) from None
                _check(option, given, init)
        _check("hf_hub_log_args", {"output_path": "", **self._hub}, EvaluationTracker)
        if "id" in settings.wandb_args:
            raise ValueError(
                f"wandb_args has id={settings.wandb_args['id']}, but each unit is a run of its "
                "own: leave it out, or name what they share with group=..."
            )

    def hub_tracker(self, rank: int = 0) -> EvaluationTracker:
        """Return a tracker that sends results to the Hub if that was asked for.

        The first of a process asks the Hub whose token this is, unless the organisation
        was given.

        Args:
            rank: Of this process in its launch; the first alone reports.

        Raises:
            ValueError: There is no token, or the Hub refuses it or cannot be reached.
        """
        from lm_eval.loggers import EvaluationTracker

        if rank or not self._hub:
            return EvaluationTracker()
        token = os.environ.get("HF_TOKEN") or self._hub.get("token") or ""
        try:
            tracker = EvaluationTracker(**{**self._hub, "token": token})
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(
                "hf_hub_log_args gives no hub_results_org, and the Hub does not say whose token "
                f"this is ({type(error).__name__}: {error}): add hub_results_org=..., or check "
                "token and network."
            ) from error
        self._hub["hub_results_org"] = tracker.details_repo.partition("/")[0]
        return tracker

    @contextlib.contextmanager
    def unit(
        self, configuration: str, task: str, rank: int = 0
    ) -> Iterator[tuple[EvaluationTracker, Callable[[dict[str, Any]], None]]]:
        """Have a run of W&B and of Trackio, as asked for, while a unit is evaluated.

        Args:
            configuration: Id of the unit's configuration; part of the names.
            task: Its task.
            rank: Of this process in its launch; the first alone reports.

        Yields:
            The harness's tracker, and a function that logs what `lm_eval.simple_evaluate`
            returned before the tracker saves it.
        """
        label = f"{configuration} {task}"
        runs = [] if rank else list(self._started(label))
        tracker = self.hub_tracker(rank)
        pushes = tracker.push_results_to_hub or tracker.push_samples_to_hub
        failed = True

        def log(results: dict[str, Any]) -> None:
            if pushes:
                # The harness names folders there after the checkpoint, which all
                # configurations share.
                named = tracker.general_config_tracker
                named.model_name = f"{named.model_name}_{configuration}"
                named.model_name_sanitized += f"_{configuration}"  # type: ignore[operator]
            scores = {k: v for k, v in results.items() if k != "samples"}
            for service, each, _ in runs:
                with _warning(f"{label} was not logged to {service}"):
                    each.post_init(scores)
                    each.log_eval_result()
                    if "samples" in results:
                        each.log_eval_samples(results["samples"])

        try:
            yield tracker, log
            failed = False
        finally:
            for service, _, finish in runs:
                with _warning(f"the {service} run of {label} was not finished"):
                    finish(int(failed))
        if pushes:
            with _warning(f"the card of {tracker.details_repo} was not written"):
                tracker.recreate_metadata_card()

    def _started(self, label: str) -> Iterator[tuple[str, Any, Callable[[int], None]]]:
        """Yield a name, the harness's logger, and what ends its run with an exit code."""
        from lm_eval.loggers import TrackioLogger, WandbLogger

        settings = self._settings
        if settings.wandb_args:
            with _warning(f"{label} is not logged to W&B"):
                more = dict(settings.wandb_config_args)
                wandb = WandbLogger(_named(settings.wandb_args, label), more)
                yield "W&B", wandb, lambda code: wandb.run.finish(exit_code=code)
        if settings.trackio_args:
            with _warning(f"{label} is not logged to Trackio"):
                trackio = TrackioLogger(_named(settings.trackio_args, label))
                yield "Trackio", trackio, lambda code: trackio.finish()


def _check(option: str, given: Mapping[str, Any], takes: Callable[..., Any]) -> None:
    """Refuse what a package would refuse once the first model is loaded."""
    try:
        inspect.signature(takes).bind_partial(**given)
    except TypeError as error:
        raise ValueError(
            f"{option} cannot be used: {error}; pass what {takes.__module__}.{takes.__name__} takes."
        ) from None


def _named(arguments: dict[str, Any], label: str) -> dict[str, Any]:
    """Return arguments of a unit's own run; the harness changes those that it is given."""
    name = arguments.get("name")
    return {**arguments, "name": f"{name} {label}" if name else label}


@contextlib.contextmanager
def _warning(what: str) -> Iterator[None]:
    """Turn an error into a warning: the unit's results are whole without this."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        logger.warning("%s: %s: %s", what, type(error).__name__, error)
