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

#: Of text of your own, one block in so many is held; of any text, at most `_MOST_HELD`.
_HELD_ONE_IN, _MOST_HELD = 24, 32
#: What is held where the text of this package is trained on. No default calibrates on it, and no verdict
#: or table of costs scores it: a cut repaired on held text would look better there than it is.
STOPPING_TEXT = Path(__file__).with_name("stopping_text.jsonl")


@dataclass(frozen=True)
class TrainingText:
    """Blocks of equal length.

    Attributes:
        blocks: To train on, shape (n, length), int64.
        held: To measure the loss on, shape (m, length), int64.
        about: Name, SHA-256 and number of the texts; tokens of the blocks to train on; the limit that was
            given; what is held.
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
    """Cut texts, with the end of text after each, into blocks, and shuffle these.

    Held are blocks of `STOPPING_TEXT` where the text of this package is among the sources, otherwise one
    block in 24 of the text, and at most 32. What is left at the end is dropped.

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
    ids: list[int] = []
    texts, digest = 0, hashlib.sha256()
    for source in sources:
        streamed = source.startswith(DATASET)
        if not streamed:
            digest.update(Path(source).read_bytes())
        began = len(ids)
        for text in _texts(source, argument):
            added = _ended(text, tokenizer)
            ids += added
            texts += 1
            if streamed:
                digest.update(json.dumps(added).encode())
                if tokens is not None and len(ids) - began >= tokens:
                    break
    if len(ids) < 2 * length:
        raise ValueError(
            f"{argument}={','.join(sources)} holds {len(ids)} tokens, but training takes at least "
            f"two blocks of max_length={length}: pass more text or a smaller max_length."
        )
    blocks = _blocks(ids, length)
    blocks = blocks[
        torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    ]
    if str(OWN_TEXT) in sources:
        held, held_from = _stopping_blocks(tokenizer, length), "the package's"
    else:
        count = min(-(-len(blocks) // _HELD_ONE_IN), _MOST_HELD)
        held, blocks = blocks[:count], blocks[count:]
        held_from = f"one block in {_HELD_ONE_IN}"
    if tokens is not None:
        blocks = blocks[: max(1, tokens // length)]
    about = {
        "file": ",".join(_name(source) for source in sources),
        "sha256": digest.hexdigest(),
        "texts": texts,
        "tokens": blocks.numel(),
        "limit": tokens,
        "held": held_from,
    }
    return TrainingText(blocks, held, about)


def _stopping_blocks(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Return the blocks of `STOPPING_TEXT`, shape (m, length).

    Raises:
        ValueError: It is shorter than a block.
    """
    ids: list[int] = []
    for text in read_texts(str(STOPPING_TEXT)):
        ids += _ended(text, tokenizer)
    if len(ids) < length:
        raise ValueError(
            f"max_length={length} exceeds the {len(ids)} tokens of the text that this package holds to tell "
            f"when to stop: pass at most {len(ids)}, or text of your own."
        )
    return _blocks(ids, length)[:_MOST_HELD]


def _ended(text: Text, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*token_ids(tokenizer, text), *end]


def _blocks(ids: list[int], length: int) -> Tensor:
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def _name(source: str) -> str:
    if source == str(OWN_TEXT):
        return "the text of lm-eval-pruned"
    return source if source.startswith(DATASET) else Path(source).name


def _texts(source: str, argument: str) -> Iterator[Text]:
    if source.startswith(DATASET):
        yield from dataset_rows(source, argument)
    elif not Path(source).is_file():
        raise ValueError(
            f"{argument}={source} is not a file: pass JSON Lines, a .txt file, or dataset:NAME."
        )
    elif Path(source).suffix.lower() != ".txt":
        yield from read_texts(source, argument=argument)
    else:
        try:
            yield Path(source).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{argument}={source} cannot be read ({error}): pass a text in UTF-8."
            ) from None
