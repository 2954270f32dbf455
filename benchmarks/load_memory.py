"""Peak memory of the device that a pruned model is loaded to, for every layout.

    python benchmarks/load_memory.py [--device cuda] [--hidden_size 4096] [--layers 8]

For each way in which checkpoints store gate, up and down, a checkpoint with random
weights in bfloat16 is written to a temporary folder, and loaded in a process of its own.
The peak is that of CUDA's allocator, which is exact, or the largest growth of the
process's anonymous memory, which is sampled every millisecond. On a device that is not
the CPU, the run fails where the peak lies above what the loaded model holds, and one of its
layers more. On the CPU, experts that are stored one by one are there whole.
``tests/helpers/on_the_card.py`` counts every byte instead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from reporting import machine

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


def config_of(layout: str, hidden_size: int, layers: int):
    """Return the config of a model whose size is mostly that of its MLPs."""
    from transformers import AutoConfig

    width = RATIO * hidden_size
    common = {
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
    }
    experts = {
        "intermediate_size": width // EXPERTS,
        "moe_intermediate_size": width // EXPERTS,
        "num_local_experts": EXPERTS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 1,
    }
    own = {
        "dense": {"intermediate_size": width},
        "gate and up fused": {"intermediate_size": width},
        "stacked experts": {
            **experts,
            "intermediate_size_mlp": width,
            "interleave_moe_layer_step": 1,
        },
        "stacked experts, interleaved": experts,
        "experts one by one": {**experts, "mlp_only_layers": []},
    }[layout]
    return AutoConfig.for_model(LAYOUTS[layout], **{**common, **own})


def write_checkpoint(folder: Path, config) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def anonymous_bytes() -> int:
    """Return the anonymous resident memory of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: without CUDA, this needs Linux.")


def measure(folder: str, device: str, percent: float, criterion: str) -> dict:
    """Load and prune once; return sizes in bytes, and seconds."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from lm_eval_pruned import load_pruned
    from lm_eval_pruned.pruning.layouts import find_glu_mlps, regions_by_parameter

    logging.disable_progress_bar()
    with torch.device("meta"):
        # Imports what the class needs.
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated if cuda else lambda _: anonymous_bytes()
    before, peak, done = held(device), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    if not cuda:
        watcher.start()
    started = time.perf_counter()
    model = load_pruned(
        folder, prune_percent=percent, criterion=criterion, device=device
    )
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    if cuda:
        peak = torch.cuda.max_memory_allocated(device)
    else:
        done.set()
        watcher.join()
    layers: dict[str, int] = {}
    for entries in regions_by_parameter(find_glu_mlps(model)).values():
        mlp, _, region = entries[0]
        parameter = mlp.parameter(region)
        layers[mlp.stack] = layers.get(mlp.stack, 0) + parameter.nbytes
    end = held(device)
    return {
        "seconds": seconds,
        "peak": max(peak, end) - before,
        # On the CPU, weights that nothing was taken from stay in the mapped file.
        "held": end - before,
        "model": sum(p.nbytes for p in model.parameters()),
        "layer": max(layers.values()),
    }


def main() -> None:
    """Write and load one checkpoint per layout, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--percent", type=float, default=40)
    parser.add_argument("--criterion", default="maw")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rest = (arguments.device, arguments.percent, arguments.criterion)
    if arguments.folder:
        print(json.dumps(measure(arguments.folder, *rest)))
        return
    print(machine(arguments.device))
    print(f"prune_percent={arguments.percent:g}, criterion={arguments.criterion}\n")
    rows, above = [], []
    for layout, model_type in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as folder:
            config = config_of(layout, arguments.hidden_size, arguments.layers)
            write_checkpoint(Path(folder), config)
            stored = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
            run = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--folder", folder],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        found = json.loads(run.stdout.splitlines()[-1])
        above.append(
            (found["peak"] - min(found["held"], found["model"])) / found["layer"]
        )
        sizes = (stored, found["model"], found["held"], found["peak"])
        rows.append(
            [
                f"{layout} ({model_type})",
                *(f"{size / 1e6:.0f} MB" for size in sizes),
                f"{above[-1]:.2f}",
                f"{found['seconds']:.2f}",
            ]
        )
    columns = ["layout", "checkpoint", "pruned model", "held", "peak"]
    print(markdown_table([*columns, "peak above, in layers", "seconds"], rows))
    if max(above) > 1 and torch.device(arguments.device).type != "cpu":
        raise SystemExit("A peak lies above the pruned model and one of its layers.")


if __name__ == "__main__":
    main()
