"""What ``pruned-vllm`` and the vLLM loader ``pruned`` are given. Nothing here imports vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.arguments import DECLARED


if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval_pruned.pruning.arguments import PruneArguments

#: Name of our loader: ``--load-format pruned``.
LOAD_FORMAT = "pruned"

#: Arguments of vLLM that are set here.
_OURS = {
    "load_format": "the weights are read by the loader that prunes",
    "gguf_file": "the blocks of a GGUF file cannot be sliced",
}


def loader_config(arguments: PruneArguments) -> dict[str, Any]:
    """Return `arguments` as ``model_loader_extra_config`` holds them."""
    return {
        name: value
        for name, declared in DECLARED.items()
        if (value := getattr(arguments, name)) != declared.default
    }


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
