"""The text that a pruned model is trained on, as blocks of tokens of one length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lm_eval_pruned.pruning.calibration import read_texts, token_ids


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.calibration import Text


def texts_of(file: str) -> list[Text]:
    """Read JSON Lines as `read_texts` does, or a file ``.txt``, which counts as one text.

    Raises:
        ValueError: The file is missing, empty or of another form.
    """
    if Path(file).suffix.lower() != ".txt":
        return read_texts(file, argument="data")
    try:
        return [Path(file).read_text(encoding="utf-8")]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data={file} cannot be read ({error}): pass a text in UTF-8."
        ) from None


def token_blocks(
    file: str, texts: list[Text], tokenizer: PreTrainedTokenizerBase, length: int
) -> Tensor:
    """Cut texts, with the end of text after each, into blocks of `length` tokens.

    What is left at the end is dropped; `file` is where the texts come from. Returns shape
    (blocks, length), int64.

    Raises:
        ValueError: All texts together are shorter than a block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for text in texts:
        tokens += [*token_ids(tokenizer, text), *end]
    if len(tokens) < length:
        raise ValueError(
            f"data={file} holds {len(tokens)} tokens, but each step needs blocks of "
            f"max_length={length}: pass more text or a smaller max_length."
        )
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
