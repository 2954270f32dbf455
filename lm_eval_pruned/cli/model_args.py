"""The options of commands that load one model: which, how it is pruned, where results go."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import DECLARED, take_prune_arguments
from lm_eval_pruned.util.options import merged, nearest


if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Declare ``--model_args``."""
    parser.add_argument(
        "--model_args",
        nargs="+",
        metavar="KEY=VALUE",
        help="pretrained=NAME_OR_FOLDER and other arguments of loading and pruning, as in "
        "lm_eval --model pruned-hf (default: SmolLM2-135M-Instruct)",
    )


def add_output_path(parser: argparse.ArgumentParser, text: str) -> None:
    """Declare ``--output_path``."""
    parser.add_argument("--output_path", required=True, metavar="DIR", help=text)


def read_model_args(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return ``--model_args``; raise ValueError where it is no mapping."""
    from lm_eval_pruned.sweeps.options import read_mapping

    return read_mapping(arguments.model_args or {}, "--model_args")


def pruning_of(
    arguments: argparse.Namespace,
    model_args: dict[str, Any],
    options: Iterable[str] = DECLARED,
) -> dict[str, Any]:
    """Take the arguments of pruning out of `model_args`, and add those given as `options`.

    Raises:
        ValueError: One was given in both ways.
    """
    given = {
        name: value
        for name in options
        if (value := getattr(arguments, name)) != DECLARED[name].default
    }
    return merged(take_prune_arguments(model_args), given)


def refuse_others(
    model_args: dict[str, Any], known: tuple[str, ...], command: str
) -> None:
    """Raise ValueError for an argument of loading that the command has no use for."""
    known = ("pretrained", *known)
    for name in [each for each in model_args if each not in known]:
        names = f"it knows {', '.join(known)} and the arguments of pruning."
        raise ValueError(
            f"model_args has {name}={model_args[name]}, which {command} does not take: "
            f"{nearest(name, [*known, *DECLARED], names)}"
        )


def with_default_model(given: dict[str, Any], doing: str) -> dict[str, Any]:
    """Return arguments of loading that name a model; `doing` is for the notice of the default.

    Raises:
        OSError: The default model is wanted and cannot be had.
    """
    if "pretrained" in given:
        return given
    from lm_eval_pruned.checkpoints.default_model import find_default_model

    default = find_default_model()
    print(f"pretrained was not given: {doing} {default.source}.", file=sys.stderr)
    return given | default.model_args()
