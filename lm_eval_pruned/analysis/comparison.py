"""``lm-eval-pruned compare``: runs against a base, task by task."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_eval_pruned.analysis import statistics
from lm_eval_pruned.analysis.results_file import ResultsError, Run
from lm_eval_pruned.analysis.runs import is_sweep, read_run
from lm_eval_pruned.analysis.samples import Documents, read_documents
from lm_eval_pruned.analysis.settings import listed, notes_on, other_settings
from lm_eval_pruned.analysis.sweep_results import read_sweep


if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Difference:
    """One row of the table: one run against the base, on one task and metric.

    Attributes:
        run: Name of the run.
        task: Task or group.
        metric: Metric with filter, such as ``acc,none``.
        base_score: Score of the base.
        score: Score of the run.
        difference: `score` - `base_score`, in the metric's own unit.
        relative: The same as a share of `base_score`, or None.
        low: Lower end of the interval of the difference, or None.
        high: Upper end.
        p: p of the single test, or None where none was possible.
        q: p adjusted over the primary metrics of the table (Benjamini-Hochberg), or None.
        smallest_detectable: See `statistics.PairedTest`, at the level that the
            adjustment leaves; None where there is no q.
        documents: Documents both runs were scored on, or None.
        method: Test that was made, or why none was.
        primary: Whether this is the one metric that stands for its task; the others
            restate the same answers, and stay outside of the adjustment.
        verdict: One of `VERDICTS`.
    """

    run: str
    task: str
    metric: str
    base_score: float
    score: float
    difference: float
    relative: float | None
    low: float | None
    high: float | None
    p: float | None
    q: float | None
    smallest_detectable: float | None
    documents: int | None
    method: str
    primary: bool
    verdict: str


#: What a row says, and what that means.
VERDICTS = {
    "better": "q < alpha",
    "worse": "q < alpha",
    "different": "q < alpha, and the task does not say which way is up",
    "not shown": "q >= alpha, which is not the same as no difference",
    "not tested": "no test was possible; see the method",
    "not comparable": "a score is no finite number",
    "restated": "not the primary metric of its task",
}


@dataclass(frozen=True)
class TaskCorrelation:
    """Two tasks over the configurations of one series.

    Attributes:
        series: Model, criterion and seed that the configurations share.
        tasks: The two tasks, each as (task, metric).
        correlation: See `statistics.Correlation`; perplexities as logarithms. Its p
            take the sizes for independent draws.
        p: p of "at most one of the two has a trend": the larger p of their trends.
        q: `p`, adjusted over all pairs of the series.
    """

    series: str
    tasks: tuple[tuple[str, str], tuple[str, str]]
    correlation: statistics.Correlation
    p: float | None
    q: float | None


@dataclass(frozen=True)
class TaskTrend:
    """One task over the expansion ratios of one series.

    Attributes:
        series: Model, criterion and seed that the configurations share.
        task: The task.
        metric: The metric.
        trend: See `statistics.Trend`.
        q: Its p, adjusted over all tasks of the series.
    """

    series: str
    task: str
    metric: str
    trend: statistics.Trend
    q: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything that `compare` says.

    Attributes:
        base: Name of the base.
        alpha: Level of the tests; intervals have confidence 1 - alpha.
        rows: The table.
        correlations: Pairs of tasks, where there are at least 3 expansion ratios.
        trends: Tasks, where there are at least 3 expansion ratios.
        notes: What the reader has to know, such as tasks that only one run has.
    """

    base: str
    alpha: float
    rows: tuple[Difference, ...]
    correlations: tuple[TaskCorrelation, ...]
    trends: tuple[TaskTrend, ...]
    notes: tuple[str, ...]


