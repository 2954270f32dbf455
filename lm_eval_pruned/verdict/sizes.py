"""How many bytes the files take from which the model of a run was loaded."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache

from lm_eval_pruned.sweeps.plan import SOURCES
from lm_eval_pruned.util.options import mapping


if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval_pruned.results.files import Run

#: Arguments that name weights. Those of a merged adapter are part of the model's own.
_WEIGHTS = ("pretrained", "delta", "peft", "lora_local_path")
#: Names of files of weights, those that transformers prefers first.
_PATTERNS = ("*model*.safetensors", "*.safetensors", "*model*.bin")


def bytes_on_disk(run: Run) -> int | None:
    """Return the bytes of the weights of a run's model in its folder or the cache, adapters included.

    None where they are not on this machine, or no longer.
    """
    arguments: Mapping[str, Any] = {}
    with suppress(TypeError, ValueError):
        arguments = mapping(run.config.get("model_args") or {})
    named = [name for name in _WEIGHTS if arguments.get(name)]
    sizes = [_size(str(arguments[name]), name, arguments) for name in named]
    return sum(map(int, sizes)) if sizes and all(sizes) else None  # type: ignore[arg-type]


def _size(name: str, argument: str, arguments: Mapping[str, Any]) -> int:
    """Return the bytes of the weights that an argument names, 0 where there are none."""
    of_model = argument == "pretrained"
    folder: Path | None = Path(name)
    if not Path(name).is_dir():
        revision = arguments.get("revision") if of_model else None
        with suppress(ValueError):
            file = arguments.get("gguf_file") if of_model else None
            where = {"revision": revision, "cache_dir": arguments.get("download_dir")}
            found = try_to_load_from_cache(name, file or SOURCES[argument], **where)
            folder = Path(found).parent if isinstance(found, str) else None
    if folder is None:
        return 0
    if of_model and arguments.get("gguf_file"):
        file = folder / str(arguments["gguf_file"])
        return file.stat().st_size if file.is_file() else 0
    if of_model and arguments.get("subfolder"):
        folder /= str(arguments["subfolder"])
    files = next(filter(None, ([*folder.glob(each)] for each in _PATTERNS)), [])
    return sum(file.stat().st_size for file in files)
