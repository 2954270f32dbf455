"""The section of a report that sets pruned models against random cuts of their size."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.judge import Case, judged
from lm_eval_pruned.compare.pairing import paired_documents
from lm_eval_pruned.report.page import run_label
from lm_eval_pruned.report.sections import compared_section
from lm_eval_pruned.results.groups import is_control, primary_metrics


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.compare.floors import Standing
    from lm_eval_pruned.compare.judge import Difference
    from lm_eval_pruned.compare.pairing import DocumentReader
    from lm_eval_pruned.report.page import Section
    from lm_eval_pruned.results.files import Run

    #: Whether a run is above the floor of a task and metric.
    Known = Mapping[tuple[str, str, str], Standing | None]

_NOTHING: Known = MappingProxyType({})
#: What of a record of pruning is the same where the same places were cut.
_PLACES = ("asked", "allocation", "layers_pruned", "layers_dropped", "hidden_size")


def random_section(
    others: Sequence[Run], alpha: float, read: DocumentReader, known: Known = _NOTHING
) -> Section | None:
    """Each configuration against those whose neurons were removed at random in the same places."""

    def cut(run: Run) -> list[Any]:
        return [*map(run.pruning.get, _PLACES)]

    pruned = [run for run in others if run.pruning.get("criterion")]
    chosen = [run for run in pruned if not is_control(run)]
    controls = [run for run in pruned if is_control(run)]
    pairs = [(c, run) for run in chosen for c in controls if cut(c) == cut(run)]
    text = (
        "Each configuration compared with random cuts of the same size, one seed at a time, paired by "
        "document: the gain from the criterion. q: p after Benjamini-Hochberg over the rows of each "
        "task."
    )
    paired = [run for _, run in pairs]
    missing = [run_label(run) for run in chosen if run not in paired]
    criteria = dict.fromkeys([*(run.pruning["criterion"] for run in pruned), "random"])
    note = (
        f"No random cut has the size of {', '.join(missing)}. To add one, run the sweep "
        f"again with --criteria {' '.join(criteria)} --seeds 0 1 2; finished units are not "
        "evaluated again."
    )
    notes = [note] * bool(missing)
    rows = compared_pairs(pairs, alpha, read, known)
    return compared_section("Compared with random pruning", text, rows, alpha, notes)


def compared_pairs(
    pairs: Sequence[tuple[Run, Run]],
    alpha: float,
    read: DocumentReader,
    known: Known = _NOTHING,
) -> list[Difference]:
    """Return the tasks of each pair (before, after), with q over the pairs of each task."""
    cases = []
    for before, after in pairs:
        for key in primary_metrics([before, after]):
            pair = paired_documents(before, after, *key, read)
            family = key[0], is_control(after)
            cases.append(Case(before, after, key, pair, family))
    return [
        replace(
            row,
            run=f"{run_label(case.run)} against {case.base.name}",
            floor=known.get((case.run.name, *case.key)),
        )
        for case, row in zip(cases, judged(cases, alpha), strict=True)
    ]