def read_comparands(paths: Sequence[str]) -> tuple[Run, list[Run]]:
    """Read what ``compare BASE RUN [RUN...]`` names.

    A sweep folder as BASE stands for its baseline and, where it is the only
    argument, its other configurations are the runs; as RUN it stands for all its
    configurations but the baseline.

    Raises:
        ResultsError: Something cannot be read, or there is nothing to compare.
    """
    runs: list[Run] = []
    base: Run | None = None
    for number, path in enumerate(paths):
        if is_sweep(path):
            baseline, others = split_sweep(list(read_sweep(path).runs), str(path))
            if number == 0:
                base = baseline
            if number > 0 or len(paths) == 1:
                runs += others
        elif number == 0:
            base = read_run(path)
        else:
            runs.append(read_run(path))
    if base is None or not runs:
        raise ResultsError(
            "There is nothing to compare: give a base and at least one other run, or a sweep "
            "folder with several configurations."
        )
    return base, _with_distinct_names(base, runs)


def split_sweep(runs: list[Run], where: str) -> tuple[Run, list[Run]]:
    """Return the baseline of a sweep and its other runs.

    Raises:
        ResultsError: No run of the sweep is unpruned.
    """
    baselines = [run for run in runs if run.is_baseline]
    if not baselines:
        raise ResultsError(
            f"{where} has no finished run of the unpruned model to compare with: add prune_percent "
            "0 to the sweep, or name a base: `compare BASE RUN`."
        )
    return baselines[0], [run for run in runs if run is not baselines[0]]


def compare(
    base: Run, runs: Sequence[Run], *, alpha: float = 0.05, subtasks: bool = False
) -> Comparison:
    """Compare runs with a base.

    Args:
        base: What the others are compared with.
        runs: At least one.
        alpha: Level of the tests, between 0 and 1.
        subtasks: Whether to compare the members of groups that have scores too.

    Raises:
        ResultsError: Samples cannot be read, two runs saw different documents or
            different versions of a task, or have no task in common.
        ValueError: `alpha` is out of range.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} is not between 0 and 1: give 0.05, say.")
    rows: list[Difference] = []
    tests: list[statistics.PairedTest] = []
    notes = notes_on([base, *(run for run in runs if run is not base)])
    read = _DocumentReader()
    for run in runs:
        shared = [task for task in base.tasks(subtasks=subtasks) if task in run.tasks()]
        for one, other in ((base, run), (run, base)):
            missing = [
                task
                for task in one.tasks(subtasks=subtasks)
                if task not in other.tasks()
            ]
            if missing:
                notes.append(
                    f"{other.name} has no results for {', '.join(missing)}, which {one.name} has."
                )
        if not shared:
            raise ResultsError(f"{base.name} and {run.name} have no task in common.")
        notes += _settings_notes(base, run, shared)
        primary = primary_metrics([base, run], subtasks=subtasks)
        for key in base.scores:
            if key[0] in shared and key in run.scores:
                test, documents = _test(base, run, *key, alpha, read)
                tests.append(test)
                rows.append(_row(base, run, key, key in primary, test, documents))
        notes += _prompts_notes(base, run, shared, read)
    family = [row.p if row.primary else None for row in rows]
    adjusted = zip(
        statistics.false_discovery_rate(family),
        statistics.false_discovery_levels(family, alpha),
        strict=True,
    )
    rows = [
        replace(
            row,
            q=q,
            smallest_detectable=None
            if level is None
            else test.smallest_detectable(level),
            verdict=_verdict(row, q, alpha, base),
        )
        for row, test, (q, level) in zip(rows, tests, adjusted, strict=True)
    ]
    weaker = sorted({row.task for row in rows if "weaker" in row.method})
    if weaker:
        notes.append(
            f"Without usable samples, {', '.join(weaker)} had to be tested on the standard errors, "
            "as if the runs had seen different documents; that is weaker than a paired test: "
            "evaluate with --log_samples."
        )
    everything = [base, *(run for run in runs if run is not base)]
    correlations, trends = across_ratios(everything, alpha=alpha, read=read)
    return Comparison(base.name, alpha, tuple(rows), correlations, trends, tuple(notes))


def series_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group the runs of a sweep whose expansion ratio is the only thing that varies.

    Baselines belong to every series of their model.

    Returns:
        Runs by series, in falling expansion ratio; runs without a recorded
        expansion ratio are left out.
    """

    def model(run: Run) -> str:
        pruning = run.pruning
        return f"{pruning.get('hidden_size')}x{pruning.get('layers')}"

    pruned = [run for run in runs if run.expansion_ratio is not None]
    series: dict[tuple[str, str], list[Run]] = {}
    for run in pruned:
        if not run.is_baseline:
            name = str(run.pruning.get("criterion"))
            if "seed" in run.pruning:
                name += f", seed {run.pruning['seed']}"
            series.setdefault((model(run), name), []).append(run)
    grouped = {}
    for (of_model, name), members in series.items():
        baselines = [r for r in pruned if r.is_baseline and model(r) == of_model][:1]
        label = name if len({key[0] for key in series}) == 1 else f"{of_model}, {name}"
        grouped[label] = sorted(
            [*baselines, *members], key=lambda run: -(run.expansion_ratio or 0)
        )
    return grouped


