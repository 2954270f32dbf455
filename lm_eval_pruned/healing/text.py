"""The text that a pruned model is trained on, as blocks of tokens of one length."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.calibration import read_texts, token_ids


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.calibration import Text


@dataclass(frozen=True)
class HealingText:
    """Text to train on.

    Attributes:
        path: The file.
        sha256: SHA-256 of the file.
        texts: How many texts it holds.
        blocks: Tokens, shape (blocks, tokens of each), int64.
    """

    path: Path
    sha256: str
    texts: int
    blocks: Tensor

    @classmethod
    def of(
        cls,
        file: str,
        texts: list[Text],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
    ) -> HealingText:
        """Put texts one after the other and cut them into blocks.

        Between two texts stands the tokenizer's end of text, where it has one. What is
        left at the end is dropped.

        Args:
            file: Where the texts come from.
            texts: What `texts_of` read.
            tokenizer: The model's tokenizer.
            length: Tokens of each block.

        Raises:
            ValueError: All texts together are shorter than a block.
        """
        stream = _stream(file, texts, tokenizer, length)
        count = len(stream) // length
        blocks = torch.tensor(stream[: count * length]).view(count, length)
        return cls(Path(file), digest_of(file), len(texts), blocks)

    def examples(self) -> list[dict[str, Tensor]]:
        """Return the blocks as a data set for `transformers.Trainer`."""
        return [{"input_ids": block, "labels": block} for block in self.blocks]

    def as_dict(self) -> dict[str, Any]:
        """Return what the record of a healing holds (JSON types only)."""
        return {
            "file": self.path.name,
            "sha256": self.sha256,
            "texts": self.texts,
            "tokens": self.blocks.numel(),
        }


def check_length(
    file: str, texts: list[Text], tokenizer: PreTrainedTokenizerBase, length: int
) -> None:
    """Refuse texts that together are shorter than a block, without reading more than one.

    Raises:
        ValueError: They are.
    """
    _stream(file, texts, tokenizer, length, enough=length)


def digest_of(file: str) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _stream(
    file: str,
    texts: list[Text],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    enough: int | None = None,
) -> list[int]:
    """Return the tokens of all texts, or of the first that together have `enough`."""
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for text in texts:
        stream += token_ids(tokenizer, text)
        if end is not None:
            stream.append(end)
        if enough is not None and len(stream) >= enough:
            break
    if len(stream) < length:
        raise ValueError(
            f"data={file} holds {len(stream)} tokens, but each step needs blocks of "
            f"max_length={length}: pass more text or a smaller max_length."
        )
    return stream


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
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data={file} cannot be read ({error}): pass a text in UTF-8."
        ) from None
    if not text.strip():
        raise ValueError(f"data={file} holds no text: pass a file with some.")
    return [text]
