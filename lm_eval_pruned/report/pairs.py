"""The sections of a report that set pruned models against each other: healed ones, random cuts."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.judge import Case, judged
from lm_eval_pruned.compare.pairing import paired_documents
from lm_eval_pruned.report.page import run_label
from lm_eval_pruned.report.sections import compared_section
from lm_eval_pruned.results.files import as_mapping
from lm_eval_pruned.results.groups import healing_name, is_control, primary_metrics
from lm_eval_pruned.util.pruning_record import left_of


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


def healing_section(
    others: Sequence[Run], alpha: float, read: DocumentReader, known: Known = _NOTHING
) -> Section | None:
    """Each healed size against the run of the same weights before, and what the training took."""
    healed = [run for run in others if run.healing]
    cut = [run for run in others if not run.healing and run.pruning.get("kept_digest")]
    before = {left_of(run.pruning): run for run in cut}
    found = [(before.get(left_of(run.pruning)), run) for run in healed]
    pairs = [(one, other) for one, other in found if one]
    text = (
        "Each size after healing, compared with the same size before it, paired by document. q: p "
        "after Benjamini-Hochberg over the sizes of each task. Energy is that of the whole machine "
        "during training; modelled energy is an estimate."
    )
    rows = compared_pairs(pairs, alpha, read, known)
    costs = [f"{run_label(run)}: {_cost(run)}" for run in healed]
    return compared_section(
        "Healing, compared with no healing", text, rows, alpha, costs
    )


def _cost(run: Run) -> str:
    record, energy = run.healing, as_mapping(run.healing.get("energy"))
    joules = as_mapping(energy.get("joules")).get("total")
    took = {
        "text": as_mapping(record.get("data")).get("file"),
        **{name: record.get(name) for name in ("steps", "tokens_seen", "seconds")},
        "joules": "not measured" if joules is None else joules,
        **as_mapping(energy.get("sources")),
    }
    parts = [f"{name} {value}" for name, value in took.items()]
    return ", ".join([healing_name(run), *parts, *(energy.get("notes") or ())])


def random_section(
    others: Sequence[Run], alpha: float, read: DocumentReader, known: Known = _NOTHING
) -> Section | None:
    """Each configuration against those whose neurons were removed at random in the same places."""

    def cut(run: Run) -> list[Any]:
        trained = healing_name(run) if run.healing else None
        return [*map(run.pruning.get, _PLACES), trained]

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
