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

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping


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


def print_table(
    title: str,
    uniform: dict[str, Any],
    rows: Mapping[str, dict[str, Any]],
    held: list[torch.Tensor],
    unpruned: np.ndarray,
) -> None:
    """Print loss, share of the rise by a uniform cut that is taken back, its p, and parameters.

    p is that of a paired t-test over documents, empty for the uniform cut itself.

    Args:
        title: Of the table.
        uniform: Arguments of `load_pruned` for the uniform cut.
        rows: The same for each row, by name.
        held: The documents.
        unpruned: Loss of each, unpruned.
    """
    against = losses(load_pruned(**uniform), held)
    cells = []
    for name, asked in rows.items():
        model = load_pruned(**asked)
        found = against if asked == uniform else losses(model, held)
        back = 1 - (found.mean() - unpruned.mean()) / (against.mean() - unpruned.mean())
        p = "" if found is against else f"{ttest_rel(found, against).pvalue:.1e}"
        after = model.prune_record.parameters_after
        cells.append((name, f"{found.mean():.3f}", f"{back:.0%}", p, f"{after:,}"))
    header = ["", "loss", "taken back", "p", "parameters"]
    print(f"{title}\n\n{markdown_table(header, cells)}\n", flush=True)
