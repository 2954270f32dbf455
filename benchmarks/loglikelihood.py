"""Compare log-likelihood with shared prefixes (``hf-prefix``) with the harness's ``hf``.

Both sides answer the same requests with the same weights in one process, taking
turns; times are those of ``loglikelihood``, tokenising included. ``hf`` runs at the
fastest of the batch sizes given. Log-probabilities, greedy flags and task scores of
the two sides are compared in the same run, which fails where they differ.

    python benchmarks/loglikelihood.py --task truthfulqa --limit 40

The stock tasks read their data from the Hub, or from a folder laid out under the
Hub names where `--data` names one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import reporting
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from reporting import machine, print_profile, spread

from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM


if TYPE_CHECKING:
    from collections.abc import Callable

BOOLQ = {
    "dataset_path": "aps/super_glue",
    "dataset_name": "boolq",
    "output_type": "multiple_choice",
    "training_split": "train",
    "validation_split": "validation",
    "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
    "doc_to_target": "label",
    "doc_to_choice": ["no", "yes"],
    "metric_list": [{"metric": "acc"}],
}


def _with_two_choices(dataset: Any) -> Any:
    """Pair each question with the first sentence of its own passage and of the next one.

    Question and answers are about as long as PIQA's.
    """
    sentences = [f" {passage.split('. ')[0]}." for passage in dataset["passage"]]

    def choices(_: dict[str, Any], index: int) -> dict[str, list[str]]:
        return {"choices": [sentences[index], sentences[(index + 1) % len(sentences)]]}

    return dataset.map(choices, with_indices=True, load_from_cache_file=False)


TASKS: dict[str, list[Any]] = {
    "demo": ["pruned_demo_truthfulness"],
    "truthfulqa": ["truthfulqa_mc1", "truthfulqa_mc2"],
    "boolq": ["boolq"],
    "boolq_fewshot_fixed": [
        BOOLQ
        | {
            "task": "boolq_fewshot_fixed",
            "num_fewshot": 5,
            "fewshot_config": {"sampler": "first_n"},
        }
    ],
    "boolq_fewshot_random": [
        BOOLQ | {"task": "boolq_fewshot_random", "num_fewshot": 5}
    ],
    "rolling": [
        {
            "task": "rolling",
            "dataset_path": "aps/super_glue",
            "dataset_name": "boolq",
            "output_type": "loglikelihood_rolling",
            "validation_split": "validation",
            "doc_to_text": "",
            "doc_to_target": "{{passage}}",
            "metric_list": [{"metric": "word_perplexity"}],
        }
    ],
    "two_choice": [
        BOOLQ
        | {
            "task": "two_choice",
            "process_docs": _with_two_choices,
            "doc_to_text": "Question: {{question}}?\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "target_delimiter": "",
            "training_split": None,
        }
    ],
}

#: Largest difference of two log-probabilities that rounding explains, by dtype.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 2.0}


class Side(reporting.Side):
    """One model type; `positions` counts what the model got in the last run, padding included."""

    def __init__(self, name: str, lm: HFLM) -> None:
        super().__init__(name, lm)
        self.requests = 0
        self.positions = 0
        self.scores: dict[str, Any] = {}
        lm.loglikelihood = partial(self._counted, lm.loglikelihood)
        lm.loglikelihood_rolling = partial(self._counted, lm.loglikelihood_rolling)

    def _counted(
        self, answer: Callable[..., list[Any]], requests: list[Any], **kwargs: Any
    ) -> list[Any]:
        self.requests = len(requests)
        self.positions = 0
        watch = self.lm.model.get_input_embeddings().register_forward_pre_hook(
            self._count
        )
        answers = self.timed(answer, requests, **kwargs)
        watch.remove()
        # A rolling answer is a number alone.
        self.answers = [a if isinstance(a, tuple) else (a, True) for a in answers]
        return answers

    def _count(self, _: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        self.positions += inputs[0].numel()

    def run(self, task: str, limit: int | None) -> float:
        """Evaluate `task` once; return the seconds its requests took."""
        results = simple_evaluate(
            model=self.lm,
            tasks=[dict(t) if isinstance(t, dict) else t for t in TASKS[task]],
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        self.scores = results["results"]
        return self.seconds[-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--pretrained", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--limit", type=int, help="documents per task; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="of both sides each")
    parser.add_argument(
        "--hf-batch-sizes", default="1,8,16,32,64", help="to choose hf's from"
    )
    parser.add_argument(
        "--choose-limit", type=int, help="documents to choose it on; default: --limit"
    )
    parser.add_argument("--batch-size", default="auto", help="of hf-prefix")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--data", type=Path, help="folder of data under its Hub names")
    parser.add_argument(
        "--profile", action="store_true", help="say where both sides' time goes"
    )
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if arguments.data:
        os.chdir(arguments.data)

    pretrained = arguments.pretrained or find_default_model().pretrained
    model = transformers.AutoModelForCausalLM.from_pretrained(
        pretrained,
        dtype=getattr(torch, arguments.dtype),
        attn_implementation=arguments.attention,
    ).to(arguments.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)

    def side(name: str, cls: type[HFLM], batch_size: int | str) -> Side:
        return Side(name, cls(model, tokenizer=tokenizer, batch_size=batch_size))

    batch_size = arguments.batch_size
    batch_size = batch_size if batch_size.startswith("auto") else int(batch_size)
    ours = side("hf-prefix", PrefixHFLM, batch_size)
    candidates = {
        size: side(f"hf, batch size {size}", HFLM, size)
        for size in map(int, arguments.hf_batch_sizes.split(","))
    }
    few = arguments.choose_limit or arguments.limit
    for candidate in candidates.values():
        candidate.run(arguments.task, few)
    on_cpu = arguments.device == "cpu"
    first = {
        size: (side.cpu_seconds if on_cpu else side.seconds)[0]
        for size, side in candidates.items()
    }
    hf = candidates[min(first, key=first.__getitem__)]
    hf.peak = 0
    for _ in range(arguments.repeats):
        for one in (ours, hf):
            one.run(arguments.task, arguments.limit)
    ratios, cpu_ratios = (
        [b / a for a, b in zip(a_list, b_list[1:], strict=True)]
        for a_list, b_list in (
            (ours.seconds, hf.seconds),
            (ours.cpu_seconds, hf.cpu_seconds),
        )
    )

    worst = max(
        abs(a - b) for (a, _), (b, _) in zip(ours.answers, hf.answers, strict=True)
    )
    flags = sum(a != b for (_, a), (_, b) in zip(ours.answers, hf.answers, strict=True))
    print(
        f"task          {arguments.task}, {hf.requests} requests, limit {arguments.limit}"
    )
    print(f"model         {pretrained}, {arguments.dtype}, {arguments.attention}")
    print(f"machine       {machine(arguments.device)}")
    print(
        "hf chosen by  " + ", ".join(f"batch {b}: {s:.2f} s" for b, s in first.items())
    )
    for name, value in (
        (ours.name, ours.seconds),
        (hf.name, hf.seconds[1:]),
    ):
        print(f"{name:22} s    {spread(value)}")
    print(f"ratio hf / hf-prefix        {spread(ratios)}")
    if on_cpu:
        print(f"ratio in CPU time           {spread(cpu_ratios)}")
    print(f"positions     {ours.positions}, hf {hf.positions}, padding included")
    print(f"peak memory   {ours.peak / 2**20:.0f} MiB, hf {hf.peak / 2**20:.0f} MiB")
    print(f"differences   {worst:.1e} in log-probability, {flags} greedy flags")
    print(f"scores        {json.dumps(_numbers(ours.scores))}")
    if arguments.profile:
        for one in (hf, ours):
            print_profile(
                lambda one=one: one.run(arguments.task, arguments.limit),
                arguments.device,
            )
            print(f"{one.name} while profiled: {one.seconds[-1]:.2f} s")
    tolerance = TOLERANCE[getattr(torch, arguments.dtype)]
    if worst > tolerance:
        raise SystemExit(f"log-probabilities differ by more than {tolerance}")
    if arguments.dtype == "float32" and _numbers(ours.scores) != _numbers(hf.scores):
        raise SystemExit(f"scores differ: hf has {json.dumps(_numbers(hf.scores))}")


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {metric.partition(',')[0]}": round(value, 4)
        for task, metrics in scores.items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


if __name__ == "__main__":
    main()
