"""What would decide a claim that is undecided: how many documents, in how many minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.judge import CLAIM_LEVEL
from lm_eval_pruned.compare.power import ALIKE, Pilot, documents_for
from lm_eval_pruned.results.files import as_mapping, read_json
from lm_eval_pruned.results.runs import read_unit, results_files


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from lm_eval_pruned.compare.judge import Case, Difference
    from lm_eval_pruned.results.files import Run


def what_decides(claim: Sequence[Case], row: Difference) -> str:
    """Say how many documents, in how many minutes, decide with a chance of 80 %, if the models do not differ."""
    base, candidate = claim[0].base, claim[0].run
    up = claim[0].scores[0].higher_is_better
    if None not in (row.low, row.high, up) and (row.high < 0 if up else row.low > 0):  # type: ignore[operator]
        return "A test of only this score would show it to be worse; a test of all scores needs more documents."
    if any(case.pair is None or case.margin_size is None for case in claim):
        # The finding says why nothing was decided.
        return ""
    pilots = [*map(Pilot, claim)]
    seen = sum(pilot.size for pilot in pilots)
    word = "equivalent" if up is None else "not worse"
    needed = documents_for(word, ALIKE, pilots, CLAIM_LEVEL)
    if needed is None:
        return ""
    if needed <= seen:
        return (
            f"{seen} documents would probably have decided if the models did not differ, so they may "
            "well differ: evaluate other documents, or accept a wider margin."
        )
    more = f"It would take about {needed:,} documents instead of {seen:,}"
    more += " of these tasks together" if claim[1:] else ""
    leaves = [leaf for case in claim for leaf in base.leaves(case.key[0])]
    files = [_files_of(run, leaves) for run in (base, candidate)]
    available = sum(_sizes(file)[leaf]["original"] for leaf, file in files[0].items())
    if available < needed:
        tasks = "the tasks have" if claim[1:] else "the task has"
        return f"{more}, but {tasks} {available:,}: accept a wider margin."
    costs = [seconds_per_document({*by_task.values()}) for by_task in files]
    minutes = (needed - seen) * sum(map(float, filter(None, costs))) / 60
    return f"{more}, {max(1, round(minutes)):,} min." if all(costs) else f"{more}."


def _files_of(run: Run, tasks: Iterable[str]) -> dict[str, Path]:
    """Return the results file that each task is in."""
    files = results_files(run.path)
    return {
        task: next(file for file in files if task in _sizes(file)) for task in tasks
    }


def seconds_per_document(files: Iterable[Path]) -> float | None:
    """Return the wall time of evaluating, over the documents; None where no file says it.

    That of a sweep's unit leaves out loading the model, that of the harness includes it.
    """
    spent, seen = 0.0, 0
    for file in files:
        unit = read_unit(file.parent)
        of_harness = read_json(file).get("total_evaluation_time_seconds")
        if seconds := float(unit.seconds if unit else of_harness or 0):
            spent += seconds
            seen += sum(size["effective"] for size in _sizes(file).values())
    return spent / seen if seen else None


def _sizes(file: Path) -> Mapping[str, Any]:
    """Return how many documents each task of a results file has, and how many were evaluated."""
    return as_mapping(read_json(file).get("n-samples"))
