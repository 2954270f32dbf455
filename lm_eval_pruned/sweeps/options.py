"""What a sweep can be asked for: the options of ``lm-eval-pruned sweep`` and of its YAML file.

Names and meanings are those of ``lm_eval run`` wherever it has the option. Nothing here imports
torch or the harness.
"""

from __future__ import annotations

import json
import re
from dataclasses import make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import DECLARED, SEVERAL, SIZES, option_row
from lm_eval_pruned.util import options as declaring


if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    return str(value)


def _texts(value: Any) -> list[str]:
    items = [part.strip() for part in _text(value).split(",") if part.strip()]
    if not items:
        raise ValueError
    return items


def _samples(value: Any) -> dict[str, list[int]]:
    is_file = isinstance(value, str) and not value.lstrip().startswith("{")
    return declaring.mapping(
        json.loads(Path(value).read_text("utf-8")) if is_file else value
    )


def _boolean(value: Any) -> bool:
    return ("false", "0", "no", "true", "1", "yes").index(str(value).lower()) > 2


def _name_or_flag(value: Any) -> bool | str:
    return value if isinstance(value, bool) else _text(value)


#: What is declared of an option besides, by the function that converts it.
_SHAPES: dict[Any, dict[str, Any]] = {
    _texts: {"nargs": "+", "expected": "one or more names or numbers"},
    _text: {"expected": "one value"},
    dict: {"nargs": "+"},
    _samples: {"expected": 'JSON such as {"boolq": [0, 1]}, or a file of it'},
    _boolean: {"nargs": "?", "expected": "true or false"},
    _name_or_flag: {"nargs": "?", "expected": "true, false or a name"},
    float: {"least": 0},
}


def _option(kind: Any, decides: str, metavar: str | None, about: str) -> Any:
    """Declare an option of a sweep by what it decides.

    That is ``scores`` or files of a unit, as an argument of `lm_eval.simple_evaluate`; ``how``
    units are run, so that a sweep may go on under another, such as a smaller batch; ``where`` they
    run and what they write lies; or else ``what`` is evaluated.
    """
    more = {"help": about, "decides": decides, **_SHAPES.get(kind, {})}
    return declaring.option(kind, None, metavar, **more)


def _of_pruning(kind: Any, name: str, **several: bool) -> Any:
    """Declare an option of a sweep that `option_row` declares for other commands."""
    _, how = option_row(name, **several)
    return _option(kind, "what", how["metavar"], how["help"])


#: Arguments of pruning of which all models of a sweep have one value.
SHARED = tuple(name for name in DECLARED if name not in (*SIZES, *SEVERAL.values()))
_PAIRS = "KEY=VALUE"
# fmt: off
#: The options under their headings for ``--help``.
GROUPS = {
    "configurations": {
        "model": _option(str, "what", "NAME", "pruned-hf (default) or pruned-vllm"),
        "model_args": _option(dict, "what", _PAIRS,
            "arguments of the model type, and those of pruning that all models share"),
        **{name: _of_pruning(_texts, name, several=True) for name in SEVERAL},
        **{name: _of_pruning(_text, name) for name in SHARED},
        "floors": _option(_boolean, "what", "BOOL",
            "also evaluate models that know nothing, whose scores are the floors of the tasks (default: true)"),
    },
    "evaluation, as in lm_eval run": {
        "tasks": _option(_texts, "what", "TASK", "tasks, groups, tags, patterns or YAML files"),
        "output_path": _option(str, "where", "DIR", "folder of the sweep"),
        "limit": _option(float, "scores", "N", "documents per task: a count, or a share below 1"),
        "samples": _option(_samples, "scores", "JSON", "indices of documents by task, as JSON or a JSON file"),
        "batch_size": _option(str, "how", "SIZE", "a number, auto, or auto:N (default: 1)"),
        "max_batch_size": _option(int, "how", "N", "upper bound of auto"),
        "num_fewshot": _option(int, "scores", "N", "examples in the context"),
        "apply_chat_template": _option(_name_or_flag, "scores", "NAME",
            "wrap prompts in the chat template, or in the one with this name"),
        "fewshot_as_multiturn": _option(_boolean, "scores", "BOOL", "pass examples as turns of a conversation"),
        "system_instruction": _option(str, "scores", "TEXT", "system prompt"),
        "gen_kwargs": _option(dict, "scores", _PAIRS, "arguments of generation"),
        "device": _option(str, "how", "DEVICE", "such as cuda:0 or cpu"),
        "log_samples": _option(_boolean, "scores", "BOOL",
            "write every document's outputs (default here: true)"),
        "predict_only": _option(bool, "scores", None, "write outputs, compute no metric"),
        "use_cache": _option(str, "how", "PREFIX",
            "prefix of the files that cache responses, one file per configuration"),
        "include_path": _option(str, "what", "DIR", "folder of more tasks"),
        "metadata": _option(dict, "what", _PAIRS, "more arguments for tasks"),
        "seed": _option(_text, "what", "N", "seeds of python, numpy, torch and few-shot choice"),
        "trust_remote_code": _option(bool, "what", None, "run code that comes with models and data"),
        "confirm_run_unsafe_code": _option(bool, "what", None, "run tasks marked as unsafe"),
    },
    "logging and tracking, as in lm_eval run": {
        "wandb_args": _option(dict, "where", _PAIRS, "arguments of wandb.init; each unit is one run"),
        "wandb_config_args": _option(dict, "where", _PAIRS, "more entries for the config of each W&B run"),
        "trackio_args": _option(dict, "where", _PAIRS, "arguments of trackio.init; each unit is one run"),
    },
    "where the units run": {
        "unit_timeout": _option(float, "where", "SECONDS",
            "end a unit that takes longer, with loading its model, and record it as failed (default: no limit)"),
        "ray": _option(_name_or_flag, "where", "ADDRESS",
            "run on the Ray cluster at this address; without an address, on the cluster in RAY_ADDRESS or "
            "one that runs here, else on one started for the sweep"),
        "gpus_per_unit": _option(float, "where", "N",
            "GPUs of one Ray worker (default: 1 where the cluster has any)"),
        "cpus_per_unit": _option(float, "where", "N",
            "CPUs of one Ray worker, and its threads (default: 1, and threads for the CPUs that are free)"),
    },
}
#: Options of a command alone.
WHICH = (
    declaring.row("--shard", "I/N",
        "run part I of N, counted from 0; or next: take units one by one, skipping those that another "
        "process has taken"),
    declaring.row("--retry_failed", "", "run failed units again"),
    declaring.row("--dry_run", "", "print the plan and evaluate nothing"),
)
# fmt: on
SweepOptions: Any = make_dataclass(
    "SweepOptions",
    [
        (name, Any, option)
        for group in GROUPS.values()
        for name, option in group.items()
    ],
    bases=(declaring.DeclaredOptions,),
)
OPTIONS = tuple(SweepOptions.declared().values())
#: Names of the options that the harness reads.
OF_HARNESS = tuple(
    name for title in GROUPS if title.endswith("lm_eval run") for name in GROUPS[title]
)


