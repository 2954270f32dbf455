"""What widths that differ per layer take back of the loss that a uniform cut causes.

Documents of a JSON Lines file are split: every second one is calibration text, and the others
are held out. At each size, every row keeps the same number of neurons, but the one that leaves
layer 0 alone, which keeps more. The table holds the loss on the held documents in nats per
token, the share of the rise by uniform MAW that is taken back, and the p-value of a paired
t-test over documents against uniform MAW.

    python benchmarks/allocation.py --data texts.jsonl

Without `--pretrained` the default model is pruned.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from reporting import machine
from scipy.stats import ttest_rel
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.util.tables import markdown_table


#: Name of a row and its arguments; those that measure losses get the calibration text.
ROWS = {
    "uniform maw": {},
    "uniform act": {"criterion": "act"},
    "uniform best": {"criterion": "best"},
    **{f"random, seed {n}": {"criterion": "random", "seed": n} for n in range(3)},
    "maw, layer 0 left alone": {"skip_layers": 0},
    "global maw": {"allocation": "global"},
    "global act": {"allocation": "global", "criterion": "act"},
    "sensitivity maw": {"allocation": "sensitivity"},
    "sensitivity best": {"allocation": "sensitivity", "criterion": "best"},
}
_NEED_TEXT = ("best", "act", "sensitivity")


@torch.no_grad()
def losses(model, documents: list[torch.Tensor]) -> np.ndarray:
    """Return the loss of each document, shape (documents,), in nats per token."""
    found = []
    for tokens in documents:
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        found.append(float(cross_entropy(logits.float(), tokens[1:])))
    return np.array(found)


def main() -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="FILE.jsonl")
    parser.add_argument("--pretrained", metavar="NAME_OR_FOLDER")
    parser.add_argument(
        "--prune_percents", nargs="+", type=int, default=[10, 20, 30, 40, 50]
    )
    parser.add_argument("--documents", type=int, default=48, help="held documents")
    parser.add_argument("--samples", type=int, default=16, help="calibration texts")
    parser.add_argument("--tokens", type=int, default=128, help="of each held document")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()

    source = {"pretrained": arguments.pretrained}
    if arguments.pretrained is None:
        source = find_default_model().model_args()
    load = {**source, "dtype": arguments.dtype}
    tokenizer = AutoTokenizer.from_pretrained(source["pretrained"])
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
        calibration = {
            "calibration": str(text),
            "calibration_samples": arguments.samples,
        }
        unpruned = losses(load_pruned(**load), held)
        print(f"{machine('cpu')}\n\nunpruned: {unpruned.mean():.3f} nats per token\n")
        for percent in arguments.prune_percents:
            cells = []
            uniform = losses(load_pruned(**load, prune_percent=percent), held)
            for name in arguments.rows:
                asked = dict(ROWS[name])
                if {*map(str, asked.values())} & {*_NEED_TEXT}:
                    asked |= calibration
                model = load_pruned(**load, prune_percent=percent, **asked)
                found = uniform if name == "uniform maw" else losses(model, held)
                rise = found.mean() - unpruned.mean()
                back = 1 - rise / (uniform.mean() - unpruned.mean())
                p = (
                    ""
                    if found is uniform
                    else f"{ttest_rel(found, uniform).pvalue:.1e}"
                )
                after = model.prune_record.parameters_after
                cells.append(
                    (name, f"{found.mean():.3f}", f"{back:.0%}", p, f"{after:,}")
                )
            print(f"{percent} % removed\n")
            header = ["", "loss", "taken back", "p", "parameters"]
            print(markdown_table(header, cells) + "\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