def primary_metrics(
    runs: Sequence[Run], *, subtasks: bool = False
) -> list[tuple[str, str]]:
    """Return one (task, metric) for each task that all runs have.

    The metric is ``acc_norm`` where there is one, as the study reports it, else the
    first that the task lists and that is a finite number in all runs.

    Args:
        runs: At least one.
        subtasks: Whether to include the members of groups that have scores.
    """
    primary = []
    for task in runs[0].tasks(subtasks=subtasks):
        metrics = [
            metric
            for scored, metric in runs[0].scores
            if scored == task
            and all(
                (task, metric) in run.scores
                and math.isfinite(run.scores[task, metric].value)
                for run in runs
            )
        ]
        metrics.sort(key=lambda metric: not metric.startswith("acc_norm,"))
        if metrics:
            primary.append((task, metrics[0]))
    return primary


def across_ratios(
    runs: Sequence[Run], *, alpha: float = 0.05, read: _DocumentReader | None = None
) -> tuple[tuple[TaskCorrelation, ...], tuple[TaskTrend, ...]]:
    """Correlate any two tasks, and test each for a trend, over expansion ratios.

    Args:
        runs: Runs of one or several series.
        alpha: 1 - confidence of the intervals, and level of the tests.
        read: Reader whose documents are used again.

    Returns:
        Correlations and trends; empty for series with fewer than 3 ratios.
    """
    correlations: list[TaskCorrelation] = []
    trends: list[TaskTrend] = []
    read = read or _DocumentReader()
    for name, members in series_of(runs).items():
        ratios = [run.expansion_ratio or 0.0 for run in members]
        if len(set(ratios)) < 3:
            continue
        scores = {
            key: [_linear(run, *key) for run in members]
            for key in primary_metrics(members)
        }
        tested = {key: _trend(members, *key, alpha, read) for key in scores}
        pairs = [
            TaskCorrelation(
                name,
                (one, other),
                statistics.correlate(scores[one], scores[other], alpha=alpha),
                _larger(tested[one].p, tested[other].p),
                None,
            )
            for one, other in itertools.combinations(scores, 2)
        ]
        adjusted = statistics.false_discovery_rate([pair.p for pair in pairs])
        correlations += [
            replace(pair, q=q) for pair, q in zip(pairs, adjusted, strict=True)
        ]
        adjusted = statistics.false_discovery_rate([each.p for each in tested.values()])
        trends += [
            TaskTrend(name, *key, each, q)
            for (key, each), q in zip(tested.items(), adjusted, strict=True)
        ]
    return tuple(correlations), tuple(trends)


