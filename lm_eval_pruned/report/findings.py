"""What a sweep has found, one sentence for each family of tasks, from its paired tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lm_eval_pruned.results.groups import (
    FAMILIES,
    family_of,
    is_control,
    is_share,
    series_of,
)


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.comparison import Comparison, Difference
    from lm_eval_pruned.results.files import Run

_SIGNIFICANT = ("worse", "better", "different")


@dataclass(frozen=True)
class Finding:
    """One sentence: what was found, and then of which tasks.

    Attributes:
        lead: Such as ``Knowledge falls from 2.40 on``.
        rest: Such as ``: mmlu, by up to 12.3 points.``
    """

    lead: str
    rest: str


def findings(runs: Sequence[Run], comparison: Comparison) -> list[Finding]:
    """Say of each family of tasks what the tests have shown, and what they could have seen.

    Args:
        runs: The unpruned model and the others. Those pruned at random are a control, of
            which nothing is said where there is anything else.
        comparison: Of the runs with the unpruned model.
    """
    series = series_of(runs)
    chosen = {
        name: members for name, members in series.items() if not is_control(members[-1])
    }
    found = []
    for name, members in (chosen or series).items():
        sizes = {
            run.name: run.expansion_ratio or 0.0
            for run in members
            if not run.is_baseline
        }
        rows = [row for row in comparison.rows if row.primary and row.run in sizes]
        of = f" ({name})" if len(chosen or series) > 1 else ""
        for family in FAMILIES:
            tasks: dict[str, list[Difference]] = {}
            for row in sorted(rows, key=lambda row: -sizes[row.run]):
                if family_of(row.task) is family:
                    tasks.setdefault(row.task, []).append(row)
            if tasks:
                found.append(_finding(family.label + of, tasks, sizes))
    return found


def _finding(
    label: str, tasks: dict[str, list[Difference]], sizes: dict[str, float]
) -> Finding:
    changes = {
        verdict: {
            task: rows_so
            for task, rows in tasks.items()
            if (rows_so := [row for row in rows if row.verdict == verdict])
        }
        for verdict in _SIGNIFICANT
    }
    shown = {verdict: of for verdict, of in changes.items() if of}
    tested = {
        task: [row for row in rows if row.q is not None] for task, rows in tasks.items()
    }
    everything = [row for rows in tested.values() for row in rows]
    if not everything:
        lead = f"{label}: not tested"
    elif not shown:
        lead = f"{label}: no difference shown"
    else:
        leads = [
            f"{_verb(verdict, of)} "
            + _span([row for rows in of.values() for row in rows], everything, sizes)
            for verdict, of in shown.items()
        ]
        lead = f"{label} {' and '.join(leads)}"
    parts = []
    for task, rows in tasks.items():
        here = {verdict: of[task] for verdict, of in shown.items() if task in of}
        said = [
            " ".join(
                [
                    *([_verb(verdict, {task: of})] if len(shown) > 1 else []),
                    *([_span(of, tested[task], sizes)] if len(tasks) > 1 else []),
                ]
            )
            + f", by up to {_largest(of, 'difference')}"
            for verdict, of in here.items()
        ]
        if not tested[task]:
            why = rows[0].method.removeprefix("none: ")
            parts.append(f"{task}{' is not tested' if everything else ''} ({why})")
        elif not said:
            none = ": no difference shown" if shown else ""
            parts.append(f"{task}{none}, {_could_have(tested[task])}")
        else:
            found = {id(row) for of in here.values() for row in of}
            rest = [row for row in tested[task] if id(row) not in found]
            said[-1] += _not_shown(rest, sizes)
            parts.append(f"{task} {' and '.join(said)}".replace(" ,", ","))
    return Finding(lead, f": {'; '.join(parts)}.")


def _verb(verdict: str, of: dict[str, list[Difference]]) -> str:
    if verdict == "different":
        return "changes"
    rising = {rows[0].difference > 0 for rows in of.values()}
    if rising == {verdict == "better"}:
        return "rises" if verdict == "better" else "falls"
    return f"gets {verdict}"


def _span(
    shown: Sequence[Difference], tested: Sequence[Difference], sizes: dict[str, float]
) -> str:
    """Say at which sizes something is shown, of all at which it was tested."""
    ratios = sorted({sizes[row.run] for row in shown}, reverse=True)
    everywhere = sorted({sizes[row.run] for row in tested}, reverse=True)
    # Sizes down to the smallest are a range, unless there is one size only.
    tail = 0
    while tail < len(ratios) and ratios[-tail - 1] == everywhere[-tail - 1]:
        tail += 1
    alone = ratios if tail < 2 else ratios[:-tail]
    parts = [f"at {' and '.join(f'{ratio:.2f}' for ratio in alone)}"] if alone else []
    if tail > 1:
        parts.append(f"from {ratios[-tail]:.2f} on")
    return " and ".join(parts)


def _not_shown(rows: Sequence[Difference], sizes: dict[str, float]) -> str:
    """Name the sizes of a task at which nothing is shown beside those at which something is."""
    if not rows:
        return ""
    ratios = dict.fromkeys(f"{sizes[row.run]:.2f}" for row in rows)
    return f", no difference shown at {' and '.join(ratios)} ({_could_have(rows)})"


def _could_have(rows: Sequence[Difference]) -> str:
    if any(row.smallest_detectable is None for row in rows):
        return "no difference could have been seen with so few documents"
    return f"{_largest(rows, 'smallest_detectable')} could have been seen"


def _largest(rows: Sequence[Difference], what: str) -> str:
    row = max(rows, key=lambda row: abs(getattr(row, what)))
    size = abs(getattr(row, what))
    if is_share(row.metric, (row.base_score, row.score)):
        number = f"{100 * size:.1f}"
        return f"{number} point{'s' * (number != '1.0')}"
    number = f"{size:,.0f}" if size >= 1000 else f"{size:.3g}"
    return f"{number} in {row.metric.removesuffix(',none')}"
