"""The texts that are generated from, and batches of them."""

from __future__ import annotations

import contextlib
import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from lm_eval_pruned.profiling.options import ProfileRequest


def read_prompts(path: Path) -> list[str]:
    """Read prompts from ``.txt`` (one prompt a line) or JSON Lines (key ``prompt``).

    Raises:
        ValueError: A line has no prompt, or there is none.
        OSError: The file cannot be read.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line.strip()]
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if path.suffix != ".txt":
            prompts = [json.loads(line)["prompt"] for line in prompts]
        if prompts and all(isinstance(prompt, str) for prompt in prompts):
            return prompts
    raise ValueError(
        f"prompts={path} does not hold prompts: pass a .txt file with one prompt a line, or JSON "
        'Lines with a text under the key "prompt".'
    )


def demo_prompts() -> list[str]:
    """Return the prompts of the demo task for instruction following."""
    import lm_eval_pruned.tasks

    folder = Path(lm_eval_pruned.tasks.__path__[0])
    return read_prompts(folder / "demo" / "instructions.jsonl")


def batches_of(
    request: ProfileRequest, prompts: Sequence[str]
) -> tuple[dict[int, list[BatchEncoding]], int]:
    """Return batches by batch size, and the token that fills rows which have ended.

    Raises:
        ValueError: A prompt leaves no room for the tokens that are to be generated.
    """
    from transformers import AutoConfig, AutoTokenizer

    name, source, tokens = request.pretrained, request.source(), request.max_new_tokens
    tokenizer = AutoTokenizer.from_pretrained(name, **source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chat := request.apply_chat_template:
        prompts = tokenizer.apply_chat_template(  # type: ignore[assignment]
            [[{"role": "user", "content": prompt}] for prompt in prompts],
            tokenize=False,
            add_generation_prompt=True,
        )
    batches = {
        size: make_batches(tokenizer, prompts, size, request.device, bare=chat)
        for size in request.batch_sizes
    }
    longest = max(batch["input_ids"].shape[1] for batch in chain(*batches.values()))
    config = AutoConfig.from_pretrained(name, **source).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest + tokens > limit:
        raise ValueError(
            f"max_new_tokens={tokens} after a prompt of {longest} tokens does not fit into the "
            f"model's {limit} positions: use shorter prompts or fewer tokens."
        )
    return batches, int(tokenizer.pad_token_id or 0)


def make_batches(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    size: int,
    device: str,
    *,
    bare: bool = False,
) -> list[BatchEncoding]:
    """Tokenise prompts, `bare` ones without special tokens, into left-padded batches in order."""
    return [
        tokenizer(
            list(prompts[start : start + size]),
            add_special_tokens=not bare,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(device)
        for start in range(0, len(prompts), size)
    ]