def _trend(
    members: Sequence[Run], task: str, metric: str, alpha: float, read: _DocumentReader
) -> statistics.Trend:
    """Test a score for a trend over the documents that all members were scored on."""
    ratios = [run.expansion_ratio or 0.0 for run in members]
    pairs: list[tuple[Documents, Documents] | None]
    try:
        pairs = [
            paired_documents(members[0], run, task, metric, read) for run in members
        ]
    except ResultsError:
        pairs = [None]
    first = pairs[0]
    if first is None or None in pairs:
        scores = [_linear(run, task, metric) for run in members]
        slope = float(np.polyfit(ratios, scores, 1)[0])
        why = "none: needs logged samples of the same documents in all configurations"
        return statistics.Trend(len(members), slope, None, None, None, why, 0)
    return statistics.trend(
        ratios,
        [pair[1].values for pair in pairs if pair],
        weights=first[0].weights,
        clusters=first[0].clusters,
        strata=first[0].strata,
        transform=first[0].transform,
        alpha=alpha,
    )


def _larger(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)


def _linear(run: Run, task: str, metric: str) -> float:
    """Return a score on the scale that is a mean over documents: log perplexity."""
    value = run.scores[task, metric].value
    return math.log(value) if is_perplexity(metric) and value > 0 else value


def is_perplexity(metric: str) -> bool:
    """Whether a metric is a perplexity, whose logarithm is the mean over documents."""
    return "perplexity" in metric


class _DocumentReader:
    """Reads the documents of a (run, task, metric) once: the base meets every run."""

    def __init__(self) -> None:
        self._read: dict[tuple[int, str, str], Documents | None] = {}

    def __call__(self, run: Run, task: str, metric: str) -> Documents | None:
        key = id(run), task, metric
        if key not in self._read:
            self._read[key] = read_documents(run, task, metric)
        return self._read[key]


def paired_documents(
    base: Run,
    run: Run,
    task: str,
    metric: str,
    read: _DocumentReader | None = None,
) -> tuple[Documents, Documents] | None:
    """Return the documents of two runs in the same order, or None without samples.

    Raises:
        ResultsError: The runs saw different documents or task versions.
    """
    read = read or _DocumentReader()
    for name in base.leaves(task):
        versions = base.versions.get(name), run.versions.get(name)
        if None not in versions and versions[0] != versions[1]:
            raise ResultsError(
                f"{name} has version {versions[0]} in {base.name} and {versions[1]} in {run.name}: "
                "scores of different versions of a task cannot be compared."
            )
    one, other = read(base, task, metric), read(run, task, metric)
    if one is None or other is None:
        return None
    position = {key: index for index, key in enumerate(other.keys)}
    only_base = sum(key not in position for key in one.keys)
    only_run = len(other.keys) - (len(one.keys) - only_base)
    if only_base or only_run:
        raise ResultsError(
            f"{task} was evaluated on different documents: {only_base} of {len(one.keys)} only in "
            f"{base.name}, {only_run} of {len(other.keys)} only in {run.name} (matched by "
            "doc_hash); evaluate both with the same --limit and data."
        )
    order = [position[key] for key in one.keys]
    reordered = replace(
        other,
        keys=one.keys,
        values=other.values[order],
        weights=other.weights[order],
        clusters=None
        if other.clusters is None
        else tuple(other.clusters[index] for index in order),
    )
    same_kind = one.transform == other.transform and np.allclose(
        one.weights, reordered.weights
    )
    return (one, reordered) if same_kind else None


