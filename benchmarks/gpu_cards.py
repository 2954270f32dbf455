"""Scores of several cards beside those of one, by the commands of docs/models.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import reporting
import torch

from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lm_eval.api.instance import Instance

ONE = "one card"
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def ways(count: int, device: str, heads: int) -> dict[str, tuple[list[str], str]]:
    """Return what starts the harness, and more arguments of the model, for each way to use cards."""
    # On CPUs, accelerate needs MPI.
    copies = TORCHRUN if device == "cpu" else ACCELERATE
    found: dict[str, tuple[list[str], str]] = {
        ONE: ([], ""),
        f"{count} copies of the model": ([*copies, str(count)], ""),
        "one model, split by layers": ([], ",parallelize=true"),
    }
    if heads % count == 0:
        split = [*TORCHRUN, str(count)], ",tp_plan=auto"
        found["one model, split by tensors"] = split
    return found


def write_tasks(
    folder: Path, questions: list[Instance], prompts: list[Instance]
) -> None:
    """Write a task of choices and one of texts.

    Args:
        folder: Where to.
        questions: Four answers to each question, one after the other.
        prompts: Of texts, all with the settings of the first.
    """
    choices = [
        {
            "text": questions[at].args[0],
            "choices": [each.args[1].strip() for each in questions[at : at + 4]],
            "answer": 0,
        }
        for at in range(0, len(questions), 4)
    ]
    texts = [{"text": each.args[0], "answer": "w3"} for each in prompts]
    settings = {"generation_kwargs": prompts[0].args[1]}
    for name, kind, metric, rows, more in (
        ("choice", "multiple_choice", "acc", choices, {"doc_to_choice": "choices"}),
        ("text", "generate_until", "exact_match", texts, settings),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        task = {"task": f"cards_{name}", "output_type": kind, **more}
        task |= {"doc_to_text": "text", "doc_to_target": "answer"}
        task |= {"dataset_path": "json", "test_split": "test"}
        task |= {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        task |= {"metric_list": [{"metric": metric}]}
        (folder / f"{name}.yaml").write_text(json.dumps(task))


def beside_one_card(
    model_args: str, tasks: Path, device: str, count: int, heads: int
) -> Iterator[str]:
    """Evaluate `tasks` in each of the `ways`, and yield a table of what differs from one card.

    Raises:
        RuntimeError: A way failed, or its scores are not those of one card.
    """
    one: tuple[list[float], list[str]] | None = None
    rows, wrong = [], []
    for name, (launcher, more) in ways(count, device, heads).items():
        begin, output = time.perf_counter(), tasks / name
        error = _evaluate(launcher, model_args + more, tasks, device, output)
        seconds = time.perf_counter() - begin
        if error is not None:
            wrong.append(f"{name}: {error}")
            if one is None:
                break
            continue
        requests, scores, texts = _logged(output)
        one = one or (scores, texts)
        worst = reporting.worst(scores, one[0])
        agree = f"{worst:.2g} nats; {reporting.agreement(texts, one[1])}"
        rows.append((name, f"{seconds:.0f}", requests, agree))
        if not worst <= reporting.NATS[torch.float32] or texts != one[1]:
            wrong.append(f"{name}: the scores are not those of one card")
    columns = ("float32", "s, with the start", "requests of one process", "differs by")
    yield markdown_table(columns, rows, "lrrl")
    if wrong:
        raise RuntimeError("; ".join(wrong))


def _evaluate(
    launcher: list[str], model_args: str, tasks: Path, device: str, output: Path
) -> str | None:
    """Run the stock command; return what went wrong, if anything."""
    words = [sys.executable, *launcher, "-m", "lm_eval", "--model", "pruned-hf"]
    words += ["--model_args", model_args, "--tasks", "cards_choice,cards_text"]
    words += ["--include_path", str(tasks), "--device", device, "--batch_size", "8"]
    words += ["--log_samples", "--output_path", str(output)]
    own = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tasks / "cache")}
    if device == "cpu":
        own["ACCELERATE_USE_CPU"] = "true"
    environment = {**os.environ, **own}
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    print(done.stderr, file=sys.stderr)
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    return errors[0] if errors else f"its process ended with {done.returncode}"


def _logged(folder: Path) -> tuple[int, list[float], list[str]]:
    """Return how many requests one process scored, and all log-likelihoods and texts, by document."""
    answers: dict[tuple[bool, int], list[Any]] = {}
    for file in folder.rglob("samples_*.jsonl"):
        for row in map(json.loads, file.read_text("utf-8").splitlines()):
            found = row["filtered_resps"]
            answers[isinstance(found[0], str), row["doc_id"]] = found
    in_order = sorted(answers.items())
    scores = [float(s) for (text, _), each in in_order if not text for s, _ in each]
    texts = [each[0] for (text, _), each in in_order if text]
    results = json.loads(next(folder.rglob("results_*.json")).read_text("utf-8"))
    path = results["config"]["answer_paths"]["loglikelihood"]
    return sum(path["requests"].values()), scores, texts
