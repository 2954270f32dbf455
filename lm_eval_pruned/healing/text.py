"""The text that a pruned model is trained on, as blocks of tokens of one length."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_pruned.pruning.calibration import read_texts, token_ids


if TYPE_CHECKING:
    from collections.abc import Iterator

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
) -> Iterator[list[int]]:
    """Cut texts, with the end of text after each, into blocks of `length` tokens, as these are taken.

    What is left at the end is dropped; `file` is where the texts come from.

    Raises:
        ValueError: All texts together are shorter than a block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = chain.from_iterable([*token_ids(tokenizer, t), *end] for t in texts)
    block = [*islice(tokens, length)]
    if len(block) < length:
        raise ValueError(
            f"data={file} holds {len(block)} tokens, but each step needs blocks of "
            f"max_length={length}: pass more text or a smaller max_length."
        )
    while len(block) == length:
        yield block
        block = [*islice(tokens, length)]
