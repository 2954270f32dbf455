"""Log-likelihoods of requests that split one text differently, with the cache of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .patch import Patch, copy, replace_once


if TYPE_CHECKING:
    from pathlib import Path

TEST = "tests/models/test_logits_cache.py"
FLAGS = """\
                    max_equal = (
                        greedy_tokens[:, -cont_toks.shape[1] :] == cont_toks
                    ).all()
"""
LINE = """\
                    logits = logits[:, -cont_toks.shape[1] :]  # [1, seq, vocab]
"""


def write(root: Path) -> None:
    """Add the line that is missing, and its test."""
    model = root / "lm_eval" / "models" / "huggingface.py"
    replace_once(model, FLAGS, FLAGS + LINE)
    copy(TEST, root)


PATCH = Patch(
    branch="logits-cache-right-aligned",
    title="fix(hf): read the last logits of a cached text for a shorter continuation",
    write=write,
    tests=(TEST,),
    mends=True,
)
