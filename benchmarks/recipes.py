"""What each recipe costs: loss on kinds of text that nothing was calibrated on.

    python benchmarks/recipes.py --held speeches=speeches.jsonl

For each size, the mean loss of each kind of held text in nats per token, and the CPU seconds of
the load. The kinds of the held text that comes with the package are always there; `--held` adds
others, from JSON Lines files with `text` or `passage`. Random cuts are the mean of their seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from reporting import machine
from transformers import AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.cost import HELD_TEXT
from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.pruning.measuring import text_loss
from lm_eval_pruned.util.tables import csv_table


#: Name of a row and its arguments.
ROWS: dict[str, list[dict[str, Any]]] = {
    "maw": [{}],
    "random": [{"criterion": "random", "seed": seed} for seed in range(3)],
    "fast": [{"recipe": "fast"}],
    "act": [{"criterion": "act"}],
    "act, repaired": [{"criterion": "act", "repair": "least_squares"}],
    "best": [{"recipe": "best"}],
    "uneven": [{"recipe": "uneven"}],
}


def held_text(sources: list[str], tokenizer: Any, documents: int) -> dict[str, list]:
    """Return the first 128 tokens of each held document, by kind."""
    held: dict[str, list] = defaultdict(list)
    files = [("", str(HELD_TEXT)), *(source.split("=", 1) for source in sources)]
    for kind, file in files:
        lines = map(json.loads, Path(file).read_text("utf-8").splitlines())
        for line in lines:
            text = line.get("text") or line.get("passage")
            of_kind = held[kind or line["kind"]]
            if len(of_kind) < documents:
                of_kind.append(torch.tensor(tokenizer(text)["input_ids"][:128]))
    return held


@torch.no_grad()
def losses(model: Any, held: dict[str, list]) -> dict[str, float]:
    """Return the mean loss over the documents of each kind, in nats per token."""
    means = {}
    for kind, documents in held.items():
        by_document = []
        for tokens in documents:
            by_document.append(text_loss(model, tokens[None]) / (len(tokens) - 1))
        means[kind] = sum(by_document) / len(by_document)
    return means


def main() -> None:
    """Print one row for each recipe and size, as CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", metavar="NAME_OR_FOLDER")
    parser.add_argument("--gguf_file")
    parser.add_argument("--held", nargs="*", default=[], metavar="KIND=FILE.jsonl")
    parser.add_argument("--documents", type=int, default=16, help="of each kind")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--prune_percents", nargs="+", type=int, default=[20, 40])
    options = parser.parse_args()
    load = {"pretrained": find_default_model()}
    if options.pretrained:
        named = {"pretrained": options.pretrained, "gguf_file": options.gguf_file}
        load = {name: value for name, value in named.items() if value}
    load["dtype"] = "float32"
    whole = load_pruned(**load)
    source = {n: v for n, v in load.items() if n == "gguf_file"}
    tokenizer = AutoTokenizer.from_pretrained(load["pretrained"], **source)
    held = held_text(options.held, tokenizer, options.documents)
    columns = ["row", "removed", *held, "mean", "seconds"]
    print(f"# {machine('cpu')}\n{','.join(columns)}", flush=True)

    def show(row: str, removed: int, seeds: list[dict[str, float]], seconds: float):
        mean = {kind: sum(by[kind] for by in seeds) / len(seeds) for kind in held}
        cells = {kind: f"{value:.3f}" for kind, value in mean.items()}
        total = f"{sum(mean.values()) / len(mean):.3f}"
        line = {"row": row, "removed": removed, **cells, "mean": total}
        line["seconds"] = f"{seconds:.0f}"
        print(csv_table([line]).splitlines()[1], flush=True)

    show("unpruned", 0, [losses(whole, held)], 0)
    for removed in options.prune_percents:
        for row in options.rows:
            seeds, start = [], time.process_time()
            spent = 0.0
            for arguments in ROWS[row]:
                model = load_pruned(**load, prune_percent=removed, **arguments)
                spent = time.process_time() - start
                seeds.append(losses(model, held))
                start = time.process_time()
            show(row, removed, seeds, spent)


if __name__ == "__main__":
    main()
