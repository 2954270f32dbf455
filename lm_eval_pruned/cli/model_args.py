"""The options of commands that load one model: which, how it is pruned, where results go."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import DECLARED, take_prune_arguments


if TYPE_CHECKING:
    from collections.abc import Iterable


class OldName(argparse.Action):
    """An option by the name that it had before: it works, and says its name of today."""

    def __init__(self, option_strings: Any, dest: str, *, now: str) -> None:
        super().__init__(option_strings, dest, help=argparse.SUPPRESS)
        self.now = now

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: Any = None
    ) -> None:
        print(
            f"{parser.prog}: {option_string} is an old name, write {self.now} instead",
            file=sys.stderr,
        )
        setattr(namespace, self.dest, values)


def add_model_args(parser: argparse.ArgumentParser, *old: str) -> None:
    """Declare ``--model_args``.

    Args:
        parser: Of the command.
        old: Arguments of loading that used to be options of the command.
    """
    parser.add_argument(
        "--model_args",
        nargs="+",
        metavar="KEY=VALUE",
        help="pretrained=NAME_OR_FOLDER and other arguments of loading and pruning, as in "
        "lm_eval --model pruned-hf (default: SmolLM2-135M-Instruct)",
    )
    for name in old:
        parser.add_argument(
            f"--{name}", action=OldName, now=f"--model_args {name}=VALUE"
        )
    parser.set_defaults(old_model_args=old)


def add_output_path(parser: argparse.ArgumentParser, text: str) -> None:
    """Declare ``--output_path``, which was ``--output``."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--output_path", metavar="DIR", help=text)
    group.add_argument(
        "--output", dest="output_path", action=OldName, now="--output_path"
    )


def read_model_args(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return ``--model_args``, with those that were given by their old options.

    Raises:
        ValueError: It is no mapping, or names an argument that was given as an option too.
    """
    from lm_eval_pruned.sweeps.options import checked

    given: dict[str, Any] = {}
    if arguments.model_args:
        given = checked("mapping", arguments.model_args, "--model_args")
    old = {
        name: value
        for name in arguments.old_model_args
        if (value := getattr(arguments, name)) is not None
    }
    return merged(given, old)


def pruning_of(
    arguments: argparse.Namespace,
    model_args: dict[str, Any],
    options: Iterable[str] = DECLARED,
) -> dict[str, Any]:
    """Return the arguments of pruning that were given as options or in `model_args`.

    Args:
        arguments: Parsed.
        model_args: Those of pruning are taken out of it.
        options: Those that are options of the command.

    Raises:
        ValueError: One was given in both ways.
    """
    given = {
        name: value
        for name in options
        if (value := getattr(arguments, name)) != DECLARED[name].default
    }
    return merged(take_prune_arguments(model_args), given)


def merged(model_args: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return both, and raise ValueError for an argument that is in both."""
    for name in options.keys() & model_args.keys():
        raise ValueError(
            f"{name} was given twice, as --{name} {options[name]} and as "
            f"{name}={model_args[name]} in --model_args: leave one of them out."
        )
    return model_args | options


def refuse_others(
    model_args: dict[str, Any], known: tuple[str, ...], command: str
) -> None:
    """Raise ValueError for an argument of loading that the command has no use for."""
    known = ("pretrained", *known)
    for name, value in model_args.items():
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *DECLARED], n=1)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else f"it knows {', '.join(known)} and the arguments of pruning."
            )
            raise ValueError(
                f"model_args has {name}={value}, which {command} does not take: {hint}"
            )


def with_default_model(given: dict[str, Any], doing: str) -> dict[str, Any]:
    """Return arguments of loading that name a model.

    Args:
        given: Those of the user.
        doing: What is done to the default model, for the notice that it is taken.

    Raises:
        OSError: The default model is wanted and cannot be had.
    """
    if "pretrained" in given:
        return given
    from lm_eval_pruned.checkpoints.default_model import find_default_model

    default = find_default_model()
    print(f"pretrained was not given: {doing} {default.source}.", file=sys.stderr)
    return given | default.model_args()
