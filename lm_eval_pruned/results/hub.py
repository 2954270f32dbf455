"""Scores in the form that the Hub reads: ``.eval_results/*.yaml`` in the repository of a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.files import (
    ResultsError,
    as_mapping,
    left_of,
    newest_first,
    read_json,
)


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from huggingface_hub import EvalResultEntry

#: Where the scores lie in a repository.
EVAL_RESULTS = ".eval_results/lm_eval.yaml"


def eval_results(path: str | Path, pruning: Mapping[str, Any]) -> str:
    """Return the scores of a results file, or of a folder of them, as the Hub reads them.

    ResultsError if they are of other neurons than the record `pruning` says, or of another repair,
    or there are none that a data set of the Hub has all documents of.
    """
    import yaml
    from huggingface_hub import eval_result_entries_to_yaml

    path = Path(path)
    entries: dict[str, EvalResultEntry] = {}
    for file in [path] if path.is_file() else newest_first(path):
        content = read_json(file)
        found = as_mapping(as_mapping(content.get("config")).get("pruning"))
        if left_of(found) != left_of(pruning):
            one, other = (", ".join(map(str, left_of(e))) for e in (found, pruning))
            raise ResultsError(
                f"results={file} is of other neurons or another repair (kept digest, repair and "
                f"its text: {one}) than those that are exported ({other}): pass results of "
                "pruned-hf with the same arguments."
            )
        entries = {**dict(_entries(content)), **entries}
    if not entries:
        raise ResultsError(
            f"results={path} has no score of all documents of a data set of the Hub: evaluate a "
            "task such as mmlu_pro without limit, or leave results out."
        )
    listed = eval_result_entries_to_yaml([entries[task] for task in sorted(entries)])
    return yaml.safe_dump(listed, sort_keys=False, allow_unicode=True)


def _entries(content: dict[str, Any]) -> Iterator[tuple[str, EvalResultEntry]]:
    from huggingface_hub import EvalResultEntry

    day = time.strftime("%Y-%m-%d", time.gmtime(content["date"]))
    for task, asked in content.get("configs", {}).items():
        place, counted = str(asked.get("dataset_path")), content["n-samples"].get(task)
        # The name of a builder, such as json, and a local folder are not data sets of the Hub.
        if place.count("/") != 1 or Path(place).exists() or not counted:
            continue
        first = next(iter(asked.get("metric_list") or [{}])).get("metric")
        shots, documents = content["n-shot"].get(task, 0), counted["effective"]
        scores = content["results"].get(task, {}).items()
        named = [(n, v) for n, v in scores if n.partition(",")[0] == first]
        for metric, value in named[: documents == counted["original"]]:
            of = {
                "dataset_id": place,
                "task_id": asked.get("dataset_name") or "default",
            }
            said = f"{task}: {metric}, {shots}-shot, {documents} documents"
            of |= {"date": day, "notes": f"lm-evaluation-harness, {said}"}
            yield task, EvalResultEntry(value=value, **of)
