"""Two ways to prune at one size, on the same documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dichotomy.steps import OF_LAYER_0
from dichotomy.tables import MEASURES, Row, tested
from lm_eval_pruned.compare.pairing import (
    DocumentReader,
    paired_documents,
    paired_test,
)
from lm_eval_pruned.results.files import ResultsError


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from dichotomy.measured import Sweep
    from lm_eval_pruned.results.files import Run


class Way(NamedTuple):
    """Runs of one step that are pruned in one way.

    Attributes:
        step: Name of the step.
        criterion: None for runs without a criterion.
        allocation: None for uniform widths.
    """

    step: str
    criterion: str | None = None
    allocation: str | None = None

    def runs(self, sweep: Sweep) -> list[Run]:
        """Return the runs of the step's sweep."""
        return sweep.select(criterion=self.criterion, allocation=self.allocation)


@dataclass(frozen=True)
class Contrast:
    """Two methods that are compared at the same size.

    Attributes:
        question: Under which they stand on the page.
        one: The first.
        other: The second.
        nearest: Whether sizes are matched by parameters, and not by percentage.
    """

    question: str
    one: Way
    other: Way
    nearest: bool = False


CONTRASTS = (
    *(
        Contrast("best", Way(step, "best"), Way(step, "maw"))
        for step in ("choice", "instructions")
    ),
    *(
        Contrast("skip0", Way("choice_skip0", criterion), Way("choice", criterion))
        for criterion in OF_LAYER_0
    ),
    Contrast("skip0", Way("instructions_skip0", "maw"), Way("instructions", "maw")),
    *(
        Contrast(
            "sensitivity",
            Way(f"{step}_sensitivity", criterion, "sensitivity"),
            Way(step, criterion),
        )
        for step in ("choice", "instructions")
        for criterion in ("maw", "best")
    ),
    Contrast("aligned", Way("choice_aligned", "maw"), Way("choice", "maw")),
    *(
        Contrast(
            "depth",
            Way("choice_depth", criterion, allocation),
            Way(depth),
            nearest=True,
        )
        for depth in ("choice_depth", "choice_depth_influence")
        for allocation in (None, "sensitivity")
        for criterion in ("maw", "best")
    ),
)
#: Steps with sizes of their own, which are on the page as width against depth only.
OF_DEPTH = {
    way.step
    for each in CONTRASTS
    if each.question == "depth"
    for way in (each.one, each.other)
}


def contrast_rows(
    sweeps: Mapping[str, Sweep], read: DocumentReader, notes: list[str]
) -> list[Row]:
    """Return the comparisons of `CONTRASTS` whose two sides were measured; `notes` gets the rest."""
    rows: list[Row] = []
    for contrast in CONTRASTS:
        if not {contrast.one.step, contrast.other.step} <= sweeps.keys():
            continue
        here, there = (sweeps[way.step] for way in (contrast.one, contrast.other))
        ones, others = contrast.one.runs(here), contrast.other.runs(there)
        for one, other in _matched(here, ones, there, others, contrast.nearest):
            rows += _rows(contrast, here, one, there, other, read, notes)
    return rows


def _matched(
    here: Sweep, ones: Sequence[Run], there: Sweep, others: Sequence[Run], nearest: bool
) -> Iterator[tuple[Run, Run]]:
    if nearest:
        for other in others:
            if ones:
                size = other.pruning.get("parameters_after", 0)
                yield (
                    min(
                        ones,
                        key=lambda run: abs(
                            run.pruning.get("parameters_after", 0) - size
                        ),
                    ),
                    other,
                )
        return
    by_percent = {there.identity(run)["percent"]: run for run in others}
    for one in ones:
        percent = here.identity(one)["percent"]
        if percent in by_percent:
            yield one, by_percent[percent]


def _rows(
    contrast: Contrast,
    here: Sweep,
    one: Run,
    there: Sweep,
    other: Run,
    read: DocumentReader,
    notes: list[str],
) -> Iterator[Row]:
    first, second = here.identity(one), there.identity(other)
    for task, measure in MEASURES.items():
        key = task, measure.metric
        if key not in one.scores or key not in other.scores:
            continue
        try:
            pair = paired_documents(other, one, *key, read)
        except ResultsError as error:
            notes.append(f"{here.model}, {contrast.question}: {error}")
            continue
        yield {
            **first,
            "question": contrast.question,
            "task": task,
            "one": first["method"],
            "other": second["method"],
            "parameters_one": first["parameters"],
            "parameters_other": second["parameters"],
            "score_one": one.scores[key].value,
            "score_other": other.scores[key].value,
            **tested(paired_test(pair) if pair else None, measure.margin),
        }
