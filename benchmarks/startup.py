"""What this package costs every Python start, and how fast its command answers.

    python benchmarks/startup.py [--repeats 21] [--requests 7] [--model_args prune_percent=40]

Every process is a new one; its wall time and its CPU time are printed in milliseconds. The CPU time
tells more where others use the machine.

- ``python -c pass`` in this environment, with and without the start-up shim
  (without: the shim's module is replaced by an empty one, so the ``.pth`` file still runs);
- ``lm-eval-pruned --help``, ``lm-eval-pruned plan`` on a tiny config, alone;
- ``lm_eval run --model pruned-hf`` and ``--model hf``, alternating, from the start of the
  process to the moment the harness hands the model its first request, on
  SmolLM2-135M-Instruct and a task whose data comes with this package.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reporting import comparison, in_turns, machine, spread

from lm_eval_pruned.checkpoints.default_model import find_default_model


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
WALL, CPU = "wall time, ms", "CPU time, ms"
#: Exit code of `TO_THE_FIRST_REQUEST` where it got there.
THERE = 42
#: Runs the harness until it says that it sends requests, and leaves.
TO_THE_FIRST_REQUEST = f"""
import logging, os, sys
from lm_eval.__main__ import cli_evaluate

class First(logging.Filter):
    def filter(self, record):
        if record.getMessage().endswith("requests") and record.funcName == "evaluate":
            sys.stderr.flush()
            os._exit({THERE})
        return True

logging.getLogger("lm_eval.evaluator").addFilter(First())
cli_evaluate()
"""


class Command:
    """A command of Python's, and the times of the processes that ran it, in milliseconds."""

    def __init__(self, *words: str, ends: int = 0, **environment: str) -> None:
        self.words = words
        self.ends = ends
        self.environment = {**os.environ, **environment}
        self.times: dict[str, list[float]] = {WALL: [], CPU: []}

    def run(self) -> None:
        """Run it once.

        Raises:
            RuntimeError: It ended in another way than it should.
        """
        started, used = time.perf_counter(), _used()
        run = subprocess.run(
            [sys.executable, *self.words],
            capture_output=True,
            text=True,
            env=self.environment,
            check=False,
        )
        self.times[WALL].append((time.perf_counter() - started) * 1000)
        self.times[CPU].append((_used() - used) * 1000)
        if run.returncode != self.ends:
            raise RuntimeError(f"{self.words[1:]} ended early:\n{run.stderr}")


def _used() -> float:
    """Return the seconds of CPU time that processes took which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(commands: dict[str, Command], repeats: int) -> str:
    """Run commands alternately; return the table."""
    for each in in_turns(list(commands.values()), repeats):
        each.run()
    return comparison({name: each.times for name, each in commands.items()})


def to_the_first_request(model: str, model_args: str = "") -> Command:
    """Return the command that has `model` loaded until it gets its first request."""
    pretrained = find_default_model().pretrained
    given = ",".join(filter(None, [f"pretrained={pretrained}", model_args]))
    return Command(
        *("-c", TO_THE_FIRST_REQUEST, "run", "--model", model, "--device", "cpu"),
        *("--model_args", f"{given},dtype=float32"),
        *("--tasks", "pruned_demo_truthfulness"),
        ends=THERE,
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument(
        "--requests", type=int, default=7, help="pairs to the first request; 0 for none"
    )
    parser.add_argument("--model_args", default="", help="more for pruned-hf")
    arguments = parser.parse_args()
    print(machine("cpu"), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "empty", "lm_eval_pruned")
        empty.mkdir(parents=True)
        (empty / "__init__.py").write_text("")
        (empty / "_autoload.py").write_text("def install():\n    pass\n")
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        starts = {
            "python -c pass, without the shim": Command(
                *("-c", "pass"), PYTHONPATH=str(empty.parent)
            ),
            "python -c pass": Command("-c", "pass"),
        }
        print(compare(starts, arguments.repeats))
        bare, ours = (each.times[WALL] for each in starts.values())
        extra = statistics.median(b - a for a, b in zip(bare, ours, strict=True))
        print(f"\nThe shim: {extra:.2f} ms (median of {arguments.repeats} pairs)")
        plan = ("plan", "--model_args", f"pretrained={folder}", "--ratios", "2.0")
        for words in (("--help",), plan):
            command = Command("-m", "lm_eval_pruned.cli", *words)
            for _ in range(max(3, arguments.repeats // 4)):
                command.run()
            print(f"lm-eval-pruned {words[0]}: {spread(command.times[WALL])} ms")
    if arguments.requests:
        sides = {
            "hf": to_the_first_request("hf"),
            "pruned-hf": to_the_first_request("pruned-hf", arguments.model_args),
        }
        for each in sides.values():
            # What comes first fills the caches of the system.
            each.run()
            each.times = {WALL: [], CPU: []}
        print(f"\nTo the first request\n\n{compare(sides, arguments.requests)}")


if __name__ == "__main__":
    main()
