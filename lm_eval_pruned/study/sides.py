"""The verdict on the dichotomy: from the sizes of a task to its side, and from three sides to a word.

What is not shown counts for nothing: a task keeps its score only where it is shown to lie within
the margin of a study at every size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_eval_pruned.results.groups import BEHAVIOUR, KNOWLEDGE, TEXT


if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lm_eval_pruned.compare.judge import Difference

FALLS, KEEPS, RISES, UNKNOWN = "falls", "keeps", "rises", "cannot tell"
#: Which of the states of its sizes is that of a task: a loss at any size, else a gain at any.
OVER_SIZES = (FALLS, RISES, UNKNOWN, KEEPS)
#: Which of the states of its tasks is that of a side: one can show a loss, all must show the rest.
OVER_TASKS = (FALLS, UNKNOWN, RISES, KEEPS)
UNDECIDED = "cannot be decided"


def state_at(row: Difference, can_fall: bool) -> str:
    """Return what one size shows of a task, whose loss can be seen where it `can_fall`."""
    if can_fall and row.verdict == "equivalent":
        return KEEPS
    if can_fall and row.verdict == "worse":
        return FALLS
    above = row.floor is None or row.floor.above_floor
    return RISES if row.verdict == "better" and above else UNKNOWN


def first_in(order: Sequence[str], states: Collection[str]) -> str:
    """Return the state that counts of several; `UNKNOWN` where there is none."""
    return next((state for state in order if state in states), UNKNOWN)


def verdict_on(sides: Mapping[str, str]) -> str:
    """Return whether the dichotomy holds, of the state of each side."""
    if UNKNOWN in sides.values():
        return UNDECIDED
    losses = [sides[KNOWLEDGE], sides[TEXT]].count(FALLS)
    if sides[BEHAVIOUR] == FALLS or not losses:
        return "does not hold"
    return "holds" if losses == 2 else "holds in part"


def side_text(side: str, tasks: Mapping[str, str], evaluated: bool) -> str:
    """Return the tasks of a side by their states, of those whose scores can show anything."""
    groups = {
        state: [task for task, shown in tasks.items() if shown == state]
        for state in OVER_TASKS
    }
    parts = [f"{state} in {joined(names)}" for state, names in groups.items() if names]
    nothing = (
        "no task is shown to be above its floor" if evaluated else "it has no task"
    )
    return f"{side}: {', '.join(parts) or f'{UNKNOWN}, because {nothing}'}"


def joined(words: Sequence[str]) -> str:
    """Return words as a list in a sentence."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
