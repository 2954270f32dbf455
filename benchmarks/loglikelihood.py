"""Compare log-likelihood with shared prefixes (``hf-prefix``) with the harness's ``hf``.

Both sides answer the same requests with the same weights in one process, taking
turns; times are those of ``loglikelihood``, tokenising included. ``hf`` runs at the
fastest of the batch sizes given. Log-probabilities, greedy flags and task scores of
the two sides are compared in the same run, which fails where they differ.

    python benchmarks/loglikelihood.py --task truthfulqa --limit 40

The stock tasks read their data from the Hub, or from a folder laid out under the
Hub names where `--data` names one. The task demo needs no data.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from beside_hf import BesideHF, parser, print_profiles
from lm_eval import simple_evaluate
from reporting import NATS, agreement, machine, worst


if TYPE_CHECKING:
    from reporting import Side

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


_FEWSHOT = BOOLQ | {"num_fewshot": 5}
TASKS: dict[str, list[Any]] = {
    "demo": ["pruned_demo_truthfulness"],
    "truthfulqa": ["truthfulqa_mc1", "truthfulqa_mc2"],
    "boolq": ["boolq"],
    "boolq_fewshot_fixed": [_FEWSHOT | {"fewshot_config": {"sampler": "first_n"}}],
    "boolq_fewshot_random": [_FEWSHOT],
    "rolling": [
        {
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
            "process_docs": _with_two_choices,
            "doc_to_text": "Question: {{question}}?\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "target_delimiter": "",
            "training_split": None,
        }
    ],
}


def tasks(name: str) -> list[Any]:
    """Return names and configs of tasks, as the harness takes them."""
    return [{"task": name, **of} if isinstance(of, dict) else of for of in TASKS[name]]


def main(argv: list[str] | None = None) -> None:
    """Compare and print; exit with a message where the sides differ."""
    reader = parser(__doc__, sizes="1,8,16,32,64", batch_size="auto")
    reader.add_argument("--task", choices=TASKS, required=True)
    arguments = reader.parse_args(argv)
    both = BesideHF.asked(arguments)
    scores: dict[Side, dict[str, float]] = {}

    def evaluate(side: Side, limit: int | None) -> None:
        for kind in ("loglikelihood", "loglikelihood_rolling"):
            answer = getattr(type(side.lm), kind)
            setattr(side.lm, kind, partial(side.timed, partial(answer, side.lm)))
        found = simple_evaluate(
            model=side.lm,
            tasks=tasks(arguments.task),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
        scores[side] = _numbers(found["results"])

    print(f"{machine(arguments.device)}, {arguments.dtype}\n")
    few = arguments.choose_limit or arguments.limit
    print(both.run(evaluate, arguments.limit, few, arguments.repeats), end="\n\n")
    ours, hf = both.ours, both.hf
    said = agreement(ours.answers, hf.answers)
    flags = sum(
        a[1] != b[1]
        for a, b in zip(ours.answers, hf.answers, strict=True)
        # A rolling answer is a number alone.
        if isinstance(a, tuple)
    )
    print(f"{len(hf.answers)} requests: {said}; {flags} greedy flags differ.")
    print(f"Scores: {json.dumps(scores[ours])}")
    if arguments.profile:
        print_profiles(both, lambda side: evaluate(side, arguments.limit))
    if worst(ours.answers, hf.answers) > NATS[both.dtype]:
        raise SystemExit(f"log-probabilities differ by more than {NATS[both.dtype]}")
    if arguments.dtype == "float32" and scores[ours] != scores[hf]:
        raise SystemExit(f"scores differ: hf has {json.dumps(scores[hf])}")


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {metric.partition(',')[0]}": round(value, 4)
        for task, metrics in scores.items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


if __name__ == "__main__":
    main()
