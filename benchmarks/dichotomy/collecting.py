"""From the sweeps of the steps to tables without any benchmark text.

Every table is a list of rows by column; `TABLES` has the columns. What is in them, the page
says: it is rendered from the tables alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scipy import stats

from dichotomy.contrasts import contrast_rows
from dichotomy.crossed import over_seeds
from dichotomy.latency import latency_rows
from dichotomy.measured import SAID, Sweep, sweeps_of
from dichotomy.mechanisms import drifts_of, split_of
from dichotomy.seeds import pooled_rows
from dichotomy.steps import MODELS, place_of
from dichotomy.tables import (
    MEASURES,
    TABLES,
    Row,
    adjust,
    plainly,
    tested,
    written,
)
from lm_eval_pruned.compare.pairing import (
    DocumentReader,
    paired_documents,
    paired_test,
)
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.util.tables import csv_table


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from dichotomy.words import Tables
    from lm_eval_pruned.results.files import Run


@dataclass
class Collection:
    """The tables, and what was left out of them."""

    tables: dict[str, list[Row]] = field(
        default_factory=lambda: {name: [] for name in TABLES}
    )
    notes: list[str] = field(default_factory=list)

    def keep(self, earlier: Tables) -> None:
        """Keep the rows of earlier tables that belong to what the folder does not hold.

        A step that it holds, or a question that it answers for a task, replaces the earlier
        one whole.

        Args:
            earlier: Tables that were written before, by name.
        """
        for name, rows in earlier.items():
            found = self.tables[name]
            held = {_measured_together(name, row) for row in found}
            kept = [
                dict(row) for row in rows if _measured_together(name, row) not in held
            ]
            for each in sorted({_measured_together(name, row) for row in kept}):
                self.notes.append(f"{name}.csv: {' '.join(each)} stays as it was.")
            found[:] = sorted([*kept, *found], key=place_of)
        # A family may have rows of both.
        adjust(self.tables)

    def files(self) -> dict[str, str]:
        """Return the CSV files by name; numbers have six significant digits."""
        return {
            f"{name}.csv": csv_table(
                columns,
                [
                    {
                        column: written(row[column])
                        for column in columns
                        if column in row
                    }
                    for row in self.tables[name]
                ],
            )
            for name, columns in TABLES.items()
        }


def _measured_together(table: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    columns = TABLES[table]
    names = [name for name in ("model", "step", "question") if name in columns]
    # Steps of other tasks answer the same question.
    names += ["task"] if "question" in names else []
    return tuple(str(row[name]) for name in names)


def collect(folder: Path, only: Sequence[str] | None = None) -> Collection:
    """Read everything that the steps have measured so far.

    Args:
        folder: Work folder, with sweeps under ``MODEL/STEP``.
        only: Steps whose rows are wanted; others are read to compare with. Default: all.

    Raises:
        ResultsError: A folder cannot be read, or none holds a finished unit.
    """
    found = Collection()
    for model in MODELS:
        sweeps = {
            each.step: each for each in sweeps_of(folder / model, model, found.notes)
        }
        for sweep in sweeps.values():
            read = DocumentReader()
            found.tables["settings"] += [
                {
                    "model": model,
                    "step": sweep.step,
                    "setting": name,
                    "value": plainly(sweep.settings[name]),
                }
                for name in SAID
                if sweep.settings.get(name) is not None
            ]
            found.tables["scores"] += _scores(sweep, read)
            found.tables["chance"] += _against_chance(sweep, read, found.notes)
            for run in sweep.runs:
                found.tables["mc2"] += _mc2(sweep, run)
                found.tables["ifeval"] += _ifeval(sweep, run)
        read = DocumentReader()
        found.tables["contrasts"] += contrast_rows(sweeps, read, found.notes)
        found.tables["contrasts"] += pooled_rows(sweeps, read, found.notes)
        found.tables["latency"] += latency_rows(folder / model / "latency", model)
    if only is not None:
        for name, rows in found.tables.items():
            found.tables[name] = [row for row in rows if row.get("step", name) in only]
    if not any(found.tables.values()):
        raise ResultsError(
            f"{folder} holds nothing that the steps have measured: run a step, or name the folder "
            "that was their --output."
        )
    adjust(found.tables)
    return found


def _scores(sweep: Sweep, read: DocumentReader) -> list[Row]:
    rows = []
    for run in (sweep.base, *sweep.runs):
        pruning = run.pruning
        for task, measure in MEASURES.items():
            key = task, measure.metric
            if key not in run.scores:
                continue
            score = run.scores[key]
            documents = read(run, *key)
            levels = documents.levels if documents else None
            row = {
                **sweep.identity(run),
                "width": pruning.get("intermediate_size_after"),
                "ratio": run.expansion_ratio,
                "layers": pruning.get("layers"),
                "task": task,
                "metric": measure.metric,
                "n": len(documents.keys) if documents else score.documents,
                "score": score.value,
                "stderr": score.stderr,
                "chance": levels.chance if levels else None,
                "majority": levels.majority if levels else None,
            }
            if (
                perplexity := run.scores.get((task, "word_perplexity,none"))
            ) is not None:
                row["word_perplexity"] = perplexity.value
            level = max(filter(None, (row["chance"], row["majority"])), default=None)
            if level is not None and score.stderr:
                above = (score.value - level) / score.stderr
                row["p_levels"] = float(stats.norm.sf(above))
            if run is not sweep.base and key in sweep.base.scores:
                pair = paired_documents(sweep.base, run, *key, read)
                row |= tested(paired_test(pair) if pair else None, measure.margin)
            rows.append(row)
    return rows


def _against_chance(sweep: Sweep, read: DocumentReader, notes: list[str]) -> list[Row]:
    rows = []
    for run in sweep.runs:
        me = sweep.identity(run)
        if me["criterion"] in (None, "random"):
            continue
        same = {name: me[name] for name in ("percent", "healed")}
        controls = sweep.select(criterion="random", **same)
        for task, measure in MEASURES.items():
            key = task, measure.metric
            documents = read(run, *key) if key in run.scores else None
            drawn = [read(each, *key) for each in controls if key in each.scores]
            of_controls = [each for each in drawn if each is not None]
            if documents is None or not of_controls:
                continue
            try:
                test = over_seeds([documents], of_controls)
            except ValueError as error:
                notes.append(f"{sweep.model}/{sweep.step}, {run.name}, {task}: {error}")
                continue
            rows.append(
                {
                    **me,
                    "task": task,
                    "score": run.scores[key].value,
                    "random": test.other,
                    "seeds": test.seeds,
                    "difference": test.difference,
                    "low": test.low,
                    "high": test.high,
                    "p": test.p,
                }
            )
    return rows


def _mc2(sweep: Sweep, run: Run) -> list[Row]:
    return [
        {
            **sweep.identity(run),
            "toward": name,
            "n": test.questions,
            "level": test.level,
            "base": test.base,
            "score": test.run,
            "distance_base": test.distance_base,
            "distance": test.distance_run,
            "closer": test.shrinks.difference,
            "closer_low": test.shrinks.low,
            "closer_high": test.shrinks.high,
            "closer_p": test.shrinks.p,
            "moved": test.moved,
            "explained": test.explained,
            "rest": test.rest,
            "rest_low": test.rest_low,
            "rest_high": test.rest_high,
            "rest_p": test.rest_p,
        }
        for name, test in drifts_of(sweep.base, run).items()
    ]


def _ifeval(sweep: Sweep, run: Run) -> list[Row]:
    rows = []
    for part, split in split_of(sweep.base, run).items():
        row = {
            **sweep.identity(run),
            "part": part,
            "instructions": split.instructions,
            "prompts": split.prompts,
            "words_base": split.words_base,
            "words": split.words_run,
            "base": split.base,
            "cut": split.cut,
            "score": split.run,
        }
        for name, test in (
            ("total", split.total),
            ("length", split.by_length),
            ("rest", split.rest),
        ):
            for each in ("difference", "low", "high", "p"):
                row[f"{name}_{each}"] = getattr(test, each)
        rows.append(row)
    return rows
