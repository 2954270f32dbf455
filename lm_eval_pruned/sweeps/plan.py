"""From the options of a sweep to its units: which configurations, which tasks, and
what makes each unit the one it is.

A unit is one task on one configuration. Its fingerprint covers everything that
decides its scores, so that a finished unit is recognised and one whose definition
changed is not mistaken for it.
"""

from __future__ import annotations

import functools
import itertools
from argparse import Namespace
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS, plan_rows
from lm_eval_pruned.pruning.allocations import canonical_allocation
from lm_eval_pruned.pruning.arguments import (
    EXCLUSIVE,
    SEVERAL,
    SEVERAL_SIZES,
    SIZES,
    PruneArguments,
    without_idle,
)
from lm_eval_pruned.pruning.criteria import canonical_name
from lm_eval_pruned.pruning.layer_widths import read_widths
from lm_eval_pruned.sweeps.block_options import BLOCK_OPTIONS, read_block_options
from lm_eval_pruned.sweeps.fingerprints import (
    SOURCES,
    fingerprint,
    hash_beside,
    hash_tree,
    source_of,
)
from lm_eval_pruned.sweeps.options import deciding, parse_number
from lm_eval_pruned.sweeps.tasks import (
    SweepTask,
    index_tasks,
    resolve_tasks,
    with_metadata,
)
from lm_eval_pruned.sweeps.tracking import Tracking


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.tasks import TaskManager

    from lm_eval_pruned.checkpoints.planning import PlanRow

#: Model types that a sweep can evaluate, the default first.
MODELS = ("pruned-hf", "pruned-vllm")


@dataclass(frozen=True)
class Configuration:
    """One model of the sweep.

    Attributes:
        id: Readable and unique, such as ``ratio-2.4``.
        arguments: What prunes it, such as ``{"ratio": 2.4}``; empty for the baseline.
        kept_width: In neurons; the mean where the layers differ.
        expansion_ratio: Kept width / hidden size.
        parameters: Of the pruned model; tied ones count once.
        reduction: Share of the baseline's parameters that is removed, 0 to 1.
    """

    id: str
    arguments: dict[str, Any]
    kept_width: int | float
    expansion_ratio: float
    parameters: int
    reduction: float


