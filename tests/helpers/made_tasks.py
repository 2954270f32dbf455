"""Tasks of made-up questions, which need no download."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from pathlib import Path


def _write(folder: Path, name: str, rows: list[dict], **task: Any) -> None:
    """Write a task and its data; YAML reads JSON as well."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **task,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))


def _metrics(*names: str) -> list[dict[str, str]]:
    return [{"metric": name} for name in names]


def write_choice_task(
    folder: Path, name: str = "tiny_choice", questions: int = 6
) -> Path:
    """Write a multiple-choice task of made-up questions to `folder`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "question": f"What is {i} plus {i}?",
            "choices": [str(2 * i), str(2 * i + 3)],
            "answer": i % 2,
        }
        for i in range(questions)
    ]
    _write(
        *(folder, name, rows),
        output_type="multiple_choice",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=_metrics("acc", "acc_norm"),
    )
    return folder


def write_text_tasks(folder: Path) -> Path:
    """Write one rolling and one generation task to `folder`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"The number {i} comes before {i + 1}. " * 3} for i in range(4)]
    _write(
        *(folder, "tiny_rolling", rows),
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=_metrics("word_perplexity", "bits_per_byte"),
    )
    _write(
        *(folder, "tiny_generation", rows),
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="7",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
        metric_list=_metrics("exact_match"),
    )
    return folder
