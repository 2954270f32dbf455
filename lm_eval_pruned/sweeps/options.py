"""What a sweep can be asked for: the options of ``lm-eval-pruned sweep`` and of its YAML file.

One table describes both, so that a key of the file is an option of the command
without its dashes. Names and meanings are those of ``lm_eval run`` wherever it
has the option. Nothing here imports torch or the harness.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.healing.options import DECLARED as HEALING
from lm_eval_pruned.pruning.arguments import DECLARED, SEVERAL, SIZES, help_of
from lm_eval_pruned.util.options import merged, nearest


if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping


class Option(NamedTuple):
    """One option of the command and one key of the YAML file.

    Attributes:
        name: Name in both.
        kind: Key of `KINDS`: what a value must be.
        decides: ``scores`` or files of a unit, as an argument of `lm_eval.simple_evaluate`;
            ``how`` units are run, so that a sweep may go on under another, such as a smaller
            batch; ``where`` they run and what they write lies; or else ``what`` is evaluated.
        metavar: Placeholder for ``--help``; empty for a flag.
        help: Line for ``--help``.
    """

    name: str
    kind: str
    decides: str
    metavar: str
    help: str


#: Arguments of pruning of which all models of a sweep have one value.
SHARED = tuple(name for name in DECLARED if name not in (*SIZES, *SEVERAL.values()))
_WORDS = ("criteria", "widths", "allocations")
_PAIRS = "KEY=VALUE"
# fmt: off
#: The options under their headings for ``--help``.
GROUPS = {
    "configurations": (
        Option("model", "text", "what", "NAME", "pruned-hf (default) or pruned-vllm"),
        Option("model_args", "mapping", "what", _PAIRS,
               "arguments of the model type, and those of pruning that all models share"),
        *(Option(name, "words" if name in _WORDS else "numbers", "what",
                 DECLARED[argument].metadata["metavar"], help_of(name, several=True))
          for name, argument in SEVERAL.items()),
        *(Option(name, "text", "what", DECLARED[name].metadata["metavar"] or name.upper(), help_of(name))
          for name in SHARED),
        Option("heal", "mapping", "what", _PAIRS,
               "train each pruned model again and evaluate it before and after: data=FILE and the "
               f"options of lm-eval-pruned heal ({', '.join(HEALING)})"),
    ),
    "evaluation, as in lm_eval run": (
        Option("tasks", "words", "what", "TASK", "tasks, groups, tags, patterns or YAML files"),
        Option("output_path", "text", "where", "DIR", "folder of the sweep"),
        Option("limit", "number", "scores", "N", "documents per task: a count, or a share below 1"),
        Option("samples", "samples", "scores", "JSON", "JSON or a file: documents per task, by index"),
        Option("batch_size", "text", "how", "SIZE", "a number, auto, or auto:N (default: 1)"),
        Option("max_batch_size", "integer", "how", "N", "upper bound of auto"),
        Option("num_fewshot", "integer", "scores", "N", "examples in the context"),
        Option("apply_chat_template", "flag_or_text", "scores", "NAME",
               "wrap prompts in the chat template, or in the one of this name"),
        Option("fewshot_as_multiturn", "boolean", "scores", "BOOL", "examples as turns of a conversation"),
        Option("system_instruction", "text", "scores", "TEXT", "system prompt"),
        Option("gen_kwargs", "mapping", "scores", _PAIRS, "arguments of generation"),
        Option("device", "text", "how", "DEVICE", "such as cuda:0 or cpu"),
        Option("log_samples", "boolean", "scores", "BOOL",
               "write every document's outputs (default here: true)"),
        Option("predict_only", "flag", "scores", "", "write outputs, compute no metric"),
        Option("use_cache", "text", "how", "PREFIX",
               "prefix of the files that cache responses, one file per configuration"),
        Option("include_path", "text", "what", "DIR", "folder of more tasks"),
        Option("metadata", "mapping", "what", _PAIRS, "more arguments for tasks"),
        Option("seed", "text", "what", "N", "seeds of python, numpy, torch and few-shot choice"),
        Option("trust_remote_code", "flag", "what", "", "run code that comes with models and data"),
        Option("confirm_run_unsafe_code", "flag", "what", "", "run tasks marked as unsafe"),
    ),
    "logging and tracking, as in lm_eval run": (
        Option("wandb_args", "mapping", "where", _PAIRS, "arguments of wandb.init; each unit is one run"),
        Option("wandb_config_args", "mapping", "where", _PAIRS, "more entries for the config of each W&B run"),
        Option("trackio_args", "mapping", "where", _PAIRS, "arguments of trackio.init; each unit is one run"),
        Option("hf_hub_log_args", "mapping", "where", _PAIRS, "whether and where results go to the Hub"),
    ),
    "where the units run": (
        Option("ray", "flag_or_text", "where", "ADDRESS",
               "run on the Ray cluster at this address; without one, on the cluster that RAY_ADDRESS "
               "names or that runs here, else on one started for the sweep"),
        Option("gpus_per_unit", "number", "where", "N",
               "GPUs of one Ray worker (default: 1 where the cluster has any)"),
        Option("cpus_per_unit", "number", "where", "N", "CPUs of one Ray worker (default: 1)"),
    ),
    "fewer documents": (
        Option("stop_when", "text", "what", "RULE",
               "decided, or decided:MARGIN: stop a unit when its difference to the unpruned model is "
               "shown, or equivalence within the margin (such as 1pt)"),
    ),
}
# fmt: on
OPTIONS = tuple(option for group in GROUPS.values() for option in group)
#: Names of the options that the harness reads.
OF_HARNESS = tuple(
    option.name
    for title, group in GROUPS.items()
    if title.endswith("lm_eval run")
    for option in group
)


def deciding(*what: str) -> tuple[str, ...]:
    """Return the names of the options that decide this; see `Option`."""
    return tuple(option.name for option in OPTIONS if option.decides in what)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to `parser`; every one that was not given is None."""
    about = "YAML file of options; those of the command line win"
    parser.add_argument("--config", metavar="FILE", help=about)
    optional = {"nargs": "?", "const": True}
    shapes: dict[str, dict[str, Any]] = {
        **{kind: {"nargs": "+"} for kind in ("numbers", "words", "mapping")},
        **dict.fromkeys(("flag_or_text", "boolean"), optional),
    }
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, kind, _, metavar, about in options:
            shape = shapes.get(kind, {}) | {"metavar": metavar}
            if kind == "flag":
                shape = {"action": "store_true", "default": None}
            group.add_argument(f"--{name}", help=about, **shape)
    which = parser.add_argument_group("which units run")
    about = "run part I of N, I from 0 to N-1; the parts share the folder and need not know of each other"
    which.add_argument("--shard", metavar="I/N", help=about)
    for flag, about in (
        ("--retry_failed", "run failed units again"),
        ("--dry_run", "print the plan and evaluate nothing"),
    ):
        which.add_argument(flag, action="store_true", help=about)