def _test(
    base: Run,
    run: Run,
    task: str,
    metric: str,
    alpha: float,
    read: _DocumentReader,
) -> tuple[statistics.PairedTest, int | None]:
    """Return the test of one row, and how many documents it is of."""
    before, after = base.scores[task, metric], run.scores[task, metric]
    pair = paired_documents(base, run, task, metric, read)
    documents = len(pair[0].keys) if pair else None
    nothing = _not_finite(base, run, task, metric)
    if nothing or (not pair and None in (before.stderr, after.stderr)):
        why = (
            f"the score of {' and '.join(nothing)} is no finite number"
            if nothing
            else "neither samples nor standard errors"
        )
        change = after.value - before.value
        none = statistics.PairedTest(change, None, None, None, f"none: {why}", 0, alpha)
        return none, documents
    if pair:
        test = statistics.paired_difference(
            pair[0].values,
            pair[1].values,
            weights=pair[0].weights,
            clusters=pair[0].clusters,
            strata=pair[0].strata,
            transform=pair[0].transform,
            alpha=alpha,
        )
    else:
        assert before.stderr is not None
        assert after.stderr is not None
        test = statistics.unpaired_difference(
            before.value, before.stderr, after.value, after.stderr, alpha=alpha
        )
    return test, documents


def _not_finite(base: Run, run: Run, task: str, metric: str) -> list[str]:
    return [
        each.name
        for each in (base, run)
        if not math.isfinite(each.scores[task, metric].value)
    ]


def _row(
    base: Run,
    run: Run,
    key: tuple[str, str],
    primary: bool,
    test: statistics.PairedTest,
    documents: int | None,
) -> Difference:
    """Return a row that has no q and no verdict on it yet."""
    before, after = base.scores[key].value, run.scores[key].value
    return Difference(
        run=run.name,
        task=key[0],
        metric=key[1],
        base_score=before,
        score=after,
        difference=after - before,
        relative=statistics.relative_change(before, after),
        low=test.low,
        high=test.high,
        p=test.p,
        q=None,
        smallest_detectable=None,
        documents=documents,
        method=test.method,
        primary=primary,
        verdict="not comparable" if _not_finite(base, run, *key) else "not tested",
    )


def _verdict(row: Difference, q: float | None, alpha: float, base: Run) -> str:
    if row.verdict == "not comparable":
        return row.verdict
    if not row.primary:
        return "restated"
    if q is None:
        return row.verdict
    if q >= alpha:
        return "not shown"
    higher_is_better = base.scores[row.task, row.metric].higher_is_better
    if higher_is_better is None:
        return "different"
    return "better" if (row.difference > 0) == higher_is_better else "worse"


def _settings_notes(base: Run, run: Run, tasks: Sequence[str]) -> list[str]:
    """Return what two runs did not have in common beside the model."""
    return [
        f"{run.name} was evaluated with other settings than {base.name} "
        f"({', '.join(labels)}){'' if len(on) == len(tasks) else f' on {listed(on)}'}, so a "
        "difference need not come from the model."
        for labels, on in other_settings(base.settings, run.settings, tasks).items()
    ]


def _prompts_notes(
    base: Run, run: Run, tasks: Sequence[str], read: _DocumentReader
) -> list[str]:
    notes = {}
    for task, metric in base.scores:
        if task not in tasks or task in notes or (task, metric) not in run.scores:
            continue
        before, after = (read(each, task, metric) for each in (base, run))
        others = before.other_prompts(after) if before and after else 0
        if before and others:
            notes[task] = (
                f"{others} of {len(before.keys)} documents of {task} had another prompt "
                f"(prompt_hash) in {run.name} than in {base.name}."
            )
    return list(notes.values())


def _with_distinct_names(base: Run, runs: list[Run]) -> list[Run]:
    """Call runs that would share a name by their paths."""
    names = [base.name, *(run.name for run in runs)]
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(run.path))
        for run in runs
    ]


#: What the tables of trends and correlations show.
TREND = (
    "Trend over expansion ratios (change of the score per 1 of ratio, positive where it falls "
    "with pruning; slopes of single documents)"
)
CORRELATION = (
    "Correlation of two tasks over expansion ratios (p of r and of rho take the sizes for "
    "independent draws, which steps of pruning are not; p both: both tasks have a trend)"
)


