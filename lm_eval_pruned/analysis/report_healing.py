"""The sections of a report on sizes that were trained again: what that cost, and what it gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lm_eval_pruned.analysis import statistics
from lm_eval_pruned.analysis.comparison_rows import verdict_of
from lm_eval_pruned.analysis.comparison_table import (
    interval_text,
    number_text,
    p_text,
)
from lm_eval_pruned.analysis.pairing import is_partial, paired_documents, paired_test
from lm_eval_pruned.analysis.report_page import (
    Cell,
    Section,
    Table,
    run_label,
    tone_of,
    verdict_cell,
)
from lm_eval_pruned.analysis.results_file import (
    ResultsError,
    as_mapping,
    finite_or_none,
)
from lm_eval_pruned.analysis.series import healing_name, is_control, primary_metrics


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.analysis.pairing import DocumentReader
    from lm_eval_pruned.analysis.results_file import Run
    from lm_eval_pruned.analysis.statistics import PairedTest


@dataclass(frozen=True)
class _Row:
    """A task of a size, before and after; without a test the reason why there is none."""

    before: Run
    after: Run
    task: str
    metric: str
    test: PairedTest | None
    documents: int | None
    why_not: str = ""


def healing_sections(
    base: Run, others: Sequence[Run], alpha: float, read: DocumentReader
) -> list[Section]:
    """Return what healing cost and what it gave; nothing where no size was healed.

    Args:
        base: The unpruned model.
        others: The other runs.
        alpha: Level of the tests.
        read: Reader whose documents are used again.
    """
    healed = [run for run in others if run.healing]
    if not healed:
        return []
    sections = [_cost(healed)]
    rows = [
        row
        for after in healed
        if (before := before_healing(after, others)) is not None
        for row in _rows(before, after, alpha, read)
    ]
    return [*sections, _differences(base, rows, alpha)] if rows else sections


def before_healing(after: Run, runs: Sequence[Run]) -> Run | None:
    """Return the run of the same neurons that was not trained again, or None."""
    kept = after.pruning.get("kept_digest")
    same = (
        run
        for run in runs
        if not run.healing and run.pruning.get("kept_digest") == kept
    )
    return None if kept is None else next(same, None)


def _cost(healed: Sequence[Run]) -> Section:
    rows, kinds = [], set()
    notes: dict[str, None] = {}
    for run in healed:
        record = run.healing
        energy = as_mapping(record.get("energy"))
        text = as_mapping(record.get("data"))
        joules = finite_or_none(as_mapping(energy.get("joules")).get("total"))
        for part, kind in as_mapping(energy.get("sources")).items():
            kinds.add(f"{part.upper()}: {kind}")
        for note in energy.get("notes") or ():
            notes[f"{run.name}: {note}"] = None
        if joules is None and not energy.get("notes"):
            notes[f"{run.name}: its training was not metered"] = None
        rows.append(
            [
                run_label(run),
                healing_name(run),
                str(text.get("file") or "-"),
                number_text(finite_or_none(record.get("steps")), ",.0f"),
                number_text(finite_or_none(record.get("tokens_seen")), ",.0f"),
                number_text(finite_or_none(record.get("seconds")), ",.1f"),
                number_text(joules, ",.0f", "not measured"),
            ]
        )
    sources = (
        f"Energy is that of the machine while it trained, with all that it did beside. "
        f"Sources: {'; '.join(sorted(kinds))}. Modelled energy is an estimate, not a "
        "measurement."
        if kinds
        else "Where the energy comes from is not known."
    )
    return Section(
        "Healing: cost",
        [f"What it took to train the pruned models again. {sources}"],
        table=Table(
            "Healing: cost",
            [
                "configuration",
                "trained",
                "text",
                "steps",
                "tokens",
                "seconds",
                "joules",
            ],
            rows,
            text=3,
        ),
        notes=list(notes),
    )


def _rows(before: Run, after: Run, alpha: float, read: DocumentReader) -> list[_Row]:
    rows = []
    for task, metric in primary_metrics([before, after]):
        if task not in before.tasks(subtasks=False):
            continue
        pair, why = None, "no samples of the same documents"
        if is_partial(before, task) or is_partial(after, task):
            why = "ended before its last document"
        else:
            try:
                pair = paired_documents(before, after, task, metric, read)
            except ResultsError:
                why = "other documents"
        test = None if pair is None else paired_test(pair, alpha)
        count = None if pair is None else len(pair[0].keys)
        rows.append(_Row(before, after, task, metric, test, count, why))
    return rows


def _differences(base: Run, found: Sequence[_Row], alpha: float) -> Section:
    order = list(dict.fromkeys(row.task for row in found))
    found = sorted(
        found,
        key=lambda row: (
            order.index(row.task),
            -(row.after.expansion_ratio or 0),
        ),
    )
    ps = [row.test.p if row.test else None for row in found]
    families = [(row.task, is_control(row.after)) for row in found]
    levels = statistics.false_discovery_levels(ps, alpha, families)
    rows: list[list[Cell | str]] = []
    for row, q, level in zip(
        found, statistics.false_discovery_rate(ps, families), levels, strict=True
    ):
        key = row.task, row.metric
        before, after = (run.scores[key] for run in (row.before, row.after))
        unpruned = base.scores.get(key)
        difference = after.value - before.value
        verdict = verdict_of(difference, q, alpha, before.higher_is_better)
        detectable = (
            row.test.smallest_detectable(level)
            if row.test is not None and level is not None and q is not None
            else None
        )
        low, high = (row.test.low, row.test.high) if row.test else (None, None)
        rows.append(
            [
                row.task,
                row.metric.removesuffix(",none"),
                run_label(row.before),
                verdict_cell(verdict, "" if row.test else row.why_not),
                number_text(unpruned.value if unpruned else None, ".4f"),
                f"{before.value:.4f}",
                f"{after.value:.4f}",
                Cell(f"{difference:+.4f}", tone_of(verdict)),
                interval_text(low, high, 4),
                number_text(detectable, ".4f"),
                p_text(q),
                str(row.documents or "-"),
            ]
        )
    methods = sorted({row.test.method for row in found if row.test})
    return Section(
        "Healing: after against before",
        [
            (
                "Each size against itself: the score after it was trained again, less that before, "
                f"paired by document. q: p after Benjamini-Hochberg over the sizes of each task, "
                f"significant at {alpha:g}. How both differ from the unpruned model stands in the "
                "tables above."
            ),
            f"Tests: {'; '.join(methods)}." if methods else "Nothing could be tested.",
        ],
        table=Table(
            "Healing: after against before",
            [
                "task",
                "metric",
                "configuration",
                "verdict",
                "unpruned",
                "before",
                "after",
            ]
            + ["difference", f"{1 - alpha:.0%} interval", "smallest detectable"]
            + ["q", "n"],
            rows,
            text=4,
        ),
    )
