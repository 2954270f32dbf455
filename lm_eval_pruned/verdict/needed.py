"""What would decide a claim that is undecided: how many documents, in how many minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_pruned.compare.judge import CLAIM_LEVEL
from lm_eval_pruned.compare.power import ALIKE, Pilot, documents_for


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.judge import Case, Difference


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
    available = sum(base.evaluated[leaf].available for leaf in leaves)
    if available < needed:
        tasks = "the tasks have" if claim[1:] else "the task has"
        return f"{more}, but {tasks} {available:,}: accept a wider margin."
    costs = [run.seconds_per_document(leaves) for run in (base, candidate)]
    minutes = (needed - seen) * sum(map(float, filter(None, costs))) / 60
    return f"{more}, {max(1, round(minutes)):,} min." if all(costs) else f"{more}."