def scale_name(metric: str) -> str:
    """Return the name of a metric on the scale of trends and correlations."""
    return f"log {metric}" if is_perplexity(metric) else metric


def as_table(comparison: Comparison) -> str:
    """Return the comparison as Markdown tables for people."""
    confidence = f"{1 - comparison.alpha:.0%}"
    primary = sum(row.primary for row in comparison.rows)
    header = (
        f"Compared with {comparison.base}; difference = run - base; q: p after "
        f"Benjamini-Hochberg over {primary} row{'s' * (primary != 1)}, one metric for each task; "
        "smallest detectable: "
        "with a chance of 80 % at the level that this leaves."
    )
    if primary < len(comparison.rows):
        header += " Rows that are `restated` are other metrics of the same answers."
    columns = (
        f"|run|task|metric|base|score|difference|{confidence} interval|relative|p|q"
        "|smallest detectable|documents|test|verdict|"
    )
    alignment = (
        "|---|----|------|---:|----:|---------:|---:|---:|---:|---:|---:|---:|---|---|"
    )
    lines = [header, "", columns, alignment]
    for row in comparison.rows:
        interval = "-" if row.low is None else f"[{row.low:+.4f}, {_signed(row.high)}]"
        lines.append(
            f"|{row.run}|{row.task}|{row.metric}|{row.base_score:.4f}|{row.score:.4f}"
            f"|{row.difference:+.4f}|{interval}|{_percent(row.relative)}|{p_text(row.p)}|{p_text(row.q)}"
            f"|{_plain(row.smallest_detectable)}|{row.documents or '-'}|{row.method}|{row.verdict}|"
        )
    if comparison.trends:
        lines += ["", f"{TREND}:", ""]
        columns = (
            f"|series|task|metric|n|slope|{confidence} interval|p|q|documents|test|"
        )
        lines += [columns, "|---|---|---|---:|---:|---:|---:|---:|---:|---|"]
        for each in comparison.trends:
            t = each.trend
            interval = "-" if t.low is None else f"[{t.low:+.4f}, {_signed(t.high)}]"
            lines.append(
                f"|{each.series}|{each.task}|{scale_name(each.metric)}|{t.n}|{_signed(t.slope)}"
                f"|{interval}|{p_text(t.p)}|{p_text(each.q)}|{t.units or '-'}|{t.method}|"
            )
    if comparison.correlations:
        lines += ["", f"{CORRELATION}:", ""]
        columns = (
            f"|series|task|task|n|Pearson r|{confidence} interval|p of r|Spearman rho|p of rho"
            "|p both|q|"
        )
        lines += [columns, "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
        for pair in comparison.correlations:
            c = pair.correlation
            one, other = (f"{task} {scale_name(metric)}" for task, metric in pair.tasks)
            lines.append(
                f"|{pair.series}|{one}|{other}|{c.n}|{_signed(c.pearson, 3)}"
                f"|{_interval(c.pearson_low, c.pearson_high)}|{p_text(c.pearson_p)}"
                f"|{_signed(c.spearman, 3)}|{p_text(c.spearman_p)}|{p_text(pair.p)}|{p_text(pair.q)}|"
            )
    if comparison.notes:
        lines += ["", *(f"Note: {note}" for note in comparison.notes)]
    return "\n".join(lines) + "\n"


def as_csv(comparison: Comparison) -> str:
    """Return the table of differences as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(Difference.__dataclass_fields__), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(asdict(row) for row in comparison.rows)
    return text.getvalue()


def as_json(comparison: Comparison) -> str:
    """Return the whole comparison as JSON; numbers that are not finite become null."""
    return json.dumps(_finite(asdict(comparison)), indent=2, allow_nan=False) + "\n"


FORMATS = {"table": as_table, "csv": as_csv, "json": as_json}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def p_text(p: float | None) -> str:
    """Return a p value as tables show it."""
    if p is None:
        return "-"
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"[{low:+.2f}, {high:+.2f}]"
