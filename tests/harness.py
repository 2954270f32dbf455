"""The stock ``lm_eval`` command, in this process and in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


TASK = "pruned_demo_truthfulness"


def arguments(model: str, model_args: str, output: Path, limit: int = 3) -> list[str]:
    """Return arguments of ``lm_eval`` for a few questions of the demo, with samples."""
    return [
        *("--model", model, "--model_args", model_args, "--tasks", TASK),
        *("--device", "cpu", "--batch_size", "4", "--limit", str(limit)),
        *("--output_path", str(output), "--log_samples"),
    ]


def evaluate(monkeypatch, folder: Path, model: str, model_args: str, limit: int = 3):
    """Run ``lm_eval`` here; return what `read` returns."""
    from lm_eval.__main__ import cli_evaluate

    output = folder / f"run{len(list(folder.glob('run*')))}"
    monkeypatch.setattr(
        sys, "argv", ["lm_eval", *arguments(model, model_args, output, limit)]
    )
    cli_evaluate()
    return read(output)


def read(output: Path) -> tuple[list[Any], dict[str, Any]]:
    """Return the log-likelihoods of every answer, and the whole results file."""
    (results,) = output.rglob("results_*.json")
    (samples,) = output.rglob("samples_*.jsonl")
    responses = [
        json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()
    ]
    return responses, json.loads(results.read_text())


def run(
    *command: str, cwd: Path, timeout: int = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command with this interpreter's scripts first on the path."""
    scripts = str(Path(sys.executable).parent)
    return subprocess.run(
        command,
        cwd=cwd,
        env={
            **os.environ,
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
