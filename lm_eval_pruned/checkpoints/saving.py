"""Saving a model that is in memory as an ordinary checkpoint."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lm_eval_pruned.checkpoints.companions import copy_companions, write_config


if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from lm_eval_pruned.checkpoints.request import LoadRequest


def check_output(output: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ValueError: It does.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"output={output} exists and is not an empty folder: pass a new one."
        )


def save_loaded(
    model: PreTrainedModel,
    request: LoadRequest,
    source: Path,
    folder: Path,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write a model and what stays true of it from its source: everything but the model card.

    Args:
        model: The model, as it is to be saved.
        request: What it was loaded from.
        source: Folder of the files beside the source's weights.
        folder: Folder to write to.
        max_shard_size: Largest size of a weight file.
    """
    from transformers import GenerationConfig

    if request.model_arguments.get("gguf_file") is None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        copy_companions(source, folder)
        write_config(request.widths.whole.original, model, source, folder)
        return
    request.load_tokenizer().save_pretrained(folder)
    with contextlib.suppress(AttributeError):
        del model.config.quantization_config
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
