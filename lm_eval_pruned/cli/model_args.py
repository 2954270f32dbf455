"""The options of commands that load one model: which, and how it is pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import DECLARED, take_prune_arguments
from lm_eval_pruned.util.options import merged, nearest, row


if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable

# fmt: off
MODEL_ARGS = row("--model_args", "KEY=VALUE",
                 "pretrained=NAME_OR_FOLDER and other arguments of loading and pruning, as in "
                 "lm_eval --model pruned-hf (default: SmolLM2-135M-Instruct)", nargs="+")
TRUST_REMOTE_CODE = row("--trust_remote_code", "", "run model code that comes with the model")
# fmt: on


def read(arguments: Namespace) -> dict[str, Any]:
    """Return ``--model_args``; raise ValueError if it is not a mapping."""
    from lm_eval_pruned.sweeps.options import read_mapping

    return read_mapping(arguments.model_args or {}, "--model_args")


def read_with_pruning(
    arguments: Namespace, options: Iterable[str], loading: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of loading and of pruning, of which some are `options` too.

    Raises:
        ValueError: One was given in both ways, or one of loading is not among `loading`.
    """
    model_args, known = read(arguments), ("pretrained", *loading)
    values = {name: getattr(arguments, name) for name in options}
    values = {name: value for name, value in values.items() if value is not None}
    pruning = merged(take_prune_arguments(model_args), values)
    if arguments.trust_remote_code:
        model_args["trust_remote_code"] = True
    for name, value in model_args.items():
        if name not in known:
            names = f"it knows {', '.join(known)} and the arguments of pruning."
            raise ValueError(
                f"model_args has {name}={value}, which {arguments.command} does not take: "
                f"{nearest(name, [*known, *DECLARED], names)}"
            )
    return model_args, pruning


def with_default_model(
    model_args: dict[str, Any], *, weights: bool = True
) -> dict[str, Any]:
    """Return arguments of loading that name a model; without `weights`, for its config alone."""
    if "pretrained" in model_args:
        return model_args
    from lm_eval_pruned.checkpoints import default_model

    if weights:
        return {**model_args, "pretrained": default_model.find_default_model()}
    return {**model_args, **default_model.find_default_config()}
