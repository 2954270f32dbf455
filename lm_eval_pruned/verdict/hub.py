"""A verdict on the Hub: a section of the model card, and the scores in ``.eval_results/verdict.yaml``."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.files import ResultsError, read_json
from lm_eval_pruned.results.runs import results_files
from lm_eval_pruned.sweeps.options import read_mapping
from lm_eval_pruned.sweeps.plan import SOURCES
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.verdict.models import TYPES


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from huggingface_hub import EvalResultEntry

    Kept = Mapping[tuple[str, str], str | None]

#: Where the scores lie in a repository.
_SCORES = ".eval_results/verdict.yaml"
#: What the section of a card that belongs to this package lies between.
_BEGIN, _END = "<!-- lm-eval-pruned verdict -->", "<!-- end of the verdict -->"


def without_paths(model: str) -> str:
    """Return what may be published of a model, or of a path of results: no folders of this machine.

    Of a path, that is its last part, whether or not the path is still there. Names on the Hub stay.
    """
    kind, _, arguments = model.partition(",")
    if kind not in TYPES:
        return _last_part(model)
    try:
        values = read_mapping(arguments, model) if arguments else {}
    except ValueError:
        # A path with a comma, perhaps.
        values = {}
    shown = [f"{name}={_shown(value, name)}" for name, value in values.items()]
    return ",".join([kind, *shown])


def _shown(value: Any, name: str) -> str:
    if isinstance(value, str):
        return _published(value, name)
    return json.dumps(_published(value, name), default=str)


def _published(value: Any, name: str) -> Any:
    """Return the value of an argument with the last part of each path."""
    if isinstance(value, dict):
        return {key: _published(each, key) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_published(each, name) for each in value]
    if not isinstance(value, str) or (name in SOURCES and _is_on_hub(value)):
        return value
    return _last_part(value)


def _is_on_hub(name: str) -> bool:
    """Whether a name is of the form that the Hub has, and no path here."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


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
        on_hub = lambda name: api.repo_exists(name, repo_type="dataset")
        write_atomically(folder / _SCORES, eval_results(results, kept, on_hub))
        what = f"and scores ({_SCORES})"
    except ResultsError as error:
        (folder / _SCORES).unlink(missing_ok=True)
        what = f"without scores: {error}"
    message = "Add a verdict by lm-eval-pruned"
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return f"{repository} has the verdict in its README.md, {what}"


def eval_results(
    path: Path, kept: Kept, on_hub: Callable[[str], bool] = lambda name: True
) -> str:
    """Return the scores of a results file, or of a folder of them, as the Hub reads them.

    `kept` says of scores, by task and metric, what they keep of those of the unpruned model; `on_hub`
    whether there is a data set of a name, which may be a folder where the results were made.

    Raises:
        ResultsError: There are none that a data set of the Hub has all documents of.
    """
    import yaml
    from huggingface_hub import eval_result_entries_to_yaml

    entries: dict[str, EvalResultEntry] = {}
    for file in results_files(path):
        entries |= _entries(read_json(file), kept, on_hub)
    if not entries:
        raise ResultsError(
            f"{path} has no score over all documents of a data set on the Hub: evaluate a task such "
            "as mmlu_pro without limit."
        )
    listed = eval_result_entries_to_yaml([entries[task] for task in sorted(entries)])
    return yaml.safe_dump(listed, sort_keys=False, allow_unicode=True)


def _entries(
    content: dict[str, Any], kept: Kept, on_hub: Callable[[str], bool]
) -> Iterator[tuple[str, EvalResultEntry]]:
    from huggingface_hub import EvalResultEntry

    day = time.strftime("%Y-%m-%d", time.gmtime(content["date"]))
    for task, config in content.get("configs", {}).items():
        dataset, counts = (
            str(config.get("dataset_path")),
            content["n-samples"].get(task),
        )
        # The name of a builder, such as json, and a local folder are not data sets of the Hub.
        if not _is_on_hub(dataset) or not counts:
            continue
        if counts["effective"] != counts["original"] or not on_hub(dataset):
            continue
        first = next(iter(config.get("metric_list") or [{}])).get("metric")
        for metric, value in content["results"].get(task, {}).items():
            if metric.partition(",")[0] != first:
                continue
            notes = (
                f"lm-evaluation-harness, {task}: {metric}, {content['n-shot'].get(task, 0)}-shot, "
                f"{counts['effective']} documents"
            )
            if share := kept.get((task, metric)):
                notes += f"; kept of the score above the floor: {share}"
            yield (
                task,
                EvalResultEntry(
                    dataset_id=dataset,
                    task_id=config.get("dataset_name") or "default",
                    value=value,
                    date=day,
                    notes=notes,
                ),
            )
            break
