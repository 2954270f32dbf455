"""Evaluations through the harness: here by its Python entry, or by its command."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import checkpoints


if TYPE_CHECKING:
    from collections.abc import Sequence


TASK = "pruned_demo_truthfulness"
#: What `accelerate launch` runs for several processes, which it does on CPUs only by MPI.
TWO_PROCESSES = [
    *(sys.executable, "-m", "torch.distributed.run"),
    *("--standalone", "--nproc-per-node", "2"),
]


def _unshared(model: str, model_args: str) -> str:
    """Turn prefix sharing off: it sums in another order, and answers are compared exactly."""
    return model_args + ",prefix_sharing=false" * (model == "pruned-hf")


@functools.cache
def task_manager():
    from lm_eval.tasks import TaskManager

    # Without the harness's own tasks: reading them takes longer than the evaluation.
    folder = str(checkpoints.ROOT / "tasks")
    return TaskManager(include_path=folder, include_defaults=False)


def evaluate(
    model: str, model_args: str, limit: int = 3
) -> tuple[list[Any], dict[str, Any]]:
    """Return log-likelihoods of all answers to the first questions of the demo, and the config."""
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        model=model,
        model_args=_unshared(model, model_args),
        tasks=[TASK],
        device="cpu",
        batch_size=4,
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=task_manager(),
    )
    assert results is not None
    samples = results["samples"][TASK]
    return [sample["filtered_resps"] for sample in samples], results["config"]


def command(model: str, model_args: str, output: Path, limit: int = 3) -> list[str]:
    """Return the stock command that does the same, writing samples to `output`."""
    model_args = _unshared(model, model_args)
    return [
        *("lm_eval", "--model", model, "--model_args", model_args, "--tasks", TASK),
        *("--device", "cpu", "--batch_size", "4", "--limit", str(limit)),
        *("--output_path", str(output), "--log_samples"),
    ]


def results(folder: Path) -> dict[str, Any]:
    """Return the only results file below `folder`."""
    (path,) = Path(folder).rglob("results_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def exact(value: Any) -> Any:
    """Return `value` as JSON has it."""
    return json.loads(json.dumps(value, default=str))


def near(value: Any) -> Any:
    """Return `value` as JSON has it, its floats as what two float32 paths agree on."""
    text = json.dumps(value, default=str)
    return json.loads(text, parse_float=lambda n: pytest.approx(float(n), 1e-4, 1e-4))


def lm_eval(*arguments: Any, check: bool = True, **options: Any):
    """Run the stock command in a process of its own; `options` are those of `run`."""
    return run(["lm_eval", *arguments], check=check, **options)


def run(
    arguments: Sequence[Any],
    cwd: Path | None = None,
    timeout: int = 300,
    check: bool = False,
    **environment: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command without a network, this interpreter's scripts first on the path."""
    path = [str(Path(sys.executable).parent), os.environ["PATH"]]
    fixed = {
        "PATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": 1,
        "HF_HUB_OFFLINE": 1,
        "HF_DATASETS_OFFLINE": 1,
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [*map(str, arguments)],
        cwd=cwd,
        env={n: str(v) for n, v in {**os.environ, **fixed, **environment}.items()},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done
