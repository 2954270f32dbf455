"""From the options of a sweep to its units: one task on one configuration each, and what defines it.

A unit is what one ``lm_eval`` command would evaluate, in a folder of the sweep. Its fingerprint
covers everything that decides its scores, so that a finished unit is recognised, and one whose
definition changed is not mistaken for it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from argparse import Namespace
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval.api.registry import get_model
from lm_eval.config.evaluate_config import EvaluatorConfig
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from lm_eval_pruned.checkpoints.configs import misspelt
from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS, plan_rows
from lm_eval_pruned.pruning import arguments as of_pruning
from lm_eval_pruned.pruning.argument_values import read_widths
from lm_eval_pruned.pruning.arguments import DECLARED, SEVERAL, SEVERAL_SIZES, SIZES
from lm_eval_pruned.pruning.criteria import canonical_name
from lm_eval_pruned.results.runs import FLOOR
from lm_eval_pruned.sweeps import tasks as of_tasks
from lm_eval_pruned.sweeps.options import OF_HARNESS, deciding, parse_number
from lm_eval_pruned.util.content import content_digest


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from lm_eval.tasks import TaskManager


#: Model types that a sweep can evaluate, the default first.
MODELS = ("pruned-hf", "pruned-vllm")
#: Options that a model type takes beside its arguments.
OF_MODEL = ("batch_size", "max_batch_size", "device")
#: Arguments of the model that name files, and a file by which the Hub knows them.
SOURCES = {
    "pretrained": "config.json",
    "delta": "config.json",
    "peft": "adapter_config.json",
    "lora_local_path": "adapter_config.json",
    "tokenizer": "tokenizer_config.json",
}
#: Arguments of pruning that a sweep varies, and the option that does it.
INSTEAD = dict.fromkeys(SIZES, "ratios") | {v: k for k, v in SEVERAL.items()}
#: Arguments of all configurations that decide how many parameters a size has.
_WITH_SIZES = ("multiple_of", *of_pruning.EXCLUSIVE["says which layers to prune"])
_size = operator.attrgetter(
    "intermediate_size", "expansion_ratio", "parameters", "reduction"
)


@dataclass(frozen=True)
class Configuration:
    """One model of the sweep; its size is that of `lm_eval_pruned.checkpoints.planning.PlanRow`.

    Attributes:
        id: Readable and unique, such as ``ratio-2.4``.
        arguments: What prunes it, such as ``{"ratio": 2.4}``; empty for the baseline.
        floor: The type of a model that knows nothing, and is evaluated beside the sweep's.
    """

    id: str
    arguments: dict[str, Any]
    kept_width: int | float = 0
    expansion_ratio: float = 0.0
    parameters: int = 0
    reduction: float = 0.0
    floor: str = ""


#: Each with a text for what is generated and a rule for choices, so that few of them do for any task.
#: Not ``first``: data sets such as TruthfulQA list the right answer first, where no model sees it.
FLOORS = tuple(
    Configuration(
        f"{FLOOR}{name}-{rule}", {**arguments, "loglikelihood": rule}, floor=kind
    )
    for kind, name, arguments, rule in (
        ("constant", "yes", {"answer": "Yes"}, "equal"),
        ("constant", "dot", {"answer": "."}, "shortest"),
        ("constant", "the-the", {"answer": "the the"}, "longest"),
        ("echo", "echo", {}, "equal"),
    )
)


class Unit(NamedTuple):
    """One task on one configuration."""

    configuration: Configuration
    task: of_tasks.SweepTask

    @property
    def names(self) -> tuple[str, str]:
        """The id of the configuration and the name of the task."""
        return self.configuration.id, self.task.name


@dataclass(eq=False)
class Sweep:
    """Configurations by tasks: nothing is loaded, nothing is evaluated.

    Attributes:
        options: As `options.read_options` returns them.
        settings: What the harness and the model type read of them; see `harness_settings`.
        configurations: Models of one type, `baseline` first.
        floors: Models that know nothing, evaluated beside them.
        keeps_earlier: Whether units of earlier commands in the folder stay part of it; see
            `folder.with_earlier`.
        shows_tracebacks: Whether the log says how a unit failed; ``error.json`` always does.
        tasks: What every configuration is evaluated on.

    Raises:
        ValueError: A task cannot be used.
    """

    options: dict[str, Any]
    settings: EvaluatorConfig
    configurations: Sequence[Configuration]
    floors: Sequence[Configuration] = FLOORS
    keeps_earlier: bool = True
    shows_tracebacks: bool = True
    tasks: list[of_tasks.SweepTask] = field(init=False)

    def __post_init__(self) -> None:
        self._manager = of_tasks.index_tasks(self.settings.include_path)
        self.tasks = of_tasks.resolve_tasks(self.options["tasks"], self._manager)

    @property
    def baseline(self) -> Configuration:
        """What the other configurations are compared with."""
        return self.configurations[0]

    def units(self, shard: tuple[int, int] | None = None) -> list[Unit]:
        """Return the units, those of one configuration together; of part I of N for ``(I, N)``."""
        part, parts = shard or (0, 1)
        kinds = self.floors, self.configurations
        order = [configuration.id for kind in kinds for configuration in kind]
        # Dealt out task by task: N parts of N configurations get one model each.
        dealt = [
            Unit(configuration, task)
            for kind in kinds
            for task in self.tasks
            for configuration in kind
        ]
        return sorted(dealt[part::parts], key=lambda unit: order.index(unit[0].id))

    def model_args(self, configuration: Configuration) -> dict[str, Any]:
        """Return the arguments that ``lm_eval --model_args`` would take."""
        if configuration.floor:
            return configuration.arguments
        return of_pruning.without_idle(
            {**self.settings.model_args, **configuration.arguments}
        )

    def task_manager(self, configuration: Configuration) -> TaskManager:
        """Return the harness's task manager as `lm_eval run` would make it."""
        # The documents of some tasks depend on the arguments of the model.
        seen = self.baseline if configuration.floor else configuration
        metadata = {**self.model_args(seen), **self.options.get("metadata", {})}
        return of_tasks.with_metadata(self._manager, metadata)

    @functools.cached_property
    def sources(self) -> dict[str, dict[str, str | None]]:
        """What the model is made from: content hashes of folders, commits on the Hub."""
        named = {**model_source(self.settings.model_args), **self.settings.model_args}
        return {
            argument: _source(str(named[argument]), file, self.settings.model_args)
            for argument, file in SOURCES.items()
            if named.get(argument)
        }

    def model_definition(self, configuration: Configuration) -> dict[str, Any]:
        """Return everything that decides which model a configuration is."""
        if kind := configuration.floor:
            return {"model": kind, "model_args": configuration.arguments}
        return {
            "model": self.settings.model,
            "model_args": self._described(self.model_args(configuration)),
            "sources": self.sources,
        }

    def definition(
        self, configuration: Configuration, task: of_tasks.SweepTask
    ) -> dict[str, Any]:
        """Return everything that decides a unit's scores."""
        decide = (*deciding("scores"), "seed")
        return {
            **self.model_definition(configuration),
            "task": task.name,
            "task_sha256": task.digest,
            "settings": {name: getattr(self.settings, name) for name in decide},
            "metadata": self.options.get("metadata", {}),
            "versions": {name: version(name) for name in ("lm-eval", "lm-eval-pruned")},
        }

    def observed(
        self, unit: Unit, lm: Any, folder: Path
    ) -> AbstractContextManager[Callable[[Any], None]]:
        """Watch a model that evaluates a unit; yield what is called with the harness's results of it.

        Nothing is watched here; see `lm_eval_pruned.verdict.watching.WatchingSweep`.
        """
        return contextlib.nullcontext(lambda results: None)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``sweep.json``, the same for every shard and every start.

        The `fingerprint` of a configuration is that of its `model_definition`; its `units` are the
        fingerprints of their definitions, by task.
        """
        left_out = deciding("how", "where")
        digest = of_tasks.fingerprint
        return {
            "definition": {k: v for k, v in self.options.items() if k not in left_out},
            "sources": self.sources,
            "configurations": [
                {
                    **vars(configuration),
                    "fingerprint": digest(self.model_definition(configuration)),
                    "units": {
                        t.name: digest(self.definition(configuration, t))
                        for t in self.tasks
                    },
                }
                for configuration in (*self.floors, *self.configurations)
            ],
            "tasks": [task.name for task in self.tasks],
        }

    def _described(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return arguments of the model without what decides nothing, files by their content."""
        copies = [k for k, source in self.sources.items() if "sha256" in source]
        left_out = (*deciding("how"), *copies)
        described = {k: v for k, v in arguments.items() if k not in left_out}
        if "widths" in described:
            described["widths"] = read_widths(described["widths"])
        text = Path(described.get("calibration", ""))
        if text.is_file():
            described["calibration"] = {"sha256": of_tasks.hash_file(text)}
        return described


