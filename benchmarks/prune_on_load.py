"""Prune-on-load against load-then-prune with optipfair, on a generated checkpoint.

    python benchmarks/prune_on_load.py [--repeats 5] [--percent 50]

The checkpoint has the shape of Llama-3.2-1B, in bfloat16, with random weights. It
is written to a temporary folder (2.5 GB) and read once before the first
measurement, so both sides find it in the page cache. The sides alternate, each
run in a process of its own, and print:

- seconds: from the first call to the finished model, imports left out, as they pass and
  as the processor works, which a busy machine changes less;
- private memory: the largest growth of the process's anonymous memory in that time, sampled;
- whether both sides kept the same neurons: for every layer the multiset of scores of
  the kept neurons is compared, because bfloat16 scores tie, and optipfair breaks ties
  at the threshold in no documented order.

The floor is the least work any method has to do on these tensors: read gate and up
once, read and write as many bytes as are kept. It is timed as plain torch operations in
a process of its own, alternating with the sides, twice: *new*, where the file has just
been mapped and the memory written to is new, as it is for both sides, and *warm*, once
more over the same pages, which is the speed of the memory itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


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


def write_checkpoint(folder: Path) -> None:
    """Write random weights; every neuron has its own scale, as trained ones do."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**LLAMA_3_2_1B, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, meta in shapes.items():
        if name == "lm_head.weight":
            continue
        scale = torch.rand(meta.shape[0], generator=generator) * 0.04 + 0.01
        weight = torch.randn(meta.shape, generator=generator)
        tensors[name] = (
            weight.mul_(scale.view(-1, *[1] * (weight.dim() - 1)))
        ).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def anonymous_bytes() -> int:
    """Return the anonymous resident memory of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux.")


def measure(side: str, folder: str, percent: float, dtype: str) -> dict:
    """Load and prune once; return seconds, memory and what was kept."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
    from transformers.utils import logging

    # optipfair imports what a model class needs; without this only ours would be timed doing so.
    assert LlamaForCausalLM
    logging.disable_progress_bar()
    if side == "lm-eval-pruned":
        from lm_eval_pruned import load_pruned
    else:
        import optipfair

    before, peak, running = anonymous_bytes(), 0, True

    def watch():
        nonlocal peak
        while running:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, worked = time.perf_counter(), time.process_time()
    if side == "lm-eval-pruned":
        model = load_pruned(folder, prune_percent=percent, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = optipfair.prune_model(
            model, pruning_percentage=percent, show_progress=False
        )
    seconds = time.perf_counter() - started
    worked = time.process_time() - worked
    running = False
    watcher.join()
    kept = hashlib.sha256()
    with torch.no_grad():
        for layer in model.model.layers:
            parts = [
                weight.amax(1).float() + weight.amin(1).float().abs()
                for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
            ]
            kept.update((parts[0] + parts[1]).sort().values.numpy().tobytes())
    return {
        "seconds": seconds,
        "cpu": worked,
        "memory": peak - before,
        "layer": 3
        * LLAMA_3_2_1B["intermediate_size"]
        * LLAMA_3_2_1B["hidden_size"]
        * model.dtype.itemsize,
        "model": sum(p.numel() * p.element_size() for p in model.parameters()),
        "kept": kept.hexdigest(),
    }


def measure_floor(folder: str, percent: float) -> dict:
    """Read and copy the bytes that have to move; return seconds, new and warm."""
    import torch
    from safetensors import safe_open

    file = safe_open(Path(folder, "model.safetensors"), framework="pt")
    layers = [
        [
            file.get_tensor(f"model.layers.{layer}.mlp.{name}_proj.weight")
            for name in ("gate", "up", "down")
        ]
        for layer in range(LLAMA_3_2_1B["num_hidden_layers"])
    ]
    kept = layers[0][0].shape[0]
    kept -= int(percent / 100 * kept)
    memory = [
        torch.empty(3, kept, layers[0][0].shape[1], dtype=torch.bfloat16)
        for _ in layers
    ]
    taken = {}
    for state in ("new", "warm"):
        started = time.perf_counter()
        for weights, targets in zip(layers, memory, strict=True):
            for weight in weights[:2]:
                # The fastest operation that reads all bytes and writes next to nothing.
                weight.view(torch.int16).amax()
            for weight, target in zip(weights, targets, strict=True):
                target.copy_(weight.view(-1, target.shape[1])[:kept])
        taken[state] = time.perf_counter() - started
    return taken


def run_side(side: str, folder: str, arguments: argparse.Namespace) -> dict:
    """Run `measure` in a process of its own."""
    run = subprocess.run(
        [
            *(sys.executable, __file__, "--side", side, "--folder", folder),
            *("--percent", str(arguments.percent), "--dtype", arguments.dtype),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"{side} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def spread(values: list[float], unit: str, scale: float = 1) -> str:
    """Return min / median / max."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{low * scale:.3g} / {middle * scale:.3g} / {high * scale:.3g} {unit}"


def report(runs: dict[str, list[dict]], floors: list[dict]) -> None:
    """Print both sides and their ratios with spread."""
    from importlib.metadata import version

    from lm_eval_pruned.util.tables import markdown_table

    packages = ("lm-eval-pruned", "optipfair", "transformers", "torch")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    print(f"Python {platform.python_version()}, {platform.machine()}")
    rows = []
    for side, measured in runs.items():
        taken = spread([run["seconds"] for run in measured], "s")
        private = spread([run["memory"] for run in measured], "GB", 1e-9)
        cpu = spread([run["cpu"] for run in measured], "s")
        rows.append([side, taken, cpu, private])
    columns = ["side", "seconds (min / median / max)", "CPU seconds", "private memory"]
    print("\n" + markdown_table(columns, rows))
    ours, theirs = (runs[side] for side in SIDES)

    def ratio(over: list[float], under: list[float]) -> str:
        return spread([a / b for a, b in zip(over, under, strict=True)], "x")

    seconds = [run["seconds"] for run in ours]
    theirs_seconds = [run["seconds"] for run in theirs]
    print(f"\ntime, optipfair / lm-eval-pruned: {ratio(theirs_seconds, seconds)}")
    memory = [run["memory"] for run in ours]
    theirs_memory = [run["memory"] for run in theirs]
    print(f"memory, optipfair / lm-eval-pruned: {ratio(theirs_memory, memory)}")
    for state in ("new", "warm"):
        least = [floor[state] for floor in floors]
        print(
            f"floor, {state}: {spread(least, 's')}; ours / floor: {ratio(seconds, least)}"
        )
    model = ours[0]["model"]
    print(
        f"pruned model: {model / 1e9:.3f} GB; ours has {(max(memory) - model) / 1e6:+.0f} MB at its "
        f"peak, and one layer at full width takes {ours[0]['layer'] / 1e6:.0f} MB"
    )
    same = len({run["kept"] for measured in runs.values() for run in measured}) == 1
    print(f"same kept neurons on both sides, up to exact ties: {same}")
    if not same:
        raise SystemExit(1)


def main() -> None:
    """Write the checkpoint, alternate the sides, print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--percent", type=float, default=50)
    parser.add_argument("--dtype", default="bfloat16", help="dtype to load in")
    parser.add_argument("--folder", help="use this checkpoint, or write it there")
    parser.add_argument("--side", choices=[*SIDES, FLOOR], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        result = (
            measure_floor(arguments.folder, arguments.percent)
            if arguments.side == FLOOR
            else measure(
                arguments.side, arguments.folder, arguments.percent, arguments.dtype
            )
        )
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model.safetensors").exists():
            write_checkpoint(folder)
        (folder / "model.safetensors").read_bytes()
        runs: dict[str, list[dict]] = {side: [] for side in SIDES}
        floors = []
        for _ in range(arguments.repeats):
            for side in SIDES:
                runs[side].append(run_side(side, str(folder), arguments))
            floors.append(run_side(FLOOR, str(folder), arguments))
        report(runs, floors)


if __name__ == "__main__":
    main()
