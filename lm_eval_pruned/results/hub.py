"""Scores in the form that the Hub reads: ``.eval_results/*.yaml`` in the repository of a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.files import (
    ResultsError,
    as_mapping,
    read_json,
)
from lm_eval_pruned.results.runs import results_files
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.pruning_record import left_of


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from huggingface_hub import EvalResultEntry

    Kept = Mapping[tuple[str, str], str | None]

#: Where the scores lie in a repository: those of an export, and those of a verdict.
EVAL_RESULTS = ".eval_results/lm_eval.yaml"
_OF_VERDICT = ".eval_results/verdict.yaml"
#: What the section of a card that belongs to this package lies between.
_BEGIN, _END = "<!-- lm-eval-pruned verdict -->", "<!-- end of the verdict -->"


def check_repository(repository: str) -> None:
    """Raise the Hub's own error, an OSError, if the user cannot write to a repository."""
    from huggingface_hub import HfApi

    HfApi().auth_check(repository, write=True)


def push_verdict(
    repository: str, section: str, results: Path, folder: Path, kept: Kept
) -> str:
    """Write a section into a repository's card, in place of an earlier one, and scores beside it.

    `kept` is as `eval_results` takes it. What is pushed is written to `folder`. Returns a sentence on
    what was pushed.
    """
    from huggingface_hub import HfApi

    api, card = HfApi(), ""
    if api.file_exists(repository, "README.md"):
        file = Path(api.hf_hub_download(repository, "README.md"))
        card = file.read_text("utf-8")
    start, end = card.rfind(_BEGIN), card.rfind(_END)
    earlier = 0 <= start < end
    before = card[:start] if earlier else card + "\n" * bool(card)
    after = card[end + len(_END) :] if earlier else "\n"
    text = f"{before}{_BEGIN}\n\n{section}\n{_END}{after}"
    write_atomically(folder / "README.md", text)
    try:
        write_atomically(folder / _OF_VERDICT, eval_results(results, kept))
        said = f"and scores ({_OF_VERDICT})"
    except ResultsError as error:
        (folder / _OF_VERDICT).unlink(missing_ok=True)
        said = f"without scores: {error}"
    message = "Add a verdict by lm-eval-pruned"
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return f"{repository} has the verdict in its README.md, {said}"


def eval_results(
    path: str | Path, kept: Kept, pruning: Mapping[str, Any] | None = None
) -> str:
    """Return the scores of a results file, or of a folder of them, as the Hub reads them.

    `kept` says of scores, by task and metric, what they keep of those of the unpruned model.

    Raises:
        ResultsError: They are of other neurons than the record `pruning` says, if it is given, or of
            another repair, or there are none that a data set of the Hub has all documents of.
    """
    import yaml
    from huggingface_hub import eval_result_entries_to_yaml

    entries: dict[str, EvalResultEntry] = {}
    for file in results_files(Path(path)):
        content = read_json(file)
        found = as_mapping(as_mapping(content.get("config")).get("pruning"))
        if pruning is not None and left_of(found) != left_of(pruning):
            one, other = (", ".join(map(str, left_of(e))) for e in (found, pruning))
            raise ResultsError(
                f"results={file} is from a model with other neurons or another repair (kept digest, "
                f"repair and its text: {one}) than the exported one ({other}): pass results of "
                "pruned-hf with the same arguments."
            )
        entries = {**dict(_entries(content, kept)), **entries}
    if not entries:
        raise ResultsError(
            f"results={path} has no score over all documents of a data set on the Hub: evaluate a "
            "task such as mmlu_pro without limit."
        )
    listed = eval_result_entries_to_yaml([entries[task] for task in sorted(entries)])
    return yaml.safe_dump(listed, sort_keys=False, allow_unicode=True)


def _entries(
    content: dict[str, Any], kept: Kept
) -> Iterator[tuple[str, EvalResultEntry]]:
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
            if share := kept.get((task, metric)):
                said += f"; kept of the score above the floor: {share}"
            of |= {"date": day, "notes": f"lm-evaluation-harness, {said}"}
            yield task, EvalResultEntry(value=value, **of)
