"""Compare ``hf-prefix`` with the harness's ``hf`` on ten kinds of task.

Both sides answer the same requests with the same weights in one process, taking
turns; times are CPU seconds of the answers, tokenising included. ``hf`` runs at the
fastest of the batch sizes given. Log-probabilities, greedy flags and task scores of
the two sides are compared in the same run, which fails where they differ.

    OMP_NUM_THREADS=1 python benchmarks/faster.py --data FOLDER --csv faster.csv
    python benchmarks/faster.py --tasks truthfulqa --limit 40

The stock tasks read their data from the Hub, or from a folder laid out under the
Hub names where `--data` names one. The tasks demo, knowledge and text need no data.
"""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from beside_hf import BesideHF, parser, print_profiles
from lm_eval import evaluate
from lm_eval.tasks import TaskManager
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
CHOICES = {"doc_to_choice": "{{choices}}", "doc_to_target": 0}
LETTERS = "ABCD"


def _choices(dataset: Any, texts: list[str], count: int, **fields: list[str]) -> Any:
    """Give each document its own text and those of the next ones as `choices`."""

    def choices(_: dict[str, Any], index: int) -> dict[str, Any]:
        near = [texts[(index + step) % len(texts)] for step in range(count)]
        return {"choices": near, **{name: of[index] for name, of in fields.items()}}

    return dataset.map(choices, with_indices=True, load_from_cache_file=False)


def _first_sentences(dataset: Any) -> Any:
    """Pair each question with the first sentence of its passage and of the next one.

    Question and answers are about as long as PIQA's.
    """
    passages = dataset["passage"]
    return _choices(dataset, [f" {text.split('. ')[0]}." for text in passages], 2)


def _endings(dataset: Any) -> Any:
    """Cut each passage after its second sentence; the third is the ending, as in HellaSwag."""
    sentences = [text.split(". ") for text in dataset["passage"]]
    contexts = [f"{'. '.join(parts[:2])}." for parts in sentences]
    endings = [f" {parts[2 % len(parts)]}." for parts in sentences]
    return _choices(dataset, endings, len(LETTERS), context=contexts)


def _lettered(dataset: Any) -> Any:
    """Ask each question of GSM8K with four numbers under letters, as MMLU asks."""
    results = [text.rpartition("#### ")[2] for text in dataset["answer"]]
    dataset = _choices(dataset, results, len(LETTERS))

    def ask(doc: dict[str, Any], index: int) -> dict[str, Any]:
        right = index % len(LETTERS)
        choices = (
            doc["choices"][-right:] + doc["choices"][:-right]
            if right
            else doc["choices"]
        )
        lines = [
            f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True)
        ]
        return {
            "asked": "\n".join([doc["question"], *lines, "Answer:"]),
            "right": right,
        }

    return dataset.map(ask, with_indices=True, load_from_cache_file=False)


class Work(NamedTuple):
    """Tasks of the harness by name or config, and how many documents of each are the default.

    Generated answers have at most `tokens`; with `chat`, prompts take the chat template.
    """

    tasks: list[str | dict[str, Any]]
    documents: int
    tokens: int = 0
    chat: bool = False


_FEWSHOT = BOOLQ | {"num_fewshot": 5}
_MMLU = {
    "dataset_path": "openai/gsm8k",
    "dataset_name": "main",
    "output_type": "multiple_choice",
    "training_split": "train",
    "test_split": "test",
    "process_docs": _lettered,
    "num_fewshot": 5,
    "fewshot_config": {"sampler": "first_n"},
    "doc_to_text": "{{asked}}",
    "doc_to_choice": list(LETTERS),
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc"}],
}
_PAIRS = {
    "process_docs": _first_sentences,
    "doc_to_text": "Question: {{question}}?\nAnswer:",
}
_HELLASWAG = {"process_docs": _endings, "doc_to_text": "{{context}}"}
_PLAIN = {"target_delimiter": "", "training_split": None}
TASKS = {
    "truthfulqa": Work(["truthfulqa_mc1", "truthfulqa_mc2"], 3),
    "mmlu_like": Work([_MMLU], 8),
    "boolq_fewshot_fixed": Work(
        [_FEWSHOT | {"fewshot_config": {"sampler": "first_n"}}], 6
    ),
    "boolq_fewshot_random": Work([_FEWSHOT], 4),
    "knowledge": Work(["pruned_probe_knowledge"], 60),
    "hellaswag_like": Work([BOOLQ | CHOICES | _PLAIN | _HELLASWAG], 16),
    "piqa_like": Work([BOOLQ | CHOICES | _PLAIN | _PAIRS], 40),
    "text": Work(["pruned_demo_text"], 24),
    "ifeval": Work(["ifeval"], 24, tokens=32, chat=True),
    "gsm8k": Work(["gsm8k"], 4, tokens=48),
    "boolq": Work(["boolq"], 30),
    "demo": Work(["pruned_demo_truthfulness"], 20),
}
#: Those of the table.
TEN = [name for name in TASKS if name not in ("boolq", "demo")]


