"""Compare model types of the harness that answer log-likelihoods in different ways.

For the pull requests in ``docs/upstream``: runs the same tasks with every type in turn, in one
process, and prints Markdown tables of their scores and of the seconds that
``loglikelihood`` took, tokenising included. Needs the harness alone, in which the types are.

    python benchmarks/upstream.py --models hf hf-prefix --model_args pretrained=NAME \
        --tasks truthfulqa_mc1,truthfulqa_mc2 --limit 40
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from importlib.metadata import version
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model


#: BoolQ with the same examples for every question, as MMLU has them for a subject.
BOOLQ_FIRST_N = {
    "task": "boolq_first_n",
    "dataset_path": "aps/super_glue",
    "dataset_name": "boolq",
    "output_type": "multiple_choice",
    "training_split": "train",
    "validation_split": "validation",
    "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
    "doc_to_target": "label",
    "doc_to_choice": ["no", "yes"],
    "fewshot_config": {"sampler": "first_n"},
    "metric_list": [{"metric": "acc"}],
}


class Timed:
    """One model type: its model, and what every run of it gave."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        self.lm = get_model(name).create_from_arg_string(
            arguments.model_args,
            {"batch_size": arguments.batch_size, "device": arguments.device},
        )
        self.answer = self.lm.loglikelihood
        self.lm.loglikelihood = self.loglikelihood
        self.user: list[float] = []
        self.wall: list[float] = []
        self.answers: list[tuple[float, bool]] = []
        self.scores: dict[str, Any] = {}

    def loglikelihood(self, requests: list[Any], **options: Any) -> list[Any]:
        """Answer as the model does, and keep answers and times."""
        user, wall = os.times().user, time.perf_counter()
        self.answers = self.answer(requests, **options)
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize()
        self.user.append(os.times().user - user)
        self.wall.append(time.perf_counter() - wall)
        return self.answers

    def run(self, arguments: argparse.Namespace) -> None:
        """Evaluate the tasks once."""
        self.scores = simple_evaluate(
            model=self.lm,
            tasks=[
                dict(BOOLQ_FIRST_N) if name == BOOLQ_FIRST_N["task"] else name
                for name in arguments.tasks.split(",")
            ],
            num_fewshot=arguments.num_fewshot,
            limit=arguments.limit,
            bootstrap_iters=0,
            log_samples=False,
        )["results"]


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def metrics(scores: dict[str, Any]) -> dict[str, str]:
    """Return the scores of a run by task and metric."""
    return {
        f"{task} {metric.partition(',')[0]}": f"{value:.4f}"
        for task, found in scores.items()
        for metric, value in found.items()
        if isinstance(value, float) and "stderr" not in metric
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", required=True, help="the first is compared to"
    )
    parser.add_argument("--model_args", required=True)
    parser.add_argument(
        "--tasks", required=True, help="names, boolq_first_n among them"
    )
    parser.add_argument("--num_fewshot", type=int)
    parser.add_argument("--limit", type=int, help="documents per task; default: all")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=2, help="of every type")
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    sides = [Timed(name, arguments) for name in arguments.models]
    for _ in range(arguments.repeats):
        for side in sides:
            side.run(arguments)
    first = sides[0]
    print(
        f"{len(first.answers)} requests; batch size {arguments.batch_size}, "
        f"{arguments.device}, {torch.get_num_threads()} threads; "
        + ", ".join(f"{n} {version(n)}" for n in ("lm_eval", "transformers", "torch"))
    )
    rows = []
    for side in sides:
        pairs = list(zip(side.answers, first.answers, strict=True))
        rows.append(
            [
                side.name,
                *metrics(side.scores).values(),
                f"{max(abs(a[0] - b[0]) for a, b in pairs):.1e}",
                str(sum(a[1] != b[1] for a, b in pairs)),
                " / ".join(f"{seconds:.1f}" for seconds in side.user),
                " / ".join(f"{seconds:.1f}" for seconds in side.wall),
                f"{min(first.user) / min(side.user):.2f}",
            ]
        )
    heads = ["model", *metrics(first.scores), "largest difference", "other flags"]
    heads += ["user CPU, s", "wall, s", "times as fast (CPU)"]
    print(table(heads, rows))


if __name__ == "__main__":
    main()
