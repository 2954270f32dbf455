"""From the options of a sweep to its units: which configurations, which tasks, and
what makes each unit the one it is.

A unit is one task on one configuration. Its fingerprint covers everything that
decides its scores, so that a finished unit is recognised and one whose definition
changed is not mistaken for it.
"""

from __future__ import annotations

import contextlib
import functools
from argparse import Namespace
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.configs import misspelt
from lm_eval_pruned.pruning.argument_values import read_widths
from lm_eval_pruned.pruning.arguments import (
    CUTS,
    DECLARED,
    SEVERAL,
    SIZES,
    without_idle,
)
from lm_eval_pruned.results.folder import ADAPTERS
from lm_eval_pruned.results.stopping_record import SCHEMA
from lm_eval_pruned.sweeps.configurations import (
    Configuration,
    configurations_of,
    model_source,
)
from lm_eval_pruned.sweeps.fingerprints import (
    SOURCES,
    fingerprint,
    hash_beside,
    hash_file,
    hash_tree,
    source_of,
)
from lm_eval_pruned.sweeps.healing import SUFFIX, SweepHealing, training_arguments
from lm_eval_pruned.sweeps.options import deciding
from lm_eval_pruned.sweeps.stopping import read_rule
from lm_eval_pruned.sweeps.tasks import (
    SweepTask,
    index_tasks,
    resolve_tasks,
    with_metadata,
)
from lm_eval_pruned.sweeps.tracking import Tracking


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.tasks import TaskManager


#: Model types that a sweep can evaluate, the default first.
MODELS = ("pruned-hf", "pruned-vllm")


