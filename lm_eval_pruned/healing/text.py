"""Text to train on: blocks of tokens, and a held share that no step is taken on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.arguments import OWN_TEXT
from lm_eval_pruned.pruning.calibration_text import (
    DATASET,
    dataset_rows,
    read_texts,
    token_ids,
)


if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.calibration_text import Text

#: One block in so many is held, and at most `_MOST_HELD`.
_HELD_ONE_IN, _MOST_HELD = 24, 32


@dataclass(frozen=True)
class TrainingText:
    """Blocks of equal length.

    Attributes:
        blocks: To train on, shape (n, length), int64.
        held: To measure the loss on, shape (m, length), int64.
        about: Name, SHA-256 and number of the texts; tokens of all blocks; the limit that was given.
    """

    blocks: Tensor
    held: Tensor
    about: dict[str, Any] = field(default_factory=dict)


def check_sources(sources: list[str], argument: str) -> None:
    """Refuse a file that cannot be used, or a dataset whose first row cannot.

    Raises:
        ValueError: Names `argument` and the source.
    """
    for source in sources:
        next(_texts(source, argument))


def training_text(
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    argument: str,
    tokens: int | None = None,
) -> TrainingText:
    """Cut texts, with the end of text after each, into blocks, shuffle these, and hold some.

    What is left at the end is dropped.

    Args:
        sources: JSON Lines as `read_texts` takes them, files ``.txt``, which count as one text, or
            datasets, ``dataset:NAME`` or ``dataset:NAME:CONFIG``.
        tokenizer: That of the model.
        length: Tokens of a block.
        argument: What messages call the sources.
        tokens: So many are trained on at most, and a dataset is read no further; a file is read
            whole.

    Raises:
        ValueError: A source cannot be read, or all texts together are shorter than two blocks.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    texts, digest = 0, hashlib.sha256()
    for source in sources:
        streamed = source.startswith(DATASET)
        if not streamed:
            digest.update(Path(source).read_bytes())
        began = len(ids)
        for text in _texts(source, argument):
            added = [*token_ids(tokenizer, text), *end]
            ids += added
            texts += 1
            if streamed:
                digest.update(json.dumps(added).encode())
                if tokens is not None and len(ids) - began >= tokens:
                    break
    if len(ids) < 2 * length:
        raise ValueError(
            f"{argument}={','.join(sources)} holds {len(ids)} tokens, but training takes at least "
            f"two blocks of max_length={length}, one of which is held: pass more text or a smaller "
            "max_length."
        )
    blocks = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    blocks = blocks[
        torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    ]
    held = min(-(-len(blocks) // _HELD_ONE_IN), _MOST_HELD)
    if tokens is not None:
        blocks = blocks[: held + max(1, tokens // length)]
    about = {
        "file": ",".join(_name(source) for source in sources),
        "sha256": digest.hexdigest(),
        "texts": texts,
        "tokens": blocks.numel(),
        "limit": tokens,
    }
    return TrainingText(blocks[held:], blocks[:held], about)


def _name(source: str) -> str:
    if source == str(OWN_TEXT):
        return "the text of lm-eval-pruned"
    return source if source.startswith(DATASET) else Path(source).name


def _texts(source: str, argument: str) -> Iterator[Text]:
    if source.startswith(DATASET):
        yield from dataset_rows(source, argument)
    elif Path(source).suffix.lower() != ".txt":
        yield from read_texts(source, argument=argument)
    else:
        try:
            yield Path(source).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{argument}={source} cannot be read ({error}): pass a text in UTF-8."
            ) from None
