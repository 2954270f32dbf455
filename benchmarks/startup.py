"""What this package costs every Python start, and how fast its command answers.

    python benchmarks/startup.py [--repeats 21]

Each row alternates two commands, each in a process of its own, and prints the medians and
the median of the pairwise differences, in milliseconds:

- ``python -c pass`` in this environment, with and without the start-up shim
  (without: the shim's module is replaced by an empty one, so the ``.pth`` file still runs);
- ``lm-eval-pruned --help``, ``lm-eval-pruned plan`` on a tiny config, alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def milliseconds(command: list[str], **environment: str) -> float:
    """Run `command` and return its wall time."""
    started = time.perf_counter()
    subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, **environment}
    )
    return (time.perf_counter() - started) * 1000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    repeats = parser.parse_args().repeats
    start = [sys.executable, "-c", "pass"]
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "empty", "lm_eval_pruned")
        empty.mkdir(parents=True)
        (empty / "__init__.py").write_text("")
        (empty / "_autoload.py").write_text("def install():\n    pass\n")
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        pairs = []
        for _ in range(repeats):
            with_shim = milliseconds(start)
            pairs.append((with_shim, milliseconds(start, PYTHONPATH=str(empty.parent))))
        ours, bare = (statistics.median(side) for side in zip(*pairs, strict=True))
        extra = statistics.median(a - b for a, b in pairs)
        print(f"python -c pass: {ours:.1f} ms, without the shim {bare:.1f} ms")
        print(f"the shim: {extra:.2f} ms (median of {repeats} pairs)")
        command = [sys.executable, "-m", "lm_eval_pruned.cli"]
        for arguments in (
            ["--help"],
            ["plan", "--pretrained", folder, "--ratios", "2.0"],
        ):
            taken = [
                milliseconds([*command, *arguments])
                for _ in range(max(3, repeats // 4))
            ]
            print(
                f"lm-eval-pruned {arguments[0]}: {min(taken):.0f} / "
                f"{statistics.median(taken):.0f} / {max(taken):.0f} ms (min / median / max)"
            )


if __name__ == "__main__":
    main()
