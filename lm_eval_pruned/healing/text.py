"""The text that a pruned model is trained on, as blocks of tokens of one length."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_pruned.pruning.calibration import read_texts, token_ids


if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.calibration import Text


def texts_of(file: str) -> list[Text]:
    """Read text to train on.

    Args:
        file: JSON Lines file as `lm_eval_pruned.pruning.calibration.read_texts` reads it, or a
            plain text in UTF-8 whose name ends in ``.txt``, which counts as one text.

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


def digest_of(file: str) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def token_blocks(
    file: str, texts: list[Text], tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[list[int]]:
    """Put texts one after the other and cut them into blocks of `length` tokens.

    Between two texts is the tokenizer's end of text, where it has one. What is left at
    the end is dropped. Texts are tokenised as blocks are taken; `file` is where they come from.

    Raises:
        ValueError: All texts together are shorter than a block.
    """
    end = tokenizer.eos_token_id
    tokens: list[int] = []
    found = False
    for text in texts:
        tokens += [*token_ids(tokenizer, text), *([] if end is None else [end])]
        for start in range(0, len(tokens) - length + 1, length):
            found = True
            yield tokens[start : start + length]
        tokens = tokens[len(tokens) // length * length :]
    if not found:
        raise ValueError(
            f"data={file} holds {len(tokens)} tokens, but each step needs blocks of "
            f"max_length={length}: pass more text or a smaller max_length."
        )
