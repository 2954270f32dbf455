"""Losses on text that is held out: what the tables of pruned models without a task are made of.

Every second document of a JSON Lines file is calibration text, the others are held out.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import ttest_rel
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from lm_eval_pruned.checkpoints.default_model import find_default_model


if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which model is pruned and which text it sees."""
    parser.add_argument("--data", required=True, metavar="FILE.jsonl")
    parser.add_argument("--pretrained", metavar="NAME_OR_FOLDER")
    parser.add_argument("--documents", type=int, default=48, help="held documents")
    parser.add_argument("--samples", type=int, default=16, help="calibration texts")
    parser.add_argument("--tokens", type=int, default=128, help="of each held document")
    parser.add_argument("--dtype", default="float32")


def source_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that load the model, the default one where none is named."""
    if arguments.pretrained is None:
        return {**find_default_model().model_args(), "dtype": arguments.dtype}
    return {"pretrained": arguments.pretrained, "dtype": arguments.dtype}


@contextmanager
def split_text(
    arguments: argparse.Namespace, pretrained: str
) -> Iterator[tuple[list[torch.Tensor], dict[str, Any]]]:
    """Yield the held documents, each of shape (tokens,), and arguments that name the others."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    lines = Path(arguments.data).read_text("utf-8").splitlines()
    held = [
        torch.tensor(
            tokenizer(json.loads(line)["text"])["input_ids"][: arguments.tokens]
        )
        for line in lines[1::2]
    ][: arguments.documents]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "calibration.jsonl")
        text.write_text("\n".join(lines[::2]) + "\n", "utf-8")
        yield (
            held,
            {"calibration": str(text), "calibration_samples": arguments.samples},
        )


@torch.no_grad()
def losses(model: Any, documents: list[torch.Tensor]) -> np.ndarray:
    """Return the loss of each document, shape (documents,), in nats per token."""
    found = []
    for tokens in documents:
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        found.append(float(cross_entropy(logits.float(), tokens[1:])))
    return np.array(found)


def compared(
    found: np.ndarray, uniform: np.ndarray, unpruned: np.ndarray
) -> tuple[str, str, str]:
    """Return loss, share of the rise by the uniform cut that is taken back, and its p.

    p is that of a paired t-test over documents, empty for the uniform cut itself.
    """
    rise = found.mean() - unpruned.mean()
    back = 1 - rise / (uniform.mean() - unpruned.mean())
    p = "" if found is uniform else f"{ttest_rel(found, uniform).pvalue:.1e}"
    return f"{found.mean():.3f}", f"{back:.0%}", p