def deciding(*what: str) -> tuple[str, ...]:
    """Return the names of the options that decide this; see `_option`."""
    return tuple(
        option.name for option in OPTIONS if option.metadata["decides"] in what
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to `parser`; every one that was not given is None."""
    about = "YAML file of options; the command line takes precedence"
    parser.add_argument("--config", metavar="FILE", help=about)
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        declaring.add_options(group, map(SweepOptions.row, options))
    which = parser.add_argument_group("which units run")
    declaring.add_options(which, WHICH)


def read_options(
    arguments: argparse.Namespace, needs: Sequence[str] = ("output_path", "tasks")
) -> dict[str, Any]:
    """Return the checked options that were given, the command line before the file.

    ValueError for one of no use, or where one of `needs` is missing.
    """
    options = read_file(arguments.config) if arguments.config else {}
    options |= _checked(SweepOptions.parsed(arguments), "sweep")
    shared = {n: parse_number(options.pop(n)) for n in SHARED if n in options}
    if shared:
        options["model_args"] = declaring.merged(options.get("model_args", {}), shared)
    for name, example in {"output_path": "sweep", "tasks": "boolq"}.items():
        if name in needs and not options.get(name):
            raise ValueError(
                f"{name} was not given: add --{name} {example}, or the key to --config."
            )
    return options


def read_file(path: str) -> dict[str, Any]:
    """Return the checked options of a YAML file, or raise as `read_options` does."""
    import yaml

    try:
        content = dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise ValueError(
            f"--config {path} is not a YAML mapping of options such as `ratios: [3.6, 2.0]`: "
            f"{' '.join(str(error).split())}."
        ) from None
    options = {name: value for name, value in content.items() if value is not None}
    return _checked(options, f"--config {path}")


def _checked(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    converted = SweepOptions.of(options, where)
    return {name: getattr(converted, name) for name in options}


def read_mapping(value: Any, where: str) -> dict[str, Any]:
    """Return key=value pairs, JSON or a mapping as a mapping, or raise ValueError."""
    try:
        return declaring.mapping(value)
    except (TypeError, ValueError):
        expected = declaring.EXPECTED[dict]
        raise ValueError(f"{where} is {value!r}: pass {expected}.") from None


def parse_shard(text: str) -> tuple[int, int] | str:
    """Return ``(I, N)`` of ``I/N``, or ``next``; ValueError for anything else."""
    if text == "next":
        return text
    part = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if part is None or int(part[1]) >= int(part[2]):
        raise ValueError(
            f"--shard {text} is not I/N with I from 0 to N-1: pass one such as 0/4, or next."
        )
    return int(part[1]), int(part[2])


def parse_number(text: str) -> int | float | str:
    """Return a number, 2 for 2.0 as for 2, so that both are one configuration; else the text."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number
