"""What a sweep can be asked for: the options of ``lm-eval-pruned sweep`` and of its YAML file.

One table describes both, so that a key of the file is an option of the command
without its dashes. Names and meanings are those of ``lm_eval run`` wherever it
has the option. Nothing here imports torch or the harness.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.healing.options import DECLARED as HEALING
from lm_eval_pruned.pruning.arguments import DECLARED, SEVERAL, SIZES, help_of
from lm_eval_pruned.sweeps.option_kinds import checked


if TYPE_CHECKING:
    import argparse


@dataclass(frozen=True)
class Option:
    """One option of the command and one key of the YAML file.

    Attributes:
        name: Name in both.
        kind: Key of `option_kinds.KINDS`: what a value must be.
        help: Line for ``--help``.
        metavar: Placeholder for ``--help``.
        group: Heading for ``--help``.
        decides: What it decides: ``scores`` or files of a unit, as an argument of
            `lm_eval.simple_evaluate`; ``how`` units are run, so that a sweep may go on
            under another (a smaller batch after running out of memory, another device);
            ``where`` they run and what they write lies; or else what is evaluated.
    """

    name: str
    kind: str
    help: str
    metavar: str | None = None
    group: str = "evaluation, as in lm_eval run"
    decides: str = "what"


_SIZES = "configurations"
_PLACE = "where the units run"
_TRACKING = "logging and tracking, as in lm_eval run"
#: Arguments of pruning of which all models of a sweep have one value.
SHARED = tuple(name for name in DECLARED if name not in (*SIZES, *SEVERAL.values()))

OPTIONS = (
    Option(
        "model",
        "text",
        "pruned-hf (default) or pruned-vllm",
        "NAME",
        _SIZES,
    ),
    Option(
        "model_args",
        "mapping",
        "arguments of the model type, those of pruning that all models share among them",
        "KEY=VALUE",
        _SIZES,
    ),
    *(
        Option(
            name,
            "words" if name in ("criteria", "widths", "allocations") else "numbers",
            help_of(name, several=True),
            DECLARED[argument].metadata["metavar"],
            _SIZES,
        )
        for name, argument in SEVERAL.items()
    ),
    *(
        Option(
            name,
            "text",
            help_of(name),
            DECLARED[name].metadata.get("metavar", name.upper()),
            _SIZES,
        )
        for name in SHARED
    ),
    Option(
        "heal",
        "mapping",
        "train each pruned model again and evaluate it before and after: data=FILE and the "
        f"options of lm-eval-pruned heal ({', '.join(HEALING)})",
        "KEY=VALUE",
        _SIZES,
    ),
    Option("tasks", "words", "tasks, groups, tags, patterns or YAML files", "TASK"),
    Option("output_path", "text", "folder of the sweep", "DIR", decides="where"),
    Option(
        "limit",
        "number",
        "documents per task: a count, or a share below 1",
        "N",
        decides="scores",
    ),
    Option(
        "samples",
        "samples",
        "JSON or a file: documents per task, by index",
        "JSON",
        decides="scores",
    ),
    Option(
        "batch_size",
        "text",
        "a number, auto, or auto:N (default: 1)",
        "SIZE",
        decides="how",
    ),
    Option("max_batch_size", "integer", "upper bound of auto", "N", decides="how"),
    Option("num_fewshot", "integer", "examples in the context", "N", decides="scores"),
    Option(
        "apply_chat_template",
        "flag_or_text",
        "wrap prompts in the chat template, or in the one of this name",
        "NAME",
        decides="scores",
    ),
    Option(
        "fewshot_as_multiturn",
        "boolean",
        "examples as turns of a conversation",
        "BOOL",
        decides="scores",
    ),
    Option("system_instruction", "text", "system prompt", "TEXT", decides="scores"),
    Option(
        "gen_kwargs",
        "mapping",
        "arguments of generation",
        "KEY=VALUE",
        decides="scores",
    ),
    Option("device", "text", "such as cuda:0 or cpu", "DEVICE", decides="how"),
    Option(
        "log_samples",
        "boolean",
        "write every document's outputs (default here: true)",
        "BOOL",
        decides="scores",
    ),
    Option(
        "predict_only", "flag", "write outputs, compute no metric", decides="scores"
    ),
    Option(
        "use_cache",
        "text",
        "prefix of the files that cache responses, one file per configuration",
        "PREFIX",
        decides="how",
    ),
    Option("include_path", "text", "folder of more tasks", "DIR"),
    Option("metadata", "mapping", "more arguments for tasks", "KEY=VALUE"),
    Option("seed", "text", "seeds of python, numpy, torch and few-shot choice", "N"),
    Option("trust_remote_code", "flag", "run code that comes with models and data"),
    Option("confirm_run_unsafe_code", "flag", "run tasks marked as unsafe"),
    *(
        Option(name, "mapping", words, "KEY=VALUE", _TRACKING, decides="where")
        for name, words in (
            ("wandb_args", "arguments of wandb.init; each unit is a run of its own"),
            ("wandb_config_args", "what the config of each W&B run holds besides"),
            ("trackio_args", "arguments of trackio.init; each unit is a run"),
            ("hf_hub_log_args", "whether and where results go to the Hub"),
        )
    ),
    Option(
        "ray",
        "flag_or_text",
        "run on the Ray cluster at this address; without one, on the cluster that "
        "RAY_ADDRESS names or that runs here, else on one started for the sweep",
        "ADDRESS",
        _PLACE,
        decides="where",
    ),
    Option(
        "gpus_per_unit",
        "number",
        "GPUs of one Ray worker (default: 1 where the cluster has any)",
        "N",
        _PLACE,
        decides="where",
    ),
    Option(
        "cpus_per_unit",
        "number",
        "CPUs of one Ray worker (default: 1)",
        "N",
        _PLACE,
        decides="where",
    ),
    Option(
        "stop_when",
        "text",
        "decided, or decided:MARGIN: stop a unit when its difference to the unpruned "
        "model is shown, or equivalence within the margin (such as 1pt)",
        "RULE",
        "fewer documents",
    ),
)


#: What argparse has to know of a kind; other kinds are one word.
_ARGPARSE: dict[str, dict[str, Any]] = {
    "flag": {"action": "store_true", "default": None},
    **{key: {"nargs": "+"} for key in ("numbers", "words", "mapping")},
    **{key: {"nargs": "?", "const": True} for key in ("flag_or_text", "boolean")},
}


def deciding(what: str) -> tuple[str, ...]:
    """Return the names of the options that decide this; see `Option`."""
    return tuple(option.name for option in OPTIONS if option.decides == what)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to `parser`; every one that was not given is None."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of options; those of the command line win",
    )
    groups: dict[str, Any] = {}
    for option in OPTIONS:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        group = groups[option.group]
        metavar = {"metavar": option.metavar} if option.metavar else {}
        group.add_argument(
            f"--{option.name}",
            help=option.help,
            **metavar,
            **_ARGPARSE.get(option.kind, {}),
        )
    how = parser.add_argument_group("which units run")
    how.add_argument(
        "--shard",
        metavar="I/N",
        help="run part I of N, I from 0 to N-1; the parts share the folder and need not "
        "know of each other",
    )
    how.add_argument(
        "--retry_failed", action="store_true", help="run failed units again"
    )
    how.add_argument(
        "--dry_run", action="store_true", help="print the plan and evaluate nothing"
    )


def read_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given, the command line before the file.

    Args:
        arguments: What a parser prepared by `add_arguments` parsed.

    Returns:
        Checked values by name; an option that was not given is absent.

    Raises:
        ValueError: One sentence naming the key or option, its value and what works.
        OSError: The file cannot be read.
    """
    given = {
        option.name: getattr(arguments, option.name)
        for option in OPTIONS
        if getattr(arguments, option.name, None) is not None
    }
    options = read_file(arguments.config) if arguments.config else {}
    for option in OPTIONS:
        if option.name in given:
            options[option.name] = checked(
                option.kind, given[option.name], f"--{option.name}"
            )
    shared = {n: parse_number(options.pop(n)) for n in SHARED if n in options}
    model_args = options.get("model_args", {})
    for name in shared.keys() & model_args.keys():
        raise ValueError(
            f"{name} was given twice, as --{name} {shared[name]} and as "
            f"{name}={model_args[name]} in --model_args: leave one of them out."
        )
    if shared:
        options["model_args"] = {**model_args, **shared}
    for name, example in (
        ("output_path", "--output_path sweep"),
        ("tasks", "--tasks boolq"),
    ):
        if not options.get(name):
            raise ValueError(
                f"{name} was not given: add {example}, or the key to --config."
            )
    return options


def read_file(path: str) -> dict[str, Any]:
    """Return the checked options of a YAML file.

    Raises:
        ValueError: The file is no YAML mapping, or a key or a value is not usable.
        OSError: The file cannot be read.
    """
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
    known = {option.name: option for option in OPTIONS}
    options = {}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
            raise ValueError(f"--config {path} has the unknown key {key}: {hint}")
        if value is not None:
            options[key] = checked(known[key].kind, value, f"{key} in {path}")
    return options


def parse_shard(text: str) -> tuple[int, int]:
    """Return ``(I, N)`` of ``I/N``.

    Raises:
        ValueError: `text` is something else, or I is not below N.
    """
    part, slash, parts = text.partition("/")
    if not (slash and part.isascii() and part.isdigit() and parts.isdigit()):
        raise ValueError(
            f"--shard {text} is not of the form I/N: pass one such as 0/4."
        )
    if int(part) >= int(parts):
        raise ValueError(
            f"--shard {text} is not a part of {parts}: I counts from 0, so pass 0/{parts} "
            f"to {max(int(parts) - 1, 0)}/{parts}."
        )
    return int(part), int(parts)


def parse_number(text: str) -> int | float | str:
    """Return a size as `lm_eval run` would read it from ``--model_args``."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
