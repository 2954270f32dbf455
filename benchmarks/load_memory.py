"""Peak memory of the device that a pruned model is loaded to, for every layout.

    python benchmarks/load_memory.py [--device cuda] [--hidden_size 4096] [--layers 8]

For each way in which checkpoints store gate, up and down, a checkpoint with random
weights in bfloat16 is written to a temporary folder, and loaded in a separate process.
The peak is that of CUDA's allocator, which is exact, or the largest growth of the
process's private memory, which is sampled. On a device that is not
the CPU, the run fails where the peak lies above what the loaded model holds, and one of its
layers more. On the CPU, experts that are stored one by one are there whole.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from reporting import in_its_own_process, machine, memory_of, synchronise
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from lm_eval_pruned import load_pruned
from lm_eval_pruned.pruning.layouts import find_glu_mlps, regions_by_parameter
from lm_eval_pruned.util.tables import markdown_table


#: Neurons of a layer per unit of its hidden size, in one MLP or in all experts together.
RATIO = 8
EXPERTS = 16
LAYOUTS = {
    "dense": "llama",
    "gate and up fused": "phi3",
    "stacked experts": "llama4_text",
    "stacked experts, interleaved": "gpt_oss",
    "experts one by one": "qwen3_moe",
}


def config_of(layout: str, hidden_size: int, layers: int) -> Any:
    """Return the config of a model whose size is mostly that of its MLPs."""
    width = RATIO * hidden_size
    values = {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 8,
        "vocab_size": 1000,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        "intermediate_size": width,
    }
    if "experts" in layout:
        values |= {
            "intermediate_size": width // EXPERTS,
            "moe_intermediate_size": width // EXPERTS,
            "num_local_experts": EXPERTS,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 1,
        }
    if layout == "stacked experts":
        values |= {"intermediate_size_mlp": width, "interleave_moe_layer_step": 1}
    if layout == "experts one by one":
        values["mlp_only_layers"] = []
    return AutoConfig.for_model(LAYOUTS[layout], **values)


def measure(folder: str, device: torch.device, percent: float, criterion: str) -> dict:
    """Load and prune once; return sizes in bytes, and seconds."""
    logging.disable_progress_bar()
    with torch.device("meta"):
        # Imports what the class needs.
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    if device.type == "cuda":
        torch.cuda.init()
    with memory_of(device) as memory:
        started = time.perf_counter()
        model = load_pruned(
            folder, prune_percent=percent, criterion=criterion, device=str(device)
        )
        synchronise(device)
        seconds = time.perf_counter() - started
    layers: dict[str, int] = {}
    for (mlp, _, region), *_ in regions_by_parameter(find_glu_mlps(model)).values():
        size = mlp.parameter(region).nbytes
        layers[mlp.stack] = layers.get(mlp.stack, 0) + size
    return {
        "seconds": seconds,
        "model": sum(p.nbytes for p in model.parameters()),
        # On the CPU, weights that nothing was taken from stay in the mapped file.
        "held": memory.after - memory.before,
        "peak": memory.peak - memory.before,
        "layer": max(layers.values()),
    }


def main() -> None:
    """Write and load one checkpoint per layout, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--percent", type=float, default=40)
    parser.add_argument("--criterion", default="maw")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.folder:
        rest = (device, arguments.percent, arguments.criterion)
        print(json.dumps(measure(arguments.folder, *rest)))
        return
    print(machine(arguments.device))
    print(f"prune_percent={arguments.percent:g}, criterion={arguments.criterion}\n")
    rows, most = [], 0.0
    for layout, model_type in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            config = config_of(layout, arguments.hidden_size, arguments.layers)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(folder)
            stored = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
            found = in_its_own_process(__file__, *sys.argv[1:], "--folder", folder)
        above = (found["peak"] - min(found["held"], found["model"])) / found["layer"]
        most = max(most, above)
        sizes = (stored, *(found[name] for name in ("model", "held", "peak")))
        cells = (f"{size / 1e6:.0f} MB" for size in sizes)
        name = f"{layout} ({model_type})"
        rows.append([name, *cells, f"{above:.2f}", f"{found['seconds']:.2f}"])
    columns = ["layout", "checkpoint", "pruned model", "held", "peak"]
    print(markdown_table([*columns, "peak above, in layers", "seconds"], rows))
    if most > 1 and device.type != "cpu":
        raise SystemExit("A peak lies above the pruned model and one of its layers.")


if __name__ == "__main__":
    main()
