"""Where the units of a sweep are reported besides its folder: W&B, Trackio, the Hub.

The harness's own loggers do it, in the order in which ``lm_eval run`` calls them. Results
matter more than reports of them: once units run, what fails here is a warning.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import logging
import os
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.loggers import EvaluationTracker

logger = logging.getLogger("lm_eval.pruned.sweep")

#: By option: the package whose ``init`` takes it, and what the harness takes out before.
_PACKAGES = {"wandb_args": ("wandb", {"step"}), "trackio_args": ("trackio", {"step"})}


class Tracking:
    """Reports units as the settings of a sweep ask for it.

    Args:
        settings: The harness's reading of the options.

    Raises:
        ValueError: A package is missing, or an argument is unknown or of no use.
    """

    def __init__(self, settings: EvaluatorConfig) -> None:
        self._settings = settings
        self._hub = dict(settings.hf_hub_log_args)
        for option, (package, own) in _PACKAGES.items():
            _check(option, getattr(settings, option), package, own)
        if settings.wandb_config_args and not settings.wandb_args:
            raise ValueError(
                f"wandb_config_args={settings.wandb_config_args} is of no use without wandb_args: "
                "add some such as project=pruned."
            )
        if "id" in settings.wandb_args:
            raise ValueError(
                f"wandb_args has id={settings.wandb_args['id']}, but each unit is a run of its "
                "own: leave it out, or name what they share with group=..."
            )
        self._check_hub()

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
        if _pushes(tracker):
            self._hub["hub_results_org"] = tracker.details_repo.partition("/")[0]
        return tracker

    @contextlib.contextmanager
    def unit(
        self, configuration: str, task: str, rank: int = 0
    ) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Have a run of W&B and of Trackio, as asked for, while a unit is evaluated.

        Args:
            configuration: Id of the unit's configuration; part of the runs' names.
            task: Its task.
            rank: Of this process in its launch; the first alone reports.

        Yields:
            A function that logs what `lm_eval.simple_evaluate` returned.
        """
        label = f"{configuration} {task}"
        loggers = [] if rank else self._started(label)
        failed = True

        def log(results: dict[str, Any]) -> None:
            scores = {k: v for k, v in results.items() if k != "samples"}
            for service, each, _ in loggers:
                with _warning(f"{label} was not logged to {service}"):
                    each.post_init(scores)
                    each.log_eval_result()
                    if "samples" in results:
                        each.log_eval_samples(results["samples"])

        try:
            yield log
            failed = False
        finally:
            for service, _, finish in loggers:
                with _warning(f"the {service} run of {label} was not finished"):
                    finish(int(failed))

    @staticmethod
    def name_on_the_hub(tracker: EvaluationTracker, configuration: str) -> None:
        """Keep the configurations of a sweep apart on the Hub, where it pushes.

        The harness names folders there after the checkpoint, which they share.
        """
        if _pushes(tracker):
            of_model = tracker.general_config_tracker
            of_model.model_name = f"{of_model.model_name}_{configuration}"
            of_model.model_name_sanitized = (
                f"{of_model.model_name_sanitized}_{configuration}"
            )

    @staticmethod
    def describe_on_the_hub(tracker: EvaluationTracker) -> None:
        """Write the card of the Hub's data set anew, where results were pushed."""
        if _pushes(tracker):
            with _warning(f"the card of {tracker.details_repo} was not written"):
                tracker.recreate_metadata_card()

    def _started(self, label: str) -> list[tuple[str, Any, Callable[[int], None]]]:
        settings = self._settings
        started: list[tuple[str, Any, Callable[[int], None]]] = []
        if settings.wandb_args:
            from lm_eval.loggers import WandbLogger

            with _warning(f"{label} is not logged to W&B"):
                wandb = WandbLogger(
                    _named(settings.wandb_args, label), dict(settings.wandb_config_args)
                )
                started.append(
                    ("W&B", wandb, lambda code: wandb.run.finish(exit_code=code))
                )
        if settings.trackio_args:
            from lm_eval.loggers import TrackioLogger

            with _warning(f"{label} is not logged to Trackio"):
                trackio = TrackioLogger(_named(settings.trackio_args, label))
                started.append(("Trackio", trackio, lambda code: trackio.finish()))
        return started

    def _check_hub(self) -> None:
        from lm_eval.loggers import EvaluationTracker

        if not self._hub:
            return
        known = set(inspect.signature(EvaluationTracker).parameters) - {"output_path"}
        _refuse_unknown("hf_hub_log_args", self._hub, known)
        pushes = [name for name in self._hub if name.startswith("push_")]
        if "push_samples_to_hub" in pushes and not self._settings.log_samples:
            raise ValueError(
                "hf_hub_log_args has push_samples_to_hub, but log_samples is false: leave one of "
                "them out."
            )
        if not any(self._hub[name] for name in pushes):
            raise ValueError(
                f"hf_hub_log_args has {', '.join(self._hub)} and pushes nothing: add "
                "push_results_to_hub=True or push_samples_to_hub=True."
            )


def _check(option: str, arguments: dict[str, Any], package: str, own: set[str]) -> None:
    """Refuse what the package's ``init`` would refuse, once the first model is loaded."""
    if not arguments:
        return
    try:
        init = importlib.import_module(package).init
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{option} was given, but {package} cannot be imported ({error}): run "
            f"`pip install {package}`, or leave {option} out."
        ) from None
    parameters = inspect.signature(init).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        _refuse_unknown(option, arguments, set(parameters) | own)


def _refuse_unknown(option: str, arguments: dict[str, Any], known: set[str]) -> None:
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {sorted(known)}."
            raise ValueError(f"{option} has the unknown key {name}: {hint}")


def _named(arguments: dict[str, Any], label: str) -> dict[str, Any]:
    """Return arguments of a unit's own run; the harness changes those that it is given."""
    name = arguments.get("name")
    return {**arguments, "name": f"{name} {label}" if name else label}


def _pushes(tracker: EvaluationTracker) -> bool:
    return bool(tracker.push_results_to_hub or tracker.push_samples_to_hub)


@contextlib.contextmanager
def _warning(what: str) -> Iterator[None]:
    """Turn an error into a warning: the unit's results are whole without this."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        logger.warning("%s: %s: %s", what, type(error).__name__, error)