def plan_sweep(options: dict[str, Any]) -> Sweep:
    """Plan a sweep over sizes, whose baseline is the unpruned model.

    Raises:
        ValueError: A size, criterion, model type, task or setting cannot be used.
        OSError: The model's config cannot be read.
    """
    model = options.get("model", MODELS[0])
    if model not in MODELS:
        raise ValueError(
            f"model={model} is not a model type that prunes: pass {' or '.join(MODELS)}."
        )
    arguments = dict(options.get("model_args") or {})
    check_names(arguments, model, "model_args", DECLARED, INSTEAD)
    settings = harness_settings(options, model, arguments)
    configurations = _configurations(options, settings.model_args)
    floors = FLOORS if options.get("floors", True) else ()
    return Sweep(options, settings, configurations, floors)


def model_source(base: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that say which checkpoint a sweep is of."""
    if not base.get("pretrained"):
        base = {**base, "pretrained": find_default_model()}
    names = ("pretrained", *SOURCE_ARGUMENTS)
    return {name: base[name] for name in names if base.get(name)}


def _source(name: str, file: str, base: dict[str, Any]) -> dict[str, str | None]:
    """Return what identifies a checkpoint: of a folder its content, on the Hub the commit."""
    if Path(name).is_dir():
        inner = Path(name, base.get("subfolder") or "")
        # Other folders in it, such as the checkpoints of a training, do not count.
        folder = inner if inner.is_dir() else Path(name)
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        content = {
            p.name: content_digest(p) for p in files if not p.name.startswith(".")
        }
        return {"sha256": of_tasks.fingerprint(content)}
    cached = None
    with contextlib.suppress(OSError, ValueError):
        cached = cached_file(name, file, revision=base.get("revision") or "main")
    return {"name": name, "commit": extract_commit_hash(cached, None)}


def harness_settings(
    options: Mapping[str, Any], model: str, arguments: dict[str, Any]
) -> EvaluatorConfig:
    """Have the harness and the model type read and check their options, or raise ValueError."""
    read = {name: options[name] for name in OF_HARNESS if name in options}
    read = {"log_samples": True, **read, "model": model, "model_args": arguments}
    if "seed" in read:
        read["seed"] = _seeds(read["seed"])
    for name in read.keys() - {known.name for known in fields(EvaluatorConfig)}:
        raise ValueError(
            f"{name} was given, but lm-eval {version('lm_eval')} has no such option: leave {name} out."
        )
    settings = EvaluatorConfig.from_cli(Namespace(**read))
    run_options = {name: getattr(settings, name) for name in OF_MODEL}
    # The workers of Ray may have vLLM where this machine has none.
    with contextlib.suppress(ImportError):
        check = getattr(get_model(model), "check_values", lambda values: None)
        check({**arguments, **run_options})
    return settings


def _seeds(text: str) -> list[int | None]:
    """Return the seeds of python, numpy, torch and few-shot choice."""
    parts = [part.strip().lower() for part in text.split(",")]
    try:
        seeds = [None if part == "none" else int(part) for part in parts]
    except ValueError:
        seeds = []
    if len(seeds) not in (1, 4):
        raise ValueError(
            f"seed is {text!r}: pass one whole number or none, or four with commas between them."
        )
    return seeds * (4 // len(seeds))


def check_names(
    arguments: dict[str, Any],
    model: str,
    where: str,
    declared: Iterable[str] = (),
    instead: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse an argument that a model type does not know and that resembles one it knows, or one of `declared`.

    `instead` names the options that take the place of some, which are refused as well. The ValueError
    begins with `where`.
    """
    for name in instead.keys() & arguments.keys():
        raise ValueError(
            f"{where} has {name}={arguments[name]}, but a sweep sets it for each of its "
            f"configurations: use --{instead[name]}."
        )
    known = {"pretrained", *declared}
    # The workers of Ray may have vLLM where this machine has none.
    with contextlib.suppress(ImportError):
        known |= getattr(get_model(model), "argument_names", set)()
    if misspelling := misspelt({**arguments, **model_source(arguments)}, known):
        name, near = misspelling
        near = f"--{instead[near]}" if near in instead else near
        raise ValueError(
            f"{where} has {name}={arguments[name]}, which {model} does not know: did you mean {near}?"
        )


def _configurations(
    options: dict[str, Any], base: dict[str, Any]
) -> list[Configuration]:
    """Return the baseline, and each size by each allocation, criterion and seed."""
    plan = functools.partial(plan_rows, **model_source(base))
    (whole,) = plan(argument="prune_percent", values=["0"])
    configurations = {"baseline": Configuration("baseline", {}, *_size(whole))}
    variants = [*_variants(options)]
    shared = {name: base[name] for name in _WITH_SIZES if base.get(name) is not None}
    for option, argument in SEVERAL_SIZES.items():
        values = options.get(option, [])
        if argument != "widths":
            values = [*map(parse_number, values)]
        rows = plan(argument=argument, values=values, **shared)
        sizes = [size for size in zip(values, rows, strict=True) if size[1].reduction]
        for (value, row), variant in itertools.product(sizes, variants):
            arguments = {argument: value, **variant}
            # Refused here, not once the baseline has been evaluated.
            merged = of_pruning.without_idle({**base, **arguments})
            of_pruning.PruneArguments(**of_pruning.take_prune_arguments(merged))
            name = _id(arguments)
            configurations[name] = Configuration(name, arguments, *_size(row))
    return [*configurations.values()]


def _variants(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is combined with each size, without what is the default."""
    criteria = options.get("criteria", [])
    names = [canonical_name(name) for name in criteria]
    seeds = [*map(parse_number, options.get("seeds", []))]
    if seeds and "random" not in names:
        raise ValueError(
            f"seeds={' '.join(map(str, seeds))} were given, but only the criterion random "
            "uses seeds: add --criteria random, or leave --seeds out."
        )
    # A recipe chooses the criterion, so the two are not combined.
    chosen = [{"recipe": name} for name in options.get("recipes", [])]
    if names or not chosen:
        chosen += [{"criterion": name} for name in names or [""]]
    several = [
        [{argument: value} for value in options.get(option) or [None]]
        for option, argument in (("allocations", "allocation"), ("repairs", "repair"))
    ]
    usual = {name: option.default for name, option in DECLARED.items()}
    usual |= of_pruning.RECIPES[of_pruning.STUDY]
    for parts in itertools.product(*several, chosen):
        arguments = functools.reduce(operator.or_, parts)
        silent = {} if "recipe" in arguments else usual
        named = {n: v for n, v in arguments.items() if v and v != silent.get(n)}
        drawn = seeds if arguments.get("criterion") == "random" else []
        yield from [{**named, "seed": seed} for seed in drawn] or [named]


def _id(arguments: dict[str, Any]) -> str:
    named = dict(arguments)
    if "widths" in named:
        # Two files may have one name, and one file may change.
        digest = of_tasks.fingerprint({"widths": read_widths(named["widths"])})[:8]
        named["widths"] = f"{Path(named['widths']).stem}-{digest}"
    return "_".join(f"{k}-{v}" for k, v in named.items()).replace("/", "over")
