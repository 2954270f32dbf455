"""What `compare` and `report` take as runs and documents grow: CPU seconds and peak memory, on synthetic results.

    python benchmarks/results_scale.py

writes sweeps of one multiple-choice task with made-up answers (no model runs), lets each command read
them in a process of its own, and prints a table. Runs count the unpruned one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from lm_eval_pruned.results.runs import UNIT, as_text, unit_folder
from lm_eval_pruned.util.tables import markdown_table


TASK, DATE = "synthetic_choices", "2026-01-02T03-04-05.678901"
CHOICES = 4
TEXT = "the river that crosses an old town in winter carries less water than its bridges were built for"
WORDS = TEXT.split(" ")


def write_sweep(folder: Path, runs: int, documents: int) -> None:
    """Write an unpruned run and sizes of it, each with an answer of four to every document."""
    names = ["base", *(f"p{number}" for number in range(1, runs))]
    units = [{"id": name, "units": {TASK: "0"}} for name in names]
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(as_text({"configurations": units}))
    rng = np.random.default_rng(0)
    rights = rng.integers(CHOICES, size=documents)
    common = rng.normal(0, 1.5, (documents, CHOICES))
    for number, name in enumerate(names):
        unit = unit_folder(folder, name, TASK)
        unit.mkdir(parents=True)
        share = number / runs
        scores = common + rng.normal(0, 0.2 + share, common.shape) - 20
        scores[np.arange(documents), rights] += 2 * (1 - share)
        _write_unit(unit, share, scores, rights)


def _write_unit(
    unit: Path, share: float, scores: np.ndarray, rights: np.ndarray
) -> None:
    correct = []
    with (unit / f"samples_{TASK}_{DATE}.jsonl").open("w", encoding="utf-8") as lines:
        for n, (likelihoods, right) in enumerate(zip(scores, rights, strict=True)):
            row = _line(n, [round(value, 6) for value in likelihoods.tolist()], right)
            correct.append([row["acc"], row["acc_norm"]])
            lines.write(json.dumps(row) + "\n")
    means, count = np.mean(correct, axis=0), len(rights)
    metrics = ("acc", "acc_norm")
    known = dict(zip(map("{},none".format, metrics), means.tolist(), strict=True))
    kept = round(400 * (1 - 0.9 * share))
    pruning = {
        "criterion": "maw" if share else None,
        "hidden_size": 100,
        "layers": 2,
        "expansion_ratio_before": 4.0,
        "expansion_ratio_after": kept / 100,
        "intermediate_size_after": kept,
        "parameters_before": 1000,
        "parameters_after": 600 + kept,
    }
    data = {
        "results": {TASK: {"alias": TASK, **known}},
        "group_subtasks": {TASK: []},
        "configs": {TASK: {}},
        "versions": {TASK: 1.0},
        "n-shot": {TASK: 0},
        "higher_is_better": {TASK: dict.fromkeys(metrics, True)},
        "n-samples": {TASK: {"original": count, "effective": count}},
        "config": {"model": "pruned-hf", "pruning": pruning},
        "lm_eval_version": "0.4.13",
    }
    (unit / f"results_{DATE}.json").write_text(json.dumps(data))
    (unit / UNIT).write_text(as_text({"fingerprint": "0", "seconds": 0}))


def _line(number: int, likelihoods: list[float], right: int) -> dict:
    """Return what the harness logs of one document."""
    text = " ".join(np.roll(WORDS, number).tolist())
    choices = [f"{WORDS[(number + n) % len(WORDS)]} {n}" for n in range(CHOICES)]
    document = {"id": number, "question": f"{number}: {text}?", "choices": choices}
    prompt = f"Question: {document['question']}\nAnswer:"
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    answers = [[str(value), "False"] for value in likelihoods]
    lengths = np.array([*map(len, choices)])
    return {
        "doc_id": number,
        "doc": document,
        "target": str(right),
        "arguments": {
            f"gen_args_{n}": {"arg_0": prompt, "arg_1": f" {choice}"}
            for n, choice in enumerate(choices)
        },
        "resps": [[answer] for answer in answers],
        "filtered_resps": answers,
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "doc_hash": digest,
        "prompt_hash": digest,
        "target_hash": hashlib.sha256(str(right).encode()).hexdigest(),
        "acc": float(np.argmax(likelihoods) == right),
        "acc_norm": float(np.argmax(likelihoods / lengths) == right),
    }


def cost(command: str, folder: Path) -> tuple[float, float]:
    """Return the CPU seconds and the peak of memory in MB of a command, in its own process."""
    line = [sys.executable, "-m", "lm_eval_pruned.cli", command, str(folder)]
    # No thread of a numerical library spins while another works.
    alone = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, env=alone)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(line)} failed")
    # Linux counts KiB.
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    """Print what each command takes on each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    about = "runs x documents (default: 10x1000 100x1000 3x100000)"
    sizes = ["10x1000", "100x1000", "3x100000"]
    parser.add_argument("--sizes", nargs="+", default=sizes, help=about)
    parser.add_argument("--commands", nargs="+", default=["compare", "report"])
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        runs, documents = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, "sweep")
            write_sweep(folder, runs, documents)
            for command in options.commands:
                seconds, peak = cost(command, folder)
                each = 1000 * seconds / (runs * documents)
                shape = f"{runs:,} x {documents:,}"
                row = [command, shape, f"{seconds:.1f}", f"{each:.3f}", f"{peak:,.0f}"]
                print(*row, file=sys.stderr, flush=True)
                rows.append(row)
    columns = ("command", "runs x documents", "CPU s", "ms / run and document", "MB")
    print(markdown_table(columns, rows, "llrrr"))


if __name__ == "__main__":
    main()