def tasks(name: str) -> list[str | dict[str, Any]]:
    """Return names and configs of tasks, as the harness takes them."""
    return [
        {"task": name, **task} if isinstance(task, dict) else task
        for task in TASKS[name].tasks
    ]


def _loaded(name: str, manager: TaskManager) -> Any:
    """Load what a name of `TASKS` stands for, with the same few-shot examples in each run."""
    loaded = manager.load(tasks(name))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(1234)
        if most := TASKS[name].tokens:
            limit = {"max_gen_toks": most}
            task.set_config(key="generation_kwargs", value=limit, update=True)
    return loaded


def compare(
    both: BesideHF, name: str, loaded: Any, arguments: Any
) -> dict[str, str | int | float]:
    """Have both sides evaluate what is loaded of a name, print the comparison, return its row.

    Raises:
        SystemExit: The sides differ.
    """
    scores: dict[Side, dict[str, float]] = {}

    def answer(side: Side, limit: int | None) -> None:
        for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            plain = getattr(type(side.lm), kind)
            setattr(side.lm, kind, partial(side.timed, partial(plain, side.lm)))
        results = evaluate(
            side.lm,
            loaded,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            apply_chat_template=TASKS[name].chat,
        )
        scores[side] = _numbers(results["results"])

    limit = arguments.limit or TASKS[name].documents
    few = arguments.choose_limit or max(2, limit // 4)
    print(f"## {name}\n")
    print(both.run(answer, limit, few, arguments.repeats), end="\n\n")
    ours, hf = both.ours, both.hf
    alike = agreement(ours.answers, hf.answers)
    flags = sum(
        a[1] != b[1]
        for a, b in zip(ours.answers, hf.answers, strict=True)
        # A rolling answer is a number alone, a generated one a text.
        if isinstance(a, tuple)
    )
    print(f"{len(hf.answers)} requests: {alike}; {flags} greedy flags differ.")
    print(f"Scores: {json.dumps(scores[ours])}\n", flush=True)
    if arguments.profile:
        print_profiles(both, lambda side: answer(side, limit))
    texts = isinstance(ours.answers[0], str)
    if not texts and worst(ours.answers, hf.answers) > NATS[both.dtype]:
        raise SystemExit(f"log-probabilities differ by more than {NATS[both.dtype]}")
    if arguments.dtype == "float32" and scores[ours] != scores[hf]:
        raise SystemExit(f"scores differ: hf has {json.dumps(scores[hf])}")
    times = sorted(b / a for a, b in zip(ours.cpu_seconds, hf.cpu_seconds, strict=True))
    return {
        "task": name,
        "documents": limit,
        "requests": len(hf.answers),
        "hf batch size": hf.lm.batch_size,
        "hf CPU s": round(min(hf.cpu_seconds), 2),
        "hf-prefix CPU s": round(min(ours.cpu_seconds), 2),
        "least": round(times[0], 2),
        "median": round(times[len(times) // 2], 2),
        "most": round(times[-1], 2),
        "agreement": alike,
    }


def main(argv: list[str] | None = None) -> None:
    """Compare and print; exit with a message where the sides differ."""
    reader = parser(__doc__, sizes="1,8", batch_size="auto")
    reader.add_argument("--tasks", choices=TASKS, nargs="+", default=TEN)
    reader.add_argument("--csv", type=Path, help="file for a row per task")
    arguments = reader.parse_args(argv)
    file = arguments.csv and arguments.csv.absolute()
    print(f"{machine(arguments.device)}, {arguments.dtype}\n")
    both = BesideHF.asked(arguments)
    manager = TaskManager()
    rows: list[dict[str, str | int | float]] = []
    for name in arguments.tasks:
        for side in (both.ours, *both.candidates):
            side.clear()
        rows.append(compare(both, name, _loaded(name, manager), arguments))
        if file:
            with file.open("w", encoding="utf-8", newline="") as stream:
                table = csv.DictWriter(stream, rows[0])
                table.writeheader()
                table.writerows(rows)


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {
        f"{task} {metric.partition(',')[0]}": round(value, 4)
        for task, metrics in scores.items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }


if __name__ == "__main__":
    main()