def read_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the checked options that were given, the command line before the file.

    Raises:
        ValueError: One sentence naming the key or option, its value and what works.
        OSError: The file cannot be read.
    """
    options = read_file(arguments.config) if arguments.config else {}
    for option in OPTIONS:
        given = getattr(arguments, option.name, None)
        if given is not None:
            options[option.name] = checked(option.kind, given, f"--{option.name}")
    shared = {n: parse_number(options.pop(n)) for n in SHARED if n in options}
    if shared:
        options["model_args"] = merged(options.get("model_args", {}), shared)
    for name, example in (("output_path", "sweep"), ("tasks", "boolq")):
        if not options.get(name):
            raise ValueError(
                f"{name} was not given: add --{name} {example}, or the key to --config."
            )
    return options


def read_file(path: str) -> dict[str, Any]:
    """Return the checked options of a YAML file, or raise as `read_options` does."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--config {path} is not valid YAML: {' '.join(str(error).split())}."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(  # noqa: TRY004
            f"--config {path} holds a {type(content).__name__}, but a sweep is a mapping of "
            "options such as `ratios: [3.6, 2.0]`."
        )
    kinds = {option.name: option.kind for option in OPTIONS}
    for key in [key for key in content if key not in kinds]:
        hint = nearest(str(key), kinds)
        raise ValueError(f"--config {path} has the unknown key {key}: {hint}")
    return {
        key: checked(kinds[key], value, f"{key} in {path}")
        for key, value in content.items()
        if value is not None
    }


def parse_shard(text: str) -> tuple[int, int]:
    """Return ``(I, N)`` of ``I/N``; ValueError where that is no part."""
    found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(
            f"--shard {text} is not I/N with I from 0 to N-1: pass one such as 0/4."
        )
    return int(found[1]), int(found[2])


def parse_number(text: str) -> int | float | str:
    """Return a size as `lm_eval run` would read it from ``--model_args``."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def refuse_other_processes(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError where other processes evaluate, which an option cannot have."""
    size = os.environ.get("WORLD_SIZE") or "1"
    launched = f"the launcher (WORLD_SIZE={size})" if int(size) > 1 else None
    other = "--ray" if options.get("ray") else launched
    if other is not None:
        raise ValueError(
            f"{name} needs the sweep's folder in the one process that evaluates: leave out {other} "
            f"or {name}, or share the sweep out with --shard."
        )


def checked(kind: str, value: Any, where: str) -> Any:
    """Return a value as its kind has it, or raise ValueError, which names it by `where`."""
    expected, check = KINDS[kind]
    try:
        return check(value)
    except (TypeError, ValueError, OSError) as error:
        detail = f" ({error})" if str(error) else ""
        raise ValueError(f"{where} is {value!r}{detail}: pass {expected}.") from None


def _items(value: Any) -> list[str]:
    items = [part.strip() for part in _text(value).split(",") if part.strip()]
    if not items:
        raise ValueError
    return items


def _mapping(value: Any) -> dict[str, Any]:
    from lm_eval._cli.utils import key_val_to_dict

    if isinstance(value, dict):
        return value
    merged: dict[str, Any] = {}
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str):
            raise TypeError
        is_json = item.lstrip().startswith("{")
        merged |= json.loads(item) if is_json else key_val_to_dict(item)
    return merged


def _samples(value: Any) -> dict[str, list[int]]:
    if isinstance(value, str):
        is_json = value.lstrip().startswith("{")
        value = json.loads(value if is_json else Path(value).read_text("utf-8"))
    if not isinstance(value, dict):
        raise TypeError
    return value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value))
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    return str(value)


def _number(value: Any) -> float:
    number = float(str(value))
    if not 0 <= number < float("inf"):
        raise ValueError
    return number


def _boolean(value: Any) -> bool:
    word = str(value).lower()
    if word not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError
    return word in ("true", "1", "yes")


#: By name: what an error asks for, and the check, which returns the value or raises.
KINDS = {
    "numbers": ("one or more numbers", _items),
    "words": ("one or more names", _items),
    "mapping": ("key=value pairs or a mapping", _mapping),
    "samples": ('JSON such as {"boolq": [0, 1]}, or a file of it', _samples),
    "text": ("one value", _text),
    "integer": ("a whole number", lambda value: int(str(value))),
    "number": ("a number of 0 or more", _number),
    "boolean": ("true or false", _boolean),
    "flag": ("true or false", _boolean),
    "flag_or_text": (
        "true, false or a name",
        lambda value: value if isinstance(value, bool) else _text(value),
    ),
}
