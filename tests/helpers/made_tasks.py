"""Tasks of made-up questions, one of each type of request, which need no download."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from pathlib import Path

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
GENERATION = {
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "7",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match"}],
}


def write_made_tasks(folder: Path, questions: int = 6) -> Path:
    """Write ``tiny_choice``, ``tiny_rolling`` and ``tiny_generation``; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    asked: list[dict] = [
        {"question": f"What is {i} plus {i}?", "answer": i % 2}
        | {"choices": [str(2 * i), str(2 * i + 3)]}
        for i in range(questions)
    ]
    texts = [{"text": f"The number {i} comes before {i + 1}. " * 3} for i in range(4)]
    made = {"choice": (CHOICE, asked), "rolling": (ROLLING, texts)}
    for name, (task, rows) in {**made, "generation": (GENERATION, texts)}.items():
        data = folder / f"tiny_{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"dataset_path": "json", "test_split": "test"}
        source["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        whole = {"task": data.stem, **source, "metadata": {"version": 1.0}, **task}
        # YAML reads JSON as well.
        data.with_suffix(".yaml").write_text(json.dumps(whole))
    return folder
