"""Prune-on-load against load-then-prune with optipfair, on a generated checkpoint.

    python benchmarks/prune_on_load.py [--repeats 5] [--percent 50]

The checkpoint has the shape of Llama-3.2-1B, in bfloat16, with random weights. It
is written to a temporary folder (2.5 GB) and read once before the first
measurement, so both sides find it in the page cache. The sides alternate, each
run in a separate process, and print:

- seconds: from the first call to the finished model, imports left out, as they pass and
  as the processor works, which a busy machine changes less;
- private memory: the largest growth of the process's private memory in that time, sampled;
- whether both sides kept the same neurons: for every layer the multiset of scores of
  the kept neurons is compared, because bfloat16 scores tie, and optipfair breaks ties
  at the threshold in no documented order.

The floor is the least work any method has to do on these tensors: read gate and up
once, read and write as many bytes as are kept. It is timed as plain torch operations in
a separate process, alternating with the sides, twice: *new*, where the file has just
been mapped and the memory written to is new, as it is for both sides, and *warm*, once
more over the same pages, which is the speed of the memory itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from reporting import comparison, in_its_own_process, machine, memory_of, ratios, spread
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging


LLAMA_3_2_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
SIDES = ("lm-eval-pruned", "optipfair")
FLOOR = "floor"


@torch.no_grad()
def write_checkpoint(folder: Path) -> None:
    """Write random weights; every neuron has its own scale, as trained ones do."""
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA_3_2_1B)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.mul_(torch.rand(len(parameter), 1) * 2 + 0.5)
    model.save_pretrained(folder)


def measure(side: str, folder: str, percent: float, dtype: str) -> dict[str, Any]:
    """Load and prune once; return seconds, memory and what was kept."""
    # optipfair imports what a model class needs; without this only ours would be timed doing so.
    assert LlamaForCausalLM
    logging.disable_progress_bar()
    if side == "lm-eval-pruned":
        from lm_eval_pruned import load_pruned
    else:
        import optipfair
    with memory_of(torch.device("cpu")) as memory:
        started, worked = time.perf_counter(), time.process_time()
        if side == "lm-eval-pruned":
            model = load_pruned(folder, prune_percent=percent, dtype=dtype)
        else:
            model = optipfair.prune_model(
                AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
                pruning_percentage=percent,
                show_progress=False,
            )
        seconds = time.perf_counter() - started
        worked = time.process_time() - worked
    kept = hashlib.sha256()
    for layer in model.model.layers:
        gate, up = (
            weight.detach().amax(1).float() + weight.detach().amin(1).float().abs()
            for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
        )
        kept.update((gate + up).sort().values.numpy().tobytes())
    figures = {
        "seconds": seconds,
        "CPU seconds": worked,
        "private memory, GB": (memory.peak - memory.before) / 1e9,
    }
    gigabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    return {"figures": figures, "kept": kept.hexdigest(), "GB": gigabytes}


def measure_floor(folder: str, percent: float) -> dict[str, float]:
    """Read and copy the bytes that have to move; return seconds, new and warm."""
    file = safe_open(Path(folder, "model.safetensors"), framework="pt")
    layers = [
        [
            file.get_tensor(f"model.layers.{layer}.mlp.{name}_proj.weight")
            for name in ("gate", "up", "down")
        ]
        for layer in range(LLAMA_3_2_1B["num_hidden_layers"])
    ]
    width, hidden_size = layers[0][0].shape
    kept = width - int(percent / 100 * width)
    shape = (3, kept, hidden_size)
    memory = [torch.empty(shape, dtype=torch.bfloat16) for _ in layers]
    taken = {}
    for state in ("new", "warm"):
        started = time.perf_counter()
        for weights, targets in zip(layers, memory, strict=True):
            for weight in weights[:2]:
                # The fastest operation that reads all bytes and writes next to nothing.
                weight.view(torch.int16).amax()
            for weight, target in zip(weights, targets, strict=True):
                target.copy_(weight.view(-1, hidden_size)[:kept])
        taken[state] = time.perf_counter() - started
    return taken


def report(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print both sides, the floor, and ratios with spread.

    Raises:
        SystemExit: The sides kept different neurons.
    """
    figures = {
        side: {
            column: [run["figures"][column] for run in runs[side]]
            for column in runs[side][0]["figures"]
        }
        for side in SIDES
    }
    print(f"{machine('cpu')}\n\n{comparison(figures)}\n")
    ours = figures[SIDES[0]]
    for state in ("new", "warm"):
        least = [floor[state] for floor in runs[FLOOR]]
        over = ratios(ours["seconds"], least)
        print(f"floor, {state}: {spread(least)} s; ours / floor: {over}")
    above = max(ours["private memory, GB"]) - runs[SIDES[0]][0]["GB"]
    print(f"ours at its peak, above the pruned model: {above * 1e3:+.0f} MB")
    same = len({run["kept"] for side in SIDES for run in runs[side]}) == 1
    print(f"same kept neurons on both sides, up to exact ties: {same}")
    if not same:
        raise SystemExit(1)


def main() -> None:
    """Write the checkpoint, alternate the sides, print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--percent", type=float, default=50)
    parser.add_argument("--dtype", default="bfloat16", help="dtype to load in")
    parser.add_argument("--folder", help="use this checkpoint, or write it there")
    parser.add_argument("--side", choices=[*SIDES, FLOOR], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rest = (arguments.folder, arguments.percent)
    if arguments.side == FLOOR:
        print(json.dumps(measure_floor(*rest)))
        return
    if arguments.side:
        print(json.dumps(measure(arguments.side, *rest, arguments.dtype)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        file = folder / "model.safetensors"
        if not file.exists():
            write_checkpoint(folder)
        file.read_bytes()
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in (*SIDES, FLOOR)}
        for _ in range(arguments.repeats):
            for side, found in runs.items():
                options = [*sys.argv[1:], "--folder", str(folder), "--side", side]
                found.append(in_its_own_process(__file__, *options))
        report(runs)


if __name__ == "__main__":
    main()
