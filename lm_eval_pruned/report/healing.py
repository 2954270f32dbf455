"""The sections of a report on sizes that were trained again: what that cost, and what it gave."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lm_eval_pruned.compare.comparison_table import (
    interval_text,
    number_text,
    p_text,
)
from lm_eval_pruned.compare.pairing import is_partial, paired_documents, paired_test
from lm_eval_pruned.compare.statistics import false_discovery
from lm_eval_pruned.compare.verdicts import verdict_of
from lm_eval_pruned.report.page import (
    Cell,
    Section,
    Table,
    run_label,
    tone_of,
    verdict_cell,
)
from lm_eval_pruned.results.files import (
    ResultsError,
    as_mapping,
    finite_or_none,
)
from lm_eval_pruned.results.groups import healing_name, is_control, primary_metrics


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.pairing import DocumentReader
    from lm_eval_pruned.compare.statistics import PairedTest
    from lm_eval_pruned.results.files import Run


@dataclass(frozen=True)
class PairedRow:
    """A task of two runs; without a test the reason why there is none.

    `q`, `level`, which is what the correction leaves to the row, and `verdict` are those of `judged`.
    """

    before: Run
    after: Run
    task: str
    metric: str
    test: PairedTest | None
    documents: int | None
    why_not: str = ""
    q: float | None = None
    level: float | None = None
    verdict: str = ""

    @property
    def difference(self) -> float:
        """Score of `after`, less that of `before`."""
        before, after = (
            run.scores[self.task, self.metric] for run in (self.before, self.after)
        )
        return after.value - before.value


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
        for row in paired_rows(before, after, alpha, read)
    ]
    if not rows:
        return sections
    text = (
        "Each size against itself: the score after it was trained again, less that before, "
        "paired by document. q: p after Benjamini-Hochberg over the sizes of each task, "
        f"significant at {alpha:g}; intervals are widened as q is. The "
        "tables above compare both with the unpruned model."
    )
    names = "Healing: after against before", "before", "after"
    return [*sections, paired_section(*names, text, base, judged(rows, alpha), alpha)]


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


def paired_rows(
    before: Run, after: Run, alpha: float, read: DocumentReader
) -> list[PairedRow]:
    """Return the tasks of two runs, paired by document."""
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
        rows.append(PairedRow(before, after, task, metric, test, count, why))
    return rows


def judged(found: Sequence[PairedRow], alpha: float) -> list[PairedRow]:
    """Return rows with what is shown of them, by task and falling expansion ratio."""
    order = list(dict.fromkeys(row.task for row in found))
    found = sorted(
        found,
        key=lambda row: (order.index(row.task), -(row.after.expansion_ratio or 0)),
    )
    ps = [row.test.p if row.test else None for row in found]
    families = [(row.task, is_control(row.after)) for row in found]
    return [
        replace(
            row,
            q=q,
            level=level,
            verdict=verdict_of(
                row.difference,
                q,
                alpha,
                row.before.scores[row.task, row.metric].higher_is_better,
            ),
        )
        for row, (q, level) in zip(
            found, false_discovery(ps, families, alpha), strict=True
        )
    ]


def paired_section(
    heading: str,
    before: str,
    after: str,
    text: str,
    base: Run,
    found: Sequence[PairedRow],
    alpha: float,
) -> Section:
    """Return rows as a section.

    Args:
        heading: Its heading.
        before: What the column of the first scores is called.
        after: What that of the second ones is called.
        text: What it says first.
        base: The unpruned model.
        found: From `judged`.
        alpha: Level of the tests.
    """
    rows: list[list[Cell | str]] = []
    for row in found:
        key = row.task, row.metric
        one, other = (run.scores[key].value for run in (row.before, row.after))
        unpruned = base.scores.get(key)
        drawn = is_control(row.before) and not is_control(row.after)
        seed = f" (seed {row.before.pruning.get('seed')})" if drawn else ""
        detectable = (
            row.test.smallest_detectable(row.level)
            if row.test is not None and row.level is not None and row.q is not None
            else None
        )
        low, high = (row.test.low, row.test.high) if row.test else (None, None)
        if row.test is not None and row.level is not None:
            low, high = row.test.interval(row.level)
        rows.append(
            [
                row.task,
                row.metric.removesuffix(",none"),
                run_label(row.after if drawn else row.before),
                number_text(unpruned.value if unpruned else None, ".4f"),
                f"{one:.4f}{seed}",
                f"{other:.4f}",
                Cell(f"{row.difference:+.4f}", tone_of(row.verdict)),
                verdict_cell(row.verdict, "" if row.test else row.why_not),
                interval_text(low, high, 4),
                number_text(detectable, ".4f"),
                p_text(row.q),
                str(row.documents or "-"),
            ]
        )
    methods = sorted({row.test.method for row in found if row.test})
    return Section(
        heading,
        [
            text,
            f"Tests: {'; '.join(methods)}." if methods else "Nothing could be tested.",
        ],
        table=Table(
            heading,
            ["task", "metric", "configuration", "unpruned", before, after]
            + ["difference", "verdict", f"{1 - alpha:.0%} interval"]
            + ["smallest detectable", "q", "n"],
            rows,
            text=3,
        ),
    )
