"""What was measured with several seeds, beside what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dichotomy.crossed import over_seeds
from dichotomy.steps import LOSSES, SEEDS
from dichotomy.tables import MEASURES, Row


if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from dichotomy.measured import Sweep
    from lm_eval_pruned.compare.pairing import DocumentReader
    from lm_eval_pruned.results.files import Run


@dataclass(frozen=True)
class Side:
    """One run of each seed at each size.

    Attributes:
        name: On the page.
        steps: Step of each seed.
        kind: ``pruned``, ``healed`` or ``unpruned``, which has one size.
    """

    name: str
    steps: tuple[str, ...]
    kind: str = "pruned"

    def run(self, sweep: Sweep, percent: int) -> Run | None:
        """Return the run of a size, or None where it was not measured."""
        if self.kind == "unpruned":
            return sweep.base
        same = {"criterion": "maw", "healed": self.kind == "healed"}
        return next(iter(sweep.select(percent=percent, **same)), None)


def _seeded(step: str) -> tuple[str, ...]:
    return tuple(f"{step}_{seed}" for seed in SEEDS)


_SAMPLED = _seeded("instructions_sampled")
_DRAWN = ("reasoning", *_seeded("reasoning_draw")[1:])


def _healed(prefix: str) -> Iterator[tuple[str, Side, Side]]:
    after = {
        name: Side(loss, _seeded(prefix + name), "healed")
        for name, loss in LOSSES.items()
    }
    for one in after.values():
        yield "healed", one, Side("the same before", one.steps)
        yield "healed", one, Side("unpruned", one.steps, "unpruned")
    yield "healed", after["distilled"], after["healed"]


#: Question, and the two sides, by seed.
POOLED = (
    ("sampled", Side("maw", _SAMPLED), Side("unpruned", _SAMPLED, "unpruned")),
    ("draws", Side("maw", _DRAWN), Side("unpruned", _DRAWN, "unpruned")),
    *_healed(""),
    *_healed("instructions_"),
)
#: Steps that are on the page as one of several seeds only.
SEEDED = {step for _, one, _ in POOLED for step in one.steps} - {"reasoning"}


def pooled_rows(
    sweeps: Mapping[str, Sweep], read: DocumentReader, notes: list[str]
) -> list[Row]:
    """Return the comparisons of `POOLED` over the seeds that were measured; `notes` gets the rest."""
    rows: list[Row] = []
    for question, one, other in POOLED:
        rows += _rows(question, one, other, sweeps, read, notes)
    return rows


def _rows(
    question: str,
    one: Side,
    other: Side,
    sweeps: Mapping[str, Sweep],
    read: DocumentReader,
    notes: list[str],
) -> Iterator[Row]:
    steps = [
        (sweeps[here], sweeps[there])
        for here, there in zip(one.steps, other.steps, strict=True)
        if {here, there} <= sweeps.keys()
    ]
    percents = {
        sweep.identity(run)["percent"] for sweep, _ in steps for run in sweep.runs
    }
    for percent in sorted(percents - {None}):
        pairs = [
            (here, run, beside)
            for here, there in steps
            if (run := one.run(here, percent)) is not None
            if (beside := other.run(there, percent)) is not None
        ]
        for task, measure in MEASURES.items():
            key = task, measure.metric
            measured = [
                (read(run, *key), read(beside, *key))
                for _, run, beside in pairs
                if key in run.scores and key in beside.scores
            ]
            documents = [pair for pair in measured if None not in pair]
            if not documents:
                continue
            ones, others = zip(*documents, strict=True)
            try:
                test = over_seeds(ones, others)
            except ValueError as error:
                notes.append(f"{pairs[0][0].model}, {question}, {task}: {error}")
                continue
            here, run, beside = pairs[0]
            yield {
                **here.identity(run),
                "question": question,
                "task": task,
                "seeds": test.seeds,
                "one": one.name,
                "other": other.name,
                "parameters_one": run.pruning.get("parameters_after"),
                "parameters_other": beside.pruning.get("parameters_after"),
                "score_one": test.one,
                "score_other": test.other,
                "difference": test.difference,
                "low": test.low,
                "high": test.high,
                "p": test.p,
            }
