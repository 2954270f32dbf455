"""What differs from a baseline beside the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_pruned.gate.findings import place_of
from lm_eval_pruned.results.settings import (
    ASKED,
    CIRCUMSTANCES,
    PRUNING,
    differing,
    listed,
    notes_on,
    shown,
)


if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval_pruned.gate.baseline_file import Baseline
    from lm_eval_pruned.results.files import Run


def notes(runs: Mapping[str, Run], baseline: Baseline) -> list[str]:
    """Return what differs from the baseline beside the scores, one sentence each."""
    found: dict[str, list[str]] = {}
    tasks = [key for key in baseline.settings if key[1] in _tasks(runs, key[0])]
    for name, task in tasks:
        before = baseline.settings[name, task]
        after = runs[name].settings.get(task, {})
        names = (*ASKED, *CIRCUMSTANCES, *PRUNING)
        for setting in differing(before, after, names):
            values = f"{shown(before.get(setting))} -> {shown(after.get(setting))}"
            found.setdefault(f"{setting} {values}", []).append(place_of(name, task))
        if before.get("documents") is None:
            what = "documents: the baseline does not say how many"
            found.setdefault(what, []).append(place_of(name, task))
    return notes_on(runs.values()) + [
        f"{change} ({'everywhere' if len(where) == len(tasks) else listed(where)})."
        for change, where in _without_hashes(found).items()
    ]


def update_notes(
    runs: Mapping[str, Run], baseline: Baseline, previous: Baseline
) -> list[str]:
    """Return what an update changes or drops beside the scores, one sentence each."""
    gone = [
        f"{place_of(run, task)} {metric}"
        for run, task, metric in previous.expectations
        if (run, task, metric) not in baseline.expectations
    ]
    dropped = [f"No longer expected: {listed(gone)}."] if gone else []
    return dropped + notes(runs, previous)


def _tasks(runs: Mapping[str, Run], name: str) -> list[str]:
    return runs[name].tasks() if name in runs else []


def _without_hashes(found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Say once that a hash differs, whatever its values."""
    merged: dict[str, list[str]] = {}
    for change, where in found.items():
        name = change.split(" ", 1)[0]
        said = _HASHES.get(name, change)
        merged.setdefault(said, []).extend(where)
    return merged


#: What it means that a hash is another.
_HASHES = {
    "task_hash": "task_hash is another: the documents, the prompts or their order are",
    "kept_digest": "kept_digest is another: other neurons are kept",
}