class Sweep:
    """A sweep that has been planned: nothing is loaded, nothing is evaluated.

    Args:
        options: From `options.read_options`.

    Attributes:
        options: As given.
        model: The model type.
        stop_rule: What ends a unit of a pruned model, or None for its last document.
        block_size: Documents of a block, or None.
        settings: The harness's own reading of them.
        configurations: Baseline first, then in the order asked for.
        tasks: In the order asked for.
        tracking: Where units are reported besides the folder.

    Raises:
        ValueError: An option, a size or a task does not exist or fit the model.
        OSError: The model's config cannot be read.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.model = _model(options)
        self.stop_rule, self.block_size = read_block_options(options)
        self.settings = _settings(options, self.model)
        self.tracking = Tracking(self.settings)
        self._base = self.settings.model_args
        self.configurations = _configurations(options, self._base)
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
        return without_idle({**self._base, **configuration.arguments})

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
        named.setdefault("pretrained", str(_model_source(self._base)["pretrained"]))
        return {
            argument: source_of(
                name, revision, str(self._base.get("subfolder") or ""), argument
            )
            for argument, name in named.items()
        }

    def model_definition(self, configuration: Configuration) -> dict[str, Any]:
        """Return everything that decides which model a configuration is."""
        arguments = {
            name: value
            for name, value in self.model_args(configuration).items()
            if name not in deciding("how")
            and "sha256" not in self.sources.get(name, {})
        }
        if "widths" in arguments:
            arguments["widths"] = read_widths(arguments["widths"])
        return {"model": self.model, "model_args": arguments, "sources": self.sources}

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

    @property
    def in_blocks(self) -> bool:
        """Whether any unit is evaluated in blocks."""
        return self.stop_rule is not None or self.block_size is not None

    def may_stop(self, configuration: Configuration) -> bool:
        """Return whether the units of a configuration end when they are decided."""
        return self.stop_rule is not None and configuration is not self.baseline

    def _stopping(self, configuration: Configuration) -> dict[str, Any]:
        if not self.may_stop(configuration):
            return {}
        assert self.stop_rule is not None
        # The sizes share the error: with more of them, each has to be clearer.
        sizes = len(self.configurations) - 1
        return {"stopping": {"rule": self.stop_rule.text, "sizes": sizes}}

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``sweep.json``: the same for every shard and every start."""
        return {
            "definition": {
                name: value
                for name, value in self.options.items()
                if name not in deciding("how") + deciding("where")
            },
            "sources": self.sources,
            "configurations": [asdict(each) for each in self.configurations],
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

    own = ("model", *SEVERAL, "ray", *(each["name"] for each in BLOCK_OPTIONS))
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
    known["model_args"] = arguments
    if "seed" in known:
        known["seed"] = _seeds(known["seed"])
    known["log_samples"] = options.get("log_samples", True)
    # from_cli takes what is true or zero, as lm_eval run has it.
    return EvaluatorConfig.from_cli(Namespace(model=model, **known))


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


def _model_source(base: dict[str, Any]) -> dict[str, Any]:
    if not base.get("pretrained"):
        from lm_eval_pruned.checkpoints.default_model import find_default_model

        base = {**base, **find_default_model().model_args()}
    names = ("pretrained", *SOURCE_ARGUMENTS)
    return {name: base[name] for name in names if base.get(name)}


def _configurations(
    options: dict[str, Any], base: dict[str, Any]
) -> list[Configuration]:
    criteria = list(
        dict.fromkeys(
            canonical_name(name, or_best=True)
            for name in options.get("criteria", [PruneArguments.criterion])
        )
    )
    allocations = list(
        dict.fromkeys(
            canonical_allocation(name)
            for name in options.get("allocations", [PruneArguments.allocation])
        )
    )
    seeds = list(
        dict.fromkeys(_whole("seeds", text) for text in options.get("seeds", []))
    )
    if seeds and "random" not in criteria:
        raise ValueError(
            f"seeds={' '.join(map(str, seeds))} were given, but only the criterion random has "
            "any: add --criteria random, or leave --seeds out."
        )
    plan = functools.partial(plan_rows, **_model_source(base))
    baseline = plan(argument="prune_percent", values=["0"])[0]
    found = [
        Configuration(
            "baseline",
            {},
            baseline.intermediate_size,
            baseline.expansion_ratio,
            baseline.parameters,
            0.0,
        )
    ]
    for option, argument in SEVERAL_SIZES.items():
        values = [
            text if argument == "widths" else _canonical(text)
            for text in options.get(option, [])
        ]
        if argument == "widths":
            for value in values:
                chosen = EXCLUSIVE["says which layers to prune"]
                layers: dict[str, Any] = {name: base.get(name) for name in chosen}
                PruneArguments(widths=value, **layers)
        rows = plan(
            argument=argument,
            values=values,
            multiple_of=base.get("multiple_of") or PruneArguments.multiple_of,
        )
        for value, row in zip(values, rows, strict=True):
            if row.intermediate_size == baseline.intermediate_size:
                continue
            for allocation, criterion in itertools.product(allocations, criteria):
                for seed in seeds if seeds and criterion == "random" else [None]:
                    arguments: dict[str, Any] = {
                        argument: value if argument == "widths" else parse_number(value)
                    }
                    if allocation != PruneArguments.allocation:
                        arguments["allocation"] = allocation
                    if criterion != PruneArguments.criterion:
                        arguments["criterion"] = criterion
                    if seed is not None:
                        arguments["seed"] = seed
                    found.append(_configuration(arguments, base, row))
    found += _depths(options.get("drop_layers", []), base, plan)
    return list({each.id: each for each in found}.values())


def _depths(
    values: list[str], base: dict[str, Any], plan: Callable[..., list[PlanRow]]
) -> list[Configuration]:
    """Return the configurations that lack whole layers."""
    rows = plan(argument="drop_layers", values=values)
    return [
        _configuration({"drop_layers": parse_number(value)}, base, row)
        for value, row in zip(values, rows, strict=True)
    ]


def _configuration(
    arguments: dict[str, Any], base: dict[str, Any], row: PlanRow
) -> Configuration:
    # Refused here, not once the baseline has been evaluated.
    PruneArguments.taken_from(without_idle({**base, **arguments}))
    return Configuration(
        _id(arguments),
        arguments,
        row.intermediate_size,
        row.expansion_ratio,
        row.parameters,
        row.reduction,
    )


def _id(arguments: dict[str, Any]) -> str:
    named = dict(arguments)
    if "widths" in named:
        # Two files may have one name, and one file may change.
        digest = fingerprint({"widths": read_widths(named["widths"])})[:8]
        named["widths"] = f"{Path(named['widths']).stem}-{digest}"
    return "_".join(f"{name}-{value}" for name, value in named.items()).replace(
        "/", "over"
    )


def _canonical(text: str) -> str:
    """Return one notation for one number, so that 2.40 is the same configuration as 2.4."""
    try:
        number = Decimal(text)
        return f"{number.normalize():f}" if number.is_finite() else text
    except InvalidOperation:
        return text


def _whole(name: str, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(
            f"{name} has {text}, which is not a whole number of 0 or more: pass some such as "
            "0 1 2."
        )
    return number