class Sweep:
    """A sweep that has been planned: nothing is loaded, nothing is evaluated.

    Args:
        options: From `options.read_options`.

    Attributes:
        options: As given.
        model: The model type.
        stop_when: What ends a unit of a pruned model, or None for its last document.
        settings: The harness's own reading of them.
        configurations: Baseline first, then in the order asked for.
        tasks: In the order asked for.
        tracking: Where units are reported besides the folder.
        healing: How pruned models are trained again, or None.

    Raises:
        ValueError: An option, a size or a task does not exist or fit the model.
        OSError: The model's config cannot be read.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.model = _model(options)
        self.stop_when = read_rule(options)
        self.settings = _settings(options, self.model)
        self.tracking = Tracking(self.settings)
        self._base = self.settings.model_args
        self.configurations = configurations_of(options, self._base)
        self.healing: SweepHealing | None = None
        if options.get("heal") is not None:
            self._add_healed()
        for cached in (hash_tree, hash_beside):
            cached.cache_clear()
        self._manager = index_tasks(self.settings.include_path)
        self.tasks = resolve_tasks(options["tasks"], self._manager)

    def units(
        self, shard: tuple[int, int] | None = None
    ) -> list[tuple[Configuration, SweepTask]]:
        """Return the units, those of one configuration together.

        Args:
            shard: ``(I, N)`` to return part I of N. Units are dealt out task by
                task, so that N parts of N configurations get one model each.
        """
        numbers = {
            (configuration.id, task.name): number
            for number, (task, configuration) in enumerate(
                (task, configuration)
                for task in self.tasks
                for configuration in self.configurations
            )
        }
        part, parts = shard or (0, 1)
        return [
            (configuration, task)
            for configuration in self.configurations
            for task in self.tasks
            if numbers[configuration.id, task.name] % parts == part
        ]

    def model_args(self, configuration: Configuration) -> dict[str, Any]:
        """Return the arguments that ``lm_eval --model_args`` would take."""
        arguments = self._pruning_arguments(configuration)
        if configuration.healed:
            arguments["peft"] = str(self.adapter(configuration))
        return arguments

    def adapter(self, configuration: Configuration) -> Path:
        """Return where the adapter of a healed configuration lies, once it was trained."""
        assert self.healing is not None
        digest = fingerprint(
            {
                "model_args": self._described(self._training_arguments(configuration)),
                "sources": self.sources,
                "healing": self.healing.definition(),
            }
        )
        folder = Path(self.options["output_path"])
        return folder / ADAPTERS / configuration.id / digest[:16]

    def heal(self, configuration: Configuration) -> None:
        """Train the adapter of a healed configuration, unless it is there."""
        assert self.healing is not None
        self.healing.train(
            self._training_arguments(configuration),
            self.adapter(configuration),
            self.settings.device,
        )

    def metadata(self, configuration: Configuration) -> dict[str, Any]:
        """Return what the harness hands to tasks: model arguments, then --metadata."""
        own = self.options.get("metadata") or {}
        return {**self.model_args(configuration), **own}

    def task_manager(self, configuration: Configuration) -> TaskManager:
        """Return the harness's task manager as `lm_eval run` would make it."""
        return with_metadata(self._manager, self.metadata(configuration))

    @functools.cached_property
    def sources(self) -> dict[str, dict[str, str | None]]:
        """What the model is made from: content hashes of folders, commits on the Hub."""
        revision = self._base.get("revision") or "main"
        named = {
            argument: str(self._base[argument])
            for argument in SOURCES
            if self._base.get(argument)
        }
        named.setdefault("pretrained", str(model_source(self._base)["pretrained"]))
        return {
            argument: source_of(
                name, revision, str(self._base.get("subfolder") or ""), argument
            )
            for argument, name in named.items()
        }

    def model_definition(self, configuration: Configuration) -> dict[str, Any]:
        """Return everything that decides which model a configuration is."""
        definition = {
            "model": self.model,
            "model_args": self._described(self._pruning_arguments(configuration)),
            "sources": self.sources,
        }
        if configuration.healed:
            assert self.healing is not None
            definition["healing"] = self.healing.definition()
        return definition

    def _described(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return arguments of the model without what decides nothing, files by their content."""
        arguments = {
            name: value
            for name, value in arguments.items()
            if name not in deciding("how")
            and "sha256" not in self.sources.get(name, {})
        }
        if "widths" in arguments:
            arguments["widths"] = read_widths(arguments["widths"])
        text = Path(arguments.get("calibration", ""))
        if text.is_file():
            arguments["calibration"] = {"sha256": hash_file(text)}
        return arguments

    def _pruning_arguments(self, configuration: Configuration) -> dict[str, Any]:
        """Return the model's arguments before what it is trained on."""
        return without_idle({**self._base, **configuration.arguments})

    def _training_arguments(self, configuration: Configuration) -> dict[str, Any]:
        arguments = self._pruning_arguments(configuration)
        return training_arguments(self.model, {**model_source(self._base), **arguments})

    def _add_healed(self) -> None:
        """Put behind each pruned configuration the same one, trained again.

        Raises:
            ValueError: There is none, or it cannot be trained as asked.
        """
        self.healing = SweepHealing.of(self.options)
        found = []
        for each in self.configurations[1:]:
            found += [each, replace(each, id=each.id + SUFFIX, healed=True)]
        if not found:
            raise ValueError(
                "heal trains pruned models, but the sweep has none: add sizes such as "
                "--prune_percents 20 40."
            )
        # What is wrong with one size is wrong with all that are asked for alike.
        alike = {tuple(each.arguments): each for each in found}
        for each in alike.values():
            self.healing.check(
                self._training_arguments(each), Path(self.options["output_path"])
            )
        self.configurations = [self.baseline, *found]

    def definition(
        self, configuration: Configuration, task: SweepTask
    ) -> dict[str, Any]:
        """Return everything that decides a unit's scores."""
        settings = self.settings
        return {
            **self.model_definition(configuration),
            "task": task.name,
            "task_sha256": task.digest,
            "settings": {
                name: getattr(settings, name) for name in (*deciding("scores"), "seed")
            },
            "metadata": self.options.get("metadata") or {},
            **self._stopping(configuration),
            "versions": {
                package: version(package) for package in ("lm-eval", "lm-eval-pruned")
            },
        }

    @property
    def baseline(self) -> Configuration:
        """The unpruned model, with which others are compared."""
        return self.configurations[0]

    def may_stop(self, configuration: Configuration) -> bool:
        """Return whether the units of a configuration end when they are decided."""
        return self.stop_when is not None and configuration is not self.baseline

    def _stopping(self, configuration: Configuration) -> dict[str, Any]:
        if not self.may_stop(configuration):
            return {}
        # The sizes share the error: with more of them, each has to be clearer.
        sizes = len(self.configurations) - 1
        rule = {"rule": self.stop_when, "sizes": sizes, "schema_version": SCHEMA}
        return {"stopping": rule}

    def as_dict(self, kept: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Return the content of ``sweep.json``: the same for every shard and every start.

        Args:
            kept: Configurations of earlier sweeps in the folder that are part of this one.
        """
        baseline, *others = (asdict(each) for each in self.configurations)
        definition = {
            name: value
            for name, value in self.options.items()
            if name not in deciding("how") + deciding("where")
        }
        for option, argument in SEVERAL.items():
            sizes = [each["arguments"].get(argument) for each in kept]
            if argument in CUTS and any(sizes):
                asked = [*definition.get(option, []), *map(str, filter(None, sizes))]
                definition[option] = list(dict.fromkeys(asked))
        return {
            "definition": definition,
            "sources": self.sources,
            "configurations": [baseline, *kept, *others],
            "tasks": [each.name for each in self.tasks],
        }


def _model(options: dict[str, Any]) -> str:
    model: str = options.get("model", MODELS[0])
    if model not in MODELS:
        raise ValueError(
            f"model={model} is no model type that prunes: pass {' or '.join(MODELS)}."
        )
    return model


def _settings(options: dict[str, Any], model: str) -> EvaluatorConfig:
    from lm_eval.config.evaluate_config import EvaluatorConfig

    own = ("model", *SEVERAL, "heal", "ray", "stop_when")
    known = {
        name: value
        for name, value in options.items()
        if name not in own and not name.endswith("_per_unit")
    }
    arguments = dict(options.get("model_args") or {})
    instead = dict.fromkeys(SIZES, "ratios") | {v: k for k, v in SEVERAL.items()}
    for name, option in instead.items():
        if name in arguments:
            raise ValueError(
                f"model_args has {name}={arguments[name]}, but a sweep sets it for each of its "
                f"configurations: use --{option}."
            )
    found = misspelt(arguments, _known(model), lambda: _config(arguments))
    if found is not None:
        name, near = found
        meant = f"--{instead[near]}" if near in instead else near
        raise ValueError(
            f"model_args has {name}={arguments[name]}, which {model} does not know: did you mean "
            f"{meant}?"
        )
    known["model_args"] = arguments
    if "seed" in known:
        known["seed"] = _seeds(known["seed"])
    known["log_samples"] = options.get("log_samples", True)
    # from_cli takes what is true or zero, as lm_eval run has it.
    return EvaluatorConfig.from_cli(Namespace(model=model, **known))


def _known(model: str) -> set[str]:
    """Return the names of a model type's arguments, as far as this machine knows them."""
    from lm_eval.api.registry import get_model

    known = {"pretrained", *DECLARED}
    # The workers of Ray may have vLLM where this machine has none.
    with contextlib.suppress(ImportError):
        known |= get_model(model).argument_names()  # type: ignore[attr-defined]
    return known


def _config(arguments: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    source = model_source(arguments)
    return AutoConfig.from_pretrained(source.pop("pretrained"), **source)


def _seeds(text: str) -> list[int | None]:
    try:
        return [
            None if part.strip().lower() == "none" else int(part)
            for part in text.split(",")
        ]
    except ValueError:
        raise ValueError(
            f"seed={text} is not a whole number or four of them: pass one such as 42 or "
            "0,1234,1234,1234."
        ) from None
