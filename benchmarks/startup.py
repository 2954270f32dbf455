"""What this package costs every Python start, and how fast its command answers.

    python benchmarks/startup.py [--repeats 21] [--requests 7] [--model_args prune_percent=40]

Every process is a new one. Printed in milliseconds:

- ``python -c pass`` in this environment, with and without the start-up shim
  (without: the shim's module is replaced by an empty one, so the ``.pth`` file still runs);
- ``lm-eval-pruned --help``, ``lm-eval-pruned plan`` on a tiny config, alone;
- ``lm_eval run --model pruned-hf`` and ``--model hf``, alternating, from the start of the
  process to the moment the harness hands the model its first request, on
  SmolLM2-135M-Instruct and a task whose data comes with this package; the CPU time of
  these processes too, which tells more where others use the machine.
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
from importlib.metadata import version
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


#: Runs the harness until it says that it sends requests, and leaves.
TO_THE_FIRST_REQUEST = """
import logging, os, sys
from lm_eval.__main__ import cli_evaluate

class First(logging.Filter):
    def filter(self, record):
        if record.getMessage().endswith("requests") and record.funcName == "evaluate":
            sys.stderr.flush()
            os._exit(42)
        return True

logging.getLogger("lm_eval.evaluator").addFilter(First())
cli_evaluate()
"""


def cpu_time() -> float:
    """Return the milliseconds of CPU time that processes took which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1000


def to_the_first_request(
    model: str, pretrained: str, model_args: str
) -> tuple[float, float]:
    """Return the wall and CPU time that `model` takes until it gets its first request."""
    own = f",{model_args}" if model_args and model == "pruned-hf" else ""
    command = [
        *(sys.executable, "-c", TO_THE_FIRST_REQUEST, "run", "--model", model),
        *("--model_args", f"pretrained={pretrained},dtype=float32{own}"),
        *("--tasks", "pruned_demo_truthfulness", "--device", "cpu"),
    ]
    started, used = time.perf_counter(), cpu_time()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    taken = (time.perf_counter() - started) * 1000, cpu_time() - used
    if run.returncode != 42:
        raise RuntimeError(f"{model} did not get to a request:\n{run.stderr}")
    return taken


def spread(values: list[float], digits: int = 0) -> str:
    """Return min / median / max."""
    three = min(values), statistics.median(values), max(values)
    return " / ".join(f"{value:.{digits}f}" for value in three)


def compare_models(repeats: int, model_args: str) -> None:
    """Print how long each model type takes to its first request, and the ratio."""
    from lm_eval_pruned.checkpoints.default_model import find_default_model

    pretrained = find_default_model().pretrained
    for model in ("hf", "pruned-hf"):
        to_the_first_request(model, pretrained, model_args)
    pairs = [
        tuple(
            to_the_first_request(model, pretrained, model_args)
            for model in ("pruned-hf", "hf")
        )
        for _ in range(repeats)
    ]
    own = f" ({model_args})" if model_args else ""
    for which, time_of in enumerate(("wall", "CPU")):
        ours, theirs = (
            [times[which] for times in side] for side in zip(*pairs, strict=True)
        )
        print(
            f"{time_of} time to the first request, pruned-hf{own}: {spread(ours)} ms "
            "(min / median / max)"
        )
        print(f"{time_of} time to the first request, hf: {spread(theirs)} ms")
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(f"pruned-hf / hf: {spread(ratios, 3)} ({repeats} pairs)")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument(
        "--requests", type=int, default=7, help="pairs to the first request; 0 for none"
    )
    parser.add_argument("--model_args", default="", help="more for pruned-hf")
    arguments = parser.parse_args()
    repeats = arguments.repeats
    packages = ("lm-eval-pruned", "lm-eval", "transformers", "torch")
    print(", ".join(f"{name} {version(name)}" for name in packages))
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
        for subcommand in (
            ["--help"],
            ["plan", "--model_args", f"pretrained={folder}", "--ratios", "2.0"],
        ):
            taken = [
                milliseconds([*command, *subcommand])
                for _ in range(max(3, repeats // 4))
            ]
            print(
                f"lm-eval-pruned {subcommand[0]}: {spread(taken)} ms (min / median / max)"
            )
    if arguments.requests:
        compare_models(arguments.requests, arguments.model_args)


if __name__ == "__main__":
    main()
