"""What ``pruned-vllm`` and the vLLM loader ``pruned`` are given. Nothing here imports vLLM."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.plan import PrunePlan


if TYPE_CHECKING:
    from collections.abc import Mapping

#: Name of our loader: ``--load-format pruned``.
LOAD_FORMAT = "pruned"

#: Names of the arguments of pruning.
NAMES = tuple(
    name
    for name, parameter in inspect.signature(
        PrunePlan.from_arguments
    ).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "available_layers"
)

#: Arguments of vLLM that are set here.
_OURS = {
    "load_format": "the weights are read by the loader that prunes",
    "gguf_file": "the blocks of a GGUF file cannot be sliced",
}


def split_arguments(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of pruning among `given`, and the others.

    From ``skip_layers=0,15`` the harness makes ``{"skip_layers": 0, "15": ""}``; such
    pieces are put together again.
    """
    own = {name: given[name] for name in NAMES if given.get(name) is not None}
    others = {name: value for name, value in given.items() if name not in NAMES}
    pieces = [
        name
        for name, value in others.items()
        if value == "" and re.fullmatch(r"\d+(-\d+)?[\])]?", name)
    ]
    for name in ("layers", "skip_layers"):
        if name in own and pieces:
            own[name] = [own[name], *pieces]
            others = {n: value for n, value in others.items() if n not in pieces}
            break
    return own, others


def check_vllm_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of ``vllm`` that would take pruning from the loader's hands.

    Raises:
        ValueError: One of them was given.
    """
    for name, why in _OURS.items():
        value = arguments.get(name)
        if value is not None and (name, value) != ("load_format", LOAD_FORMAT):
            raise ValueError(
                f"{name}={value} cannot be combined with pruning while vLLM loads, because {why}: "
                "leave it out, or use --model vllm."
            )
    quantization = arguments.get("quantization")
    if quantization in _OF_CHECKPOINTS:
        raise ValueError(
            f"quantization={quantization} is for checkpoints that are quantised already, whose "
            "neurons can be neither ranked nor sliced: pass one that quantises while loading, "
            "such as fp8, or leave it out."
        )


#: Methods of vLLM that read quantised weights, or that bring a loader of their own.
_OF_CHECKPOINTS = ("awq", "awq_marlin", "gptq", "gptq_marlin", "gguf")
