"""Compare plain with packed weights in the linear layers of a model on a CPU.

Every linear layer of the model multiplies rows of random numbers once, one after the other as in
a pass, so that no weight is in a cache. The table has seconds of CPU time, the least of the
repeats, in which both take turns, and what packing takes once.

    OMP_NUM_THREADS=1 python benchmarks/linear_layers.py --rows 16 64 256
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
import transformers
from reporting import machine

from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.model_wrappers.batching.cpu_linear import (
    Packs,
    linear_name,
    pack_linears,
)


def seconds(layers: list[torch.nn.Linear], packs: Packs, rows: int) -> float:
    """Return the CPU time of one product in each layer, of plain weights without `packs`."""
    inputs = {
        layer.in_features: torch.randn(rows, layer.in_features) for layer in layers
    }
    begin = time.process_time()
    for layer in layers:
        x = inputs[layer.in_features]
        if packs:
            packs[layer](x, layer.bias)
        else:
            F.linear(x, layer.weight, layer.bias)
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.pretrained or find_default_model().pretrained, dtype=torch.float32
    )
    begin = time.process_time()
    packs = pack_linears(model, 10**6)
    first = time.process_time() - begin
    begin = time.process_time()
    packs = pack_linears(model, 10**6)
    again = time.process_time() - begin
    layers = list(packs)
    size = sum(layer.weight.nbytes for layer in layers) / 2**20
    print(f"machine   {machine('cpu')}")
    print(f"packed    {len(layers)} layers, {size:.0f} MiB, by {linear_name(True)}")
    print(
        f"packing   {first:.2f} s with the trial of each shape, {again:.2f} s without"
    )
    print("| rows | plain, s | packed, s | saved | s a row, packed |\n|" + " --- |" * 5)
    with torch.no_grad():
        for rows in arguments.rows:
            runs = [
                (seconds(layers, {}, rows), seconds(layers, packs, rows))
                for _ in range(arguments.repeats)
            ]
            plain, packed = (min(side) for side in zip(*runs, strict=True))
            print(
                f"| {rows} | {plain:.4f} | {packed:.4f} | {1 - packed / plain:.0%} | "
                f"{packed / rows:.5f} |"
            )


if __name__ == "__main__":
    main()
