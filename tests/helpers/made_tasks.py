"""Tasks of made-up questions, which need no download."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from pathlib import Path


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
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    (folder / f"{name}.yaml").write_text(
        f"""task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / name}.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""
    )
    return folder


def write_text_tasks(folder: Path) -> Path:
    """Write one rolling and one generation task to `folder`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"The number {i} comes before {i + 1}. " * 3} for i in range(4)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"""dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/texts.jsonl
test_split: test
metadata:
  version: 1.0
"""
    (folder / "tiny_rolling.yaml").write_text(
        source
        + """task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
    )
    (folder / "tiny_generation.yaml").write_text(
        source
        + """task: tiny_generation
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "7"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""
    )
    return folder
