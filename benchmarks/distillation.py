"""What distillations gave back: rise in loss on kinds of text, and what is kept of both probes.

    python benchmarks/distillation.py FOLDER... --held speeches=speeches.jsonl

FOLDER is what ``lm-eval-pruned prune --distil`` wrote from the default model, or without
``--distil`` for the row beside it. All prompts of the probes are scored. The last columns are from
the record in the folder: tokens, steps and seconds, with those of the unpruned model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from recipes import held_text, lifts, losses
from reporting import machine
from transformers import AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.util.tables import csv_table


def main() -> None:
    """Print one row for each folder, as CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--pretrained", default=None, metavar="FOLDER")
    parser.add_argument("--held", nargs="*", default=[], metavar="KIND=FILE.jsonl")
    parser.add_argument("--documents", type=int, default=12, help="of each kind")
    options = parser.parse_args()
    source = options.pretrained or find_default_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    held = held_text(options.held, tokenizer, options.documents)
    print(f"# {machine('cpu')}")
    rows = []
    for folder in (source, *options.folders):
        model = load_pruned(str(folder), dtype="float32")
        loss = losses(model, held)
        measured = {"mean": sum(loss.values()) / len(loss), **lifts(model, tokenizer)}
        whole = rows[0][1] if rows else measured
        row = {"folder": Path(folder).name}
        row["rise"] = f"{measured['mean'] - whole['mean']:.3f}"
        for probe in ("knowledge", "instructions"):
            row[f"{probe} kept"] = f"{measured[probe] / whole[probe]:.3f}"
        record = Path(folder, "healing.json")
        known = json.loads(record.read_text("utf-8")) if record.exists() else {}
        row |= {n: known.get(n, "") for n in ("tokens_seen", "steps", "seconds")}
        rows.append((row, measured))
    print(csv_table([row for row, _ in rows]), end="")


if __name__ == "__main__":
    main()
