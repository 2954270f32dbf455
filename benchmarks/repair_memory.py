"""How much private memory repair takes, by default that of `recipe=best`, of a load and of `lm-eval-pruned prune`, beside its sum.

    python benchmarks/repair_memory.py [--layers 16] [--routes load prune] [--device cpu]

Random weights in bfloat16, by default in the shape of Llama-3.2-1B, a tokenizer of bytes, and the
first texts of the included calibration text: matrices do not depend on how much text there is, and
what does is in the sum. Each route runs in a separate process, whose anonymous memory is read every
two milliseconds; pages of mapped files, which the system may drop, are not among it. Where systemd runs,
`systemd-run --scope -p MemoryMax=6G python ...` takes the rest of the memory away.

The sum is what was there before, one layer, four float64 matrices of I x I, a float32 matrix of
H x H for each layer (the curvature, while it is measured), hidden states of the text, before and
behind a layer, its activations, and, of a load alone, the pruned MLPs, which are what it returns.
`--device card` is the simulated card of the tests; what is on it is counted, so the sum holds the
pruned model once more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from prune_on_load import LLAMA_3_2_1B
from reporting import in_its_own_process, machine, memory_of
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.util.tables import markdown_table


sys.path.append(str(Path(__file__).parents[1]))

SHAPES = {
    "1b": LLAMA_3_2_1B,
    # A small vocabulary, so that a few layers fit on a small disk.
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 1000,
        "tie_word_embeddings": False,
    },
}


def write_checkpoint(folder: Path, shape: str, layers: int | None) -> None:
    """Write random weights, and a tokenizer of bytes, to `folder`."""
    from tests.helpers.checkpoints import byte_tokenizer

    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    torch.manual_seed(0)
    config = LlamaConfig(**sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def measure(folder: str, route: str, options: argparse.Namespace) -> dict[str, float]:
    """Prune on one route; return peak and sum, in GB."""
    logging.disable_progress_bar()
    if options.device == "card":
        from tests.helpers import simulated_card

        assert simulated_card
    asked = {
        "criterion": options.criterion,
        "repair": "least_squares",
        "prune_percent": options.percent,
        "calibration_samples": options.samples,
    }
    with memory_of(torch.device("cpu")) as memory, tempfile.TemporaryDirectory() as cut:
        if route == "load":
            record = load_pruned(folder, device=options.device, **asked).prune_record
        else:
            output = Path(cut, "pruned")
            record = export_pruned(
                folder, output, device=options.device, prune_arguments=asked
            ).record
    config = json.loads(Path(folder, "config.json").read_text())
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    width, tokens = config["intermediate_size"], record.calibration["tokens"]
    mlp, matrix = 2 * 3 * hidden * width, 8 * width**2
    whole = Path(folder, "model.safetensors").stat().st_size
    kept = layers * mlp * (record.plan.width / width)
    parts = {
        "layer": mlp + 2 * 4 * hidden**2,
        "matrices": 4 * matrix,
        "curvature": 4 * layers * hidden**2,
        "text": 2 * tokens * (3 * hidden + width),
        "pruned MLPs": kept if route == "load" else 0,
        "card": whole - layers * mlp + kept if options.device == "card" else 0,
    }
    return {
        "peak": (memory.peak - memory.before) / 1e9,
        "sum": sum(parts.values()) / 1e9,
        **{name: size / 1e9 for name, size in parts.items()},
    }


def main() -> None:
    """Write the checkpoint, measure each route, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="use this checkpoint, or write it there")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--routes", nargs="+", default=["load", "prune"])
    parser.add_argument("--device", choices=["cpu", "card"], default="cpu")
    parser.add_argument("--percent", type=int, default=40)
    parser.add_argument("--criterion", default="obs", help="maw is faster")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--route", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.route:
        print(json.dumps(measure(options.folder, options.route, options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        if not (folder / "config.json").exists():
            write_checkpoint(folder, options.shape, options.layers)
        print(f"{machine('cpu')}\n")
        rows = []
        for route in options.routes:
            child = [*sys.argv[1:], "--folder", str(folder), "--route", route]
            figures = in_its_own_process(__file__, *child)
            rows.append([route, *(f"{size:.2f}" for size in figures.values())])
        print(markdown_table(["GB", *figures], rows))


if __name__ == "__main__":
    main()
