"""The sections of a report that are words and tables."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.answer import WORDS
from lm_eval_pruned.compare.cases import Case
from lm_eval_pruned.compare.comparison_table import (
    DIFFERENCES,
    FLOOR,
    FLOORS,
    TRENDS,
    table_of,
)
from lm_eval_pruned.compare.floors import standings
from lm_eval_pruned.compare.judge import judged
from lm_eval_pruned.report.page import Section, run_label, table_section
from lm_eval_pruned.results.documents import documents_of, scored_on
from lm_eval_pruned.results.files import Score, as_mapping
from lm_eval_pruned.results.groups import (
    FAMILIES,
    family_of,
    is_control,
    model_arguments,
    primary_metrics,
    series_of,
)
from lm_eval_pruned.results.runs import setting_of
from lm_eval_pruned.util.tables import Cell, Column, Table


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lm_eval_pruned.compare.comparison import Comparison
    from lm_eval_pruned.compare.judge import Difference
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.runs import SweepResults

#: Mark of a score that is not shown to be above the floor.
AT_FLOOR = "\u2581"
#: What of a record of pruning is the same where the same places were cut.
_PLACES = ("asked", "allocation", "layers_pruned", "hidden_size")
#: What a row of ``results.csv`` says in addition.
LEFT_OUT = ("relative", "p", "test", "margin", "q margin")


def families_section(runs: Sequence[Run], comparison: Comparison) -> Section | None:
    """How many tasks of each family are better, worse or not shown to differ, by size."""
    sizes = {
        run.name: (series, f"{run.expansion_ratio:.2f}")
        for series, members in series_of(runs).items()
        for run in members
    }
    labels = [family.label for family in FAMILIES]
    #: By family, series and ratio, of the verdicts in both forms.
    counts: dict[tuple[str, str, str], Counter[tuple[str, str]]] = defaultdict(Counter)
    for row in comparison.rows:
        if row.primary and row.run in sizes:
            label = family_of(row.task, runs[0].metadata).label
            series, ratio = sizes[row.run]
            counts[label, series, ratio][row.verdict, row.said] += 1
    ratios = sorted({ratio for *_, ratio in counts}, key=float, reverse=True)
    rows = dict.fromkeys((label, series) for label, series, _ in counts)
    text = (
        "Tasks of each family that are better or worse than the unpruned model at q < "
        f"{comparison.alpha:g}, by expansion ratio. No difference shown does not mean that "
        "there is none: the interval in the table of differences says how large one may be."
    )

    def counted_at(ratio: str) -> Callable[[tuple[str, str]], Cell]:
        return lambda row: _counted(counts.get((*row, ratio), {}))

    columns = [
        Column("family", lambda row: row[0]),
        Column("pruned by", lambda row: row[1]),
        *(Column(ratio, counted_at(ratio), ">") for ratio in ratios),
    ]
    ordered = sorted(rows, key=lambda row: labels.index(row[0]))
    return table_section("Families of tasks by size", [text], columns, ordered)


def _counted(counts: Mapping[tuple[str, str], int]) -> Cell:
    shown = sorted(counts, key=lambda words: [*WORDS].index(words[0]))
    texts = [f"{WORDS[words[0]].mark} {counts[words]} {words[1]}" for words in shown]
    decided = [words for _, words in shown if words in ("better", "worse")]
    return Cell(", ".join(texts) or "-", decided[0] if len(decided) == 1 else "")


def floors_section(comparison: Comparison) -> Section | None:
    """The best score without knowledge on each task, and whether the unpruned model is above it."""
    if not comparison.floors:
        return None
    heading = "Floors: scores without knowledge"
    table = table_of(heading, FLOORS, comparison.floors, comparison.alpha)
    return Section(heading, [FLOOR], table=table)


def scores_section(base: Run, others: Sequence[Run], comparison: Comparison) -> Section:
    """All scores, with marks where the difference to the unpruned model is significant."""
    differences = {(row.run, row.task, row.metric): row for row in comparison.rows}
    primary = {(row.task, row.metric) for row in comparison.rows if row.primary}
    primary |= {*primary_metrics([base])}
    floors = {(row.task, row.metric): row for row in comparison.floors}
    arrows = {True: " \u2191", False: " \u2193", None: " "}

    def metric(key: tuple[str, str]) -> str:
        name = key[1].removesuffix(",none") + arrows[base.scores[key].higher_is_better]
        return name + " \u2020" * (key not in primary)

    def unpruned(key: tuple[str, str]) -> str:
        low = key in floors and floors[key].above_floor is False
        return f"{base.scores[key].value:.4f}{f' {AT_FLOOR}' if low else ''}"

    legend = (
        "\u25b2 better, \u25bc worse and \u25c6 different from the unpruned model, significant at "
        f"{comparison.alpha:g} after a correction over the sizes of each task (Benjamini-Hochberg); "
        "\u25cb no difference shown, which does not mean that there is none; \u00d7 not tested; "
        "\u2020 another metric of the same answers, excluded from the correction. \u2191 higher is "
        "better, \u2193 lower is better."
    )
    if comparison.margin:
        legend += f" = shown to lie within {comparison.margin.text} of the unpruned model's score."
    if floors:
        legend += f" {AT_FLOOR} not shown to be above the floor."

    def column(run: Run) -> Column:
        cell = lambda key: _score_cell(differences.get((run.name, *key)))
        return Column(run_label(run), cell, ">")

    floor = Column(
        "floor", lambda key: floors[key].floor if key in floors else None, ".4f"
    )
    columns = [
        Column("task", lambda key: key[0]),
        Column("metric", metric),
        *([floor] if floors else []),
        Column(run_label(base), unpruned, ">"),
        *map(column, others),
    ]
    tasks = base.tasks(subtasks=False)
    rows = [key for key in base.scores if key[0] in tasks]
    return Section("Scores", [legend], table=Table("Scores", columns, rows))


def _score_cell(row: Difference | None) -> Cell:
    if row is None:
        return Cell("-")
    low = AT_FLOOR if row.at_floor else ""
    text = f"{row.score:.4f} {WORDS[row.verdict].mark}{low}".rstrip()
    return Cell(text, row.verdict)


def levels_section(
    base: Run, others: Sequence[Run], comparison: Comparison
) -> Section | None:
    """What is kept at each level of the tasks that declare levels and an exact floor."""
    rows: list[tuple[str, str, Score, dict[str, str | None]]] = []
    alpha, names = comparison.alpha, {row.run for row in comparison.rows}
    others = [run for run in others if run.name in names]
    for key in primary_metrics([base]):
        by_run = {
            run.name: documents
            for run in (base, *others)
            if (documents := documents_of(run, *key)) and documents.level
        }
        for level in sorted({*by_run[base.name].level}) if base.name in by_run else ():
            one, *pruned = (
                scored_on(run, key, by_run[run.name].at(level))
                for run in (base, *others)
                if run.name in by_run
            )
            levels = standings(one, [], [(run, key, True) for run in pruned], alpha)
            kept = {run: standing.kept_text for (run, *_), standing in levels.items()}
            rows += [(key[0], level, one.scores[key], kept)] if kept else []
    text = (
        "Of each level, the share of what the unpruned model scores above the exact floor, with the "
        f"{1 - alpha:.0%} interval of a single test."
    )

    def kept_by(run: Run) -> Callable[[Any], str | None]:
        return lambda row: row[3].get(run.name)

    columns = [
        Column("task", lambda row: row[0]),
        Column("level", lambda row: row[1]),
        Column("documents", lambda row: row[2].documents, "d"),
        Column(run_label(base), lambda row: row[2].value, ".4f"),
        *(Column(run_label(run), kept_by(run), ">") for run in others),
    ]
    return table_section("Kept by level", [text], columns, rows)


def differences_section(
    others: Sequence[Run], comparison: Comparison
) -> Section | None:
    """Each difference that was tested or could not be, with what else could have been seen."""
    labels = {run.name: run_label(run) for run in others}
    rows = [replace(row, run=labels[row.run]) for row in comparison.rows if row.primary]
    text = (
        "The interval has the level that the correction leaves for its row: it excludes 0 exactly "
        "where a difference is shown."
    )
    heading = "Differences from the unpruned model"
    return compared_section(heading, text, rows, comparison.alpha)


def compared_section(
    heading: str,
    text: str,
    rows: Sequence[Difference],
    alpha: float,
    notes: Sequence[str] = (),
) -> Section | None:
    """Return rows task by task, in the columns that fit on a page; None without rows and notes."""
    if not rows:
        return Section(heading, notes=notes) if notes else None
    tasks = [row.task for row in rows]
    rows = sorted(rows, key=lambda row: tasks.index(row.task))
    columns = [column for column in DIFFERENCES if column.title not in LEFT_OUT]
    tests = f"Tests: {'; '.join(sorted({row.method for row in rows}))}."
    table = table_of(heading, columns, rows, alpha)
    return Section(heading, [text, tests], table=table, notes=notes)


def random_section(others: Sequence[Run], comparison: Comparison) -> Section | None:
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
    named = [model_arguments(run).get("recipe") for run in pruned]
    recipes = [*dict.fromkeys(filter(None, named))]
    criteria = [
        run.pruning["criterion"]
        for run, recipe in zip(pruned, named, strict=True)
        if not recipe
    ]
    words = [*["--recipes"] * bool(recipes), *recipes, "--criteria"]
    words += dict.fromkeys([*criteria, "random"])
    note = (
        f"No random cut has the size of {', '.join(missing)}. To add one, run the sweep "
        f"again with {' '.join(words)} --seeds 0 1 2; finished units are not evaluated again."
    )
    notes = [note] * bool(missing)
    floors = {(row.case.run.name, *row.case.key): row.floor for row in comparison.rows}
    rows = [
        replace(row, floor=floors.get((row.case.run.name, *row.case.key)))
        for row in compared_pairs(pairs, comparison.alpha)
    ]
    heading = "Compared with random pruning"
    return compared_section(heading, text, rows, comparison.alpha, notes)


def compared_pairs(pairs: Sequence[tuple[Run, Run]], alpha: float) -> list[Difference]:
    """Return the tasks of each pair (before, after), with q over the pairs of each task."""
    cases = []
    for before, after in pairs:
        for key in primary_metrics([before, after]):
            family = key[0], is_control(after)
            cases.append(Case(before, after, key, family))
    return [
        replace(row, run=f"{run_label(case.run)} against {case.base.name}")
        for case, row in zip(cases, judged(cases, alpha), strict=True)
    ]


def trends_section(comparison: Comparison) -> Section | None:
    """The slope of each task over the expansion ratios."""
    text = (
        "Slope: change of the score when the expansion ratio rises by 1, positive if the score falls "
        "with pruning. Each document has a slope, and their mean is tested over documents, because "
        "the sizes are not independent draws. A score that rises and then falls can have a slope of 0."
    )
    table = table_of("Trends", TRENDS, comparison.trends, comparison.alpha)
    heading = "Trends over expansion ratios"
    return Section(heading, [text], table=table) if comparison.trends else None


def energy_section(runs: Sequence[Run]) -> Section | None:
    """What the meter logged, by configuration and kind of request."""
    rows, sources = [], set()
    notes: dict[str, None] = {}
    for run in runs:
        for tasks, block in run.energy.items():
            parts = as_mapping(block.get("sources")).items()
            sources |= {f"{part.upper()}: {how['kind']}" for part, how in parts if how}
            notes |= dict.fromkeys(block.get("notes") or ())
            kinds = as_mapping(block.get("request_types")).items()
            rows += [(run_label(run), tasks, kind, record) for kind, record in kinds]
    text = (
        "As metered while the tasks ran, including everything else that the machine did. "
        f"Sources: {'; '.join(sorted(sources)) or 'not known'}. Modelled energy is an estimate, not "
        "a measurement. The time per generated token includes reading the prompts."
    )
    return table_section("Energy and latency", [text], _ENERGY, rows, [*notes])


def _latency(row: tuple[Any, ...]) -> float | None:
    seconds, tokens = row[3].get("seconds"), row[3].get("generated_tokens")
    return 1000 * seconds / tokens if seconds and tokens else None


#: Of a configuration, its tasks, a kind of request, and what the meter logged.
_ENERGY = (
    Column("configuration", lambda row: row[0]),
    Column("tasks", lambda row: row[1]),
    Column("requests", lambda row: row[2]),
    Column("seconds", lambda row: row[3].get("seconds"), ",.1f"),
    Column("joules", lambda row: as_mapping(row[3].get("joules")).get("total"), ",.1f"),
    Column(
        "J / processed token",
        lambda row: row[3].get("joules_per_processed_token"),
        ".4g",
    ),
    Column("ms / generated token", _latency, ".4g"),
)


def repeating_section(sweep: SweepResults, base: Run) -> Section:
    """Versions, settings of the unpruned run, what was pruned, and ``sweep.json``."""
    config = ("model", "model_args", "model_sha", "device", "batch_size", "limit")
    settings = ("lm_eval_version", "transformers_version", "dtype", "chat_template")
    seeds = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed", "num_fewshot")
    facts = {
        "report_version": version("lm-eval-pruned"),
        **{name: base.config.get(name) for name in config},
        **{name: setting_of(base, name) for name in (*settings, *seeds)},
        "task_versions": base.versions,
        "pruning": {run.name: run.pruning for run in sweep.runs},
        **sweep.definition,
    }
    text = lambda value: json.dumps(value, ensure_ascii=False, default=str)
    known = {name: value for name, value in facts.items() if value is not None}
    lines = ",\n".join(f"{text(name)}: {text(value)}" for name, value in known.items())
    code = f"{{\n{lines}\n}}"
    title = "Versions, settings of the unpruned model's run, what was pruned, and sweep.json"
    return Section("To repeat this", code=code, folded=title)


def remarks_section(
    sweep: SweepResults, others: Sequence[Run], comparison: Comparison
) -> Section | None:
    """What failed, and what the reader of the scores has to know."""
    alone = {run.name: run for run in others}.keys() - {r.run for r in comparison.rows}
    notes = [f"{f.task} failed on {f.run}: {f.message}" for f in sweep.failures]
    notes += comparison.notes
    notes += [f"{run} shares no task with the unpruned model." for run in sorted(alone)]
    return Section("Remarks", notes=notes) if notes else None
