"""The texts that are generated from, and batches of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Batch:
    """Prompts that run together, left-padded.

    Attributes:
        ids: Token ids, shape (rows, length).
        mask: 1 for a token and 0 for padding, shape (rows, length).
    """

    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.mask.sum())


def read_prompts(path: Path) -> list[str]:
    """Read prompts from ``.jsonl`` (key ``prompt``) or ``.txt`` (one prompt a line).

    Raises:
        ValueError: The file has another ending, a line without a prompt, or no prompt.
        OSError: The file cannot be read.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"prompts={path} ends in {path.suffix or 'nothing'}: pass a .jsonl file with a key "
            '"prompt" in each line, or a .txt file with one prompt a line.'
        )
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"] if path.suffix == ".jsonl" else line
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise ValueError(
                f"prompts={path}: line {number} is no JSON object with a text under the "
                'key "prompt".'
            )
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"prompts={path} holds no prompt.")
    return prompts


def demo_prompts() -> list[str]:
    """Return the prompts of the demo task for instruction following."""
    import lm_eval_pruned.tasks

    folder = Path(lm_eval_pruned.tasks.__path__[0])
    return read_prompts(folder / "demo" / "instructions.jsonl")


def make_batches(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    device: str,
    *,
    chat: bool = False,
) -> list[Batch]:
    """Tokenise prompts into left-padded batches, in their order."""
    if chat:
        prompts = [
            tokenizer.apply_chat_template(  # type: ignore[misc]
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
    batches = []
    for start in range(0, len(prompts), batch_size):
        encoded = tokenizer(
            list(prompts[start : start + batch_size]),
            padding=True,
            padding_side="left",
            add_special_tokens=not chat,
            return_tensors="pt",
        ).to(device)
        batches.append(Batch(encoded["input_ids"], encoded["attention_mask"]))
    return batches
