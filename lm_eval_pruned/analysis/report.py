"""``lm-eval-pruned report``: a sweep as Markdown, CSV, one HTML page and plots.

A report is a list of sections with text, a table, plots and notes; Markdown and HTML
are two ways to write the same list.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.analysis.comparison import compare, split_sweep
from lm_eval_pruned.analysis.comparison_rows import Comparison, Difference
from lm_eval_pruned.analysis.comparison_table import p_text
from lm_eval_pruned.analysis.series import (
    is_perplexity,
    primary_metrics,
    scale_name,
    series_of,
)
from lm_eval_pruned.analysis.sweep_results import SweepResults, read_sweep
from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.analysis.plots import Plot
    from lm_eval_pruned.analysis.results_file import Run

#: Tasks that stand for knowledge and for truthfulness, the study's own first.
KNOWLEDGE = ("mmlu", "gsm8k", "arc_challenge", "boolq", "lambada_openai", "wikitext")
TRUTHFULNESS = ("truthfulqa_mc2", "truthfulqa_mc1", "pruned_demo_truthfulness")

_COLUMNS = (
    "run",
    "expansion_ratio",
    "intermediate_size",
    "parameters",
    "criterion",
    "seed",
    "task",
    "metric",
    "higher_is_better",
    "score",
    "stderr",
    "documents",
    "base",
    "difference",
    "relative",
    "low",
    "high",
    "p",
    "q",
    "smallest_detectable",
    "method",
    "primary",
    "verdict",
)


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its text, ``better`` or ``worse``, and a remark."""

    text: str
    mark: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first `text` columns hold words and are aligned left."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text: int = 1


@dataclass(frozen=True)
class Section:
    """One section; any of its parts may be missing."""

    heading: str
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    plots: Sequence[Plot] = ()
    code: str = ""
    notes: Sequence[str] = field(default_factory=tuple)


def write_report(
    folder: str | Path, output_path: str | Path | None = None, *, alpha: float = 0.05
) -> list[Path]:
    """Write ``report.md``, ``results.csv``, ``report.html`` and ``plots/``.

    Args:
        folder: Sweep folder.
        output_path: Where; default: ``report`` in the sweep folder.
        alpha: Level of the tests.

    Returns:
        The files, the page first.

    Raises:
        ResultsError: The folder holds no sweep that can be read, or no baseline.
        ValueError: matplotlib is not installed, or `alpha` is out of range.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(
            "The plots of a report need matplotlib: `pip install 'lm-eval-pruned[report]'`."
        )
    sweep = read_sweep(folder)
    base, others = split_sweep(list(sweep.runs), str(folder))
    target = Path(output_path) if output_path else sweep.path / "report"
    comparable = [run for run in others if set(run.tasks()) & set(base.tasks())]
    comparison = compare(base, comparable, alpha=alpha)
    title = f"Width pruning of {_model_name(base)}"
    subtitle = (
        f"{len(sweep.runs)} configurations, {len(base.tasks(subtasks=False))} tasks, compared with "
        f"the unpruned model ({base.name})"
    )
    sections = make_sections(sweep, base, others, comparison)
    plots = [plot for section in sections for plot in section.plots]
    files: dict[Path, str | bytes] = {
        target / "report.html": as_html(title, subtitle, sections),
        target / "report.md": as_markdown(title, subtitle, sections),
        target / "results.csv": as_csv(base, others, comparison),
    }
    for plot in plots:
        files[target / "plots" / f"{plot.name}.svg"] = plot.svg
        files[target / "plots" / f"{plot.name}.png"] = plot.png
    for file, content in files.items():
        write_atomically(file, content)
    return list(files)


def make_sections(
    sweep: SweepResults, base: Run, others: Sequence[Run], comparison: Comparison
) -> list[Section]:
    """Return what a report says, in order; sections with nothing to say are left out."""
    runs = [base, *others]
    sections = [
        _scores(base, others, comparison),
        _capabilities(base, runs, comparison),
        _knowledge_and_truthfulness(runs, comparison),
        _trends(comparison),
        _energy(runs),
        _configurations(runs),
        _repeating(sweep, base),
        _remarks(sweep, runs, comparison),
    ]
    return [section for section in sections if section is not None]


def _scores(base: Run, others: Sequence[Run], comparison: Comparison) -> Section:
    found = {(row.run, row.task, row.metric): row for row in comparison.rows}
    runs = sorted(others, key=lambda run: (_series(run), -(run.expansion_ratio or 0)))
    rows = []
    shown = base.tasks(subtasks=False)
    primary = primary_metrics([base]) + [
        (row.task, row.metric) for row in comparison.rows if row.primary
    ]
    for task, metric in base.scores:
        if task not in shown:
            continue
        score = base.scores[task, metric]
        arrow = _arrow(score.higher_is_better)
        dagger = "" if (task, metric) in primary else " \u2020"
        cells = [Cell(task), Cell(f"{metric.removesuffix(',none')} {arrow}{dagger}")]
        cells.append(Cell(_score(score.value)))
        cells += [_score_cell(found.get((run.name, task, metric))) for run in runs]
        rows.append(cells)
    columns = ["task", "metric", _column(base)] + [_column(run) for run in runs]
    tests = sorted({row.method for row in comparison.rows})
    tested = sum(row.q is not None for row in comparison.rows)
    legend = (
        "\u2191 higher is better, \u2193 lower is better. \u25b2 better and \u25bc worse than the unpruned model, "
        f"\u25c6 different, significant at {comparison.alpha:g} after Benjamini-Hochberg over {tested} "
        "comparisons, one metric for each task; \u00d7 not tested; no mark: no difference was shown, "
        "which is not the same as none. \u2020 restates the same answers in another metric: outside of "
        "the correction, without marks. Differences with intervals, p, q and the smallest "
        "detectable difference are in results.csv."
    )
    return Section(
        "Scores",
        [
            legend,
            f"Tests: {'; '.join(tests)}.",
        ],
        Table("Scores", columns, rows, text=2),
    )


def _capabilities(
    base: Run, runs: Sequence[Run], comparison: Comparison
) -> Section | None:
    from lm_eval_pruned.analysis.plots import Line, is_drawable, lines_plot

    found = {(row.run, row.task, row.metric): row for row in comparison.rows}
    plots, notes = [], []
    for series, members in series_of(runs).items():
        lines = []
        for task, metric in primary_metrics([base]):
            points = []
            baseline = base.scores[task, metric]
            falls = baseline.higher_is_better is False
            for run in members:
                score = run.scores.get((task, metric))
                row = found.get((run.name, task, metric))
                if score is None:
                    continue
                share = _share(baseline.value, score.value, falls)
                if share is not None and is_drawable(share):
                    points.append((run.expansion_ratio, 100 * share, _significant(row)))
            label = f"{task} ({metric.split(',')[0]}{', inverted' if falls else ''})"
            if len(points) > 1:
                lines.append(Line(label, *zip(*points, strict=True)))
            elif not baseline.value:
                notes.append(
                    f"{task} is not drawn: the unpruned model scores 0, which no other score is a "
                    "share of."
                )
        if lines:
            plots.append(
                lines_plot(
                    f"capabilities-{_slug(series)}",
                    f"Capabilities relative to the unpruned model ({series})",
                    "Each score as a share of the unpruned model's, against the expansion ratio. "
                    "Above 100 % is better; scores where less is better, such as perplexity, are "
                    "inverted (unpruned / pruned). Filled points differ significantly, open ones were "
                    "tested and do not, crosses were not tested, as the unpruned model itself.",
                    lines,
                    "score relative to unpruned (%)",
                    reference=100,
                    marks=f"significant (q < {comparison.alpha:g})",
                )
            )
    if not plots:
        return None
    return Section(
        "What pruning changes", plots=plots, notes=list(dict.fromkeys(notes))
    )


def _knowledge_and_truthfulness(
    runs: Sequence[Run], comparison: Comparison
) -> Section | None:
    from lm_eval_pruned.analysis.plots import scatter_plot

    plots = []
    for series, members in series_of(runs).items():
        metrics = dict(primary_metrics(members))
        knowledge = next((task for task in KNOWLEDGE if task in metrics), None)
        truth = next((task for task in TRUTHFULNESS if task in metrics), None)
        if knowledge is None or truth is None or len(members) < 2:
            continue
        pair = {(knowledge, metrics[knowledge]), (truth, metrics[truth])}
        found = next(
            (
                each
                for each in comparison.correlations
                if each.series == series and set(each.tasks) == pair
            ),
            None,
        )
        correlation = found and found.correlation
        if not found or not correlation or correlation.pearson is None:
            caption = f"too few different points for a correlation (n = {len(members)})"
        else:
            both = "not tested" if found.p is None else f"p = {found.p:.3g}"
            logs = any(is_perplexity(metric) for _, metric in pair)
            caption = (
                f"Pearson r{' of log perplexity' if logs else ''} = {correlation.pearson:.3f}, {1 - comparison.alpha:.0%} interval "
                f"[{correlation.pearson_low:.2f}, {correlation.pearson_high:.2f}] if sizes were "
                f"independent draws, n = {correlation.n}\n"
                f"Spearman rho = {correlation.spearman:.3f}; both have a trend over documents: {both}"
            )
        plots.append(
            scatter_plot(
                f"knowledge-truthfulness-{_slug(series)}",
                f"{truth} against {knowledge} ({series})",
                "One point per configuration, labelled with its expansion ratio, joined in the "
                f"order of pruning. {caption}.".replace("\n", "; "),
                [
                    (
                        run.scores[knowledge, metrics[knowledge]].value,
                        run.scores[truth, metrics[truth]].value,
                        f"{run.expansion_ratio:.2f}",
                    )
                    for run in members
                ],
                _axis(knowledge, metrics[knowledge]),
                _axis(truth, metrics[truth]),
                caption,
            )
        )
    if not plots:
        return None
    return Section("Knowledge against truthfulness", plots=plots)


def _trends(comparison: Comparison) -> Section | None:
    if not comparison.trends:
        return None
    rows = [
        [
            Cell(each.series),
            Cell(each.task),
            Cell(scale_name(each.metric)),
            Cell(str(each.trend.n)),
            Cell(_number(each.trend.slope, "+.4f"), note=each.trend.method),
            Cell(
                "-"
                if each.trend.low is None or each.trend.high is None
                else f"[{each.trend.low:+.4f}, {each.trend.high:+.4f}]"
            ),
            Cell(p_text(each.trend.p)),
            Cell("not tested" if each.q is None else p_text(each.q)),
        ]
        for each in comparison.trends
    ]
    explanation = (
        "Slope: change of the score per 1 of expansion ratio, positive where the score falls with "
        "pruning. Each document has a slope over the ratios, and their mean is tested over "
        "documents, because the sizes are cut from each other and so no independent draws. A "
        "score that first rises and then falls can have a slope of 0."
    )
    return Section(
        "Trends over expansion ratios",
        [explanation],
        Table(
            "Trends",
            ["series", "task", "metric", "n", "slope"]
            + [f"{1 - comparison.alpha:.0%} interval", "p", "q"],
            rows,
            text=3,
        ),
    )


def _energy(runs: Sequence[Run]) -> Section | None:
    from lm_eval_pruned.analysis.plots import Line, is_drawable, lines_plot

    rows: list[list[Cell]] = []
    kinds: set[str] = set()
    notes: dict[str, None] = {}
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for run in runs:
        for tasks, block in run.energy.items():
            sources = _mapping(block.get("sources"))
            kinds |= {
                f"{part.upper()}: {_mapping(source).get('kind')}"
                for part, source in sources.items()
            }
            for note in block.get("notes") or ():
                notes[str(note)] = None
            for kind, record in _mapping(block.get("request_types")).items():
                record = _mapping(record)
                seconds = _float(record.get("seconds"))
                joules = _float(_mapping(record.get("joules")).get("total"))
                generated = _float(record.get("generated_tokens"))
                per_token = _float(record.get("joules_per_processed_token"))
                latency = 1000 * seconds / generated if seconds and generated else None
                rows.append(
                    [
                        Cell(_column(run)),
                        Cell(tasks),
                        Cell(kind),
                        Cell(_number(seconds, ",.1f")),
                        Cell(_number(joules, ",.1f")),
                        Cell(_number(per_token, ".4g")),
                        Cell(_number(latency, ".4g")),
                    ]
                )
                for what, value in (("energy", per_token), ("latency", latency)):
                    if is_drawable(value) and run.expansion_ratio is not None:
                        curves.setdefault((what, f"{tasks}, {kind}"), []).append(
                            (run.expansion_ratio, value or 0.0)
                        )
    if not rows:
        return None
    plots = []
    for what, title, unit in (
        ("energy", "Energy per token", "energy per processed token (J)"),
        ("latency", "Latency per token", "wall time per generated token (ms)"),
    ):
        lines = [
            Line(name, *zip(*sorted(points), strict=True))
            for (kind, name), points in curves.items()
            if kind == what and len(points) > 1
        ]
        if lines:
            plots.append(
                lines_plot(
                    what,
                    title,
                    f"{title} against the expansion ratio, as logged while the tasks ran.",
                    lines,
                    unit,
                )
            )
    return Section(
        "Energy and latency",
        [
            "As the meter logged them while the tasks ran, with all that the machine did beside. "
            + (
                f"Sources: {'; '.join(sorted(kinds))}. "
                if kinds
                else "The sources are not known. "
            )
            + "Modelled energy is an estimate, not a measurement. The time per generated token "
            "includes reading the prompts."
        ],
        Table(
            "Energy and latency",
            ["configuration", "tasks", "requests", "seconds", "joules"]
            + ["J / processed token", "ms / generated token"],
            rows,
            text=3,
        ),
        plots,
        notes=list(notes),
    )


def _configurations(runs: Sequence[Run]) -> Section:
    rows = []
    for run in runs:
        pruning = run.pruning
        before, after = (
            _float(pruning.get(f"parameters_{when}")) for when in ("before", "after")
        )
        asked = _mapping(pruning.get("asked"))
        rows.append(
            [
                Cell(run.name),
                Cell(
                    ", ".join(f"{key}={value}" for key, value in asked.items()) or "-"
                ),
                Cell(_series(run) if not run.is_baseline else "-"),
                Cell(_number(_float(pruning.get("intermediate_size_after")), ",.0f")),
                Cell(_number(run.expansion_ratio, ".4f")),
                Cell(_number(after, ",.0f")),
                Cell("-" if not before or not after else f"{1 - after / before:.1%}"),
                Cell(str(pruning.get("kept_digest") or "-")[:12]),
            ]
        )
    return Section(
        "Configurations",
        table=Table(
            "Configurations",
            ["configuration", "asked", "criterion", "intermediate size"]
            + ["expansion ratio", "parameters", "removed", "kept digest"],
            rows,
            text=3,
        ),
    )


def _repeating(sweep: SweepResults, base: Run) -> Section:
    config = base.config
    facts: dict[str, Any] = {
        "lm-eval": base.environment.get("lm_eval_version"),
        "transformers": base.environment.get("transformers_version"),
        "lm-eval-pruned (this report)": _own_version(),
        "model": config.get("model"),
        "model arguments of the unpruned model": config.get("model_args"),
        "model revision": config.get("model_sha") or config.get("model_revision"),
        "dtype": config.get("model_dtype"),
        "device (as asked)": config.get("device"),
        "batch size": config.get("batch_size"),
        "limit": config.get("limit"),
        "few-shot examples": base.environment.get("n-shot"),
        "chat template": base.environment.get("chat_template_sha"),
        "task versions": base.versions,
        "seeds (random, numpy, torch, few-shot)": [
            config.get(f"{name}_seed")
            for name in ("random", "numpy", "torch", "fewshot")
        ],
    }
    rows = [[Cell(name), Cell(_fact(value))] for name, value in facts.items()]
    return Section(
        "To repeat this",
        [
            "Settings of the unpruned model's run, and below them the sweep's own sweep.json."
        ],
        Table("Versions and settings", ["what", "value"], rows, text=2),
        code=_numbers_on_one_line(
            json.dumps(sweep.definition, indent=2, ensure_ascii=False, default=str)
        ),
    )


def _numbers_on_one_line(text: str) -> str:
    """Keep lists of numbers, such as those of ``--samples``, from filling pages."""
    return re.sub(
        r"\[\n\s*(-?\d+(?:,\s+-?\d+)*)\n\s*\]",
        lambda match: "[" + " ".join(match[1].split()) + "]",
        text,
    )


def _remarks(
    sweep: SweepResults, runs: Sequence[Run], comparison: Comparison
) -> Section | None:
    notes = [
        f"{failure.task} failed on {failure.run}: {failure.message}"
        for failure in sweep.failures
    ]
    notes += comparison.notes
    compared = {row.run for row in comparison.rows}
    notes += [
        f"{run.name} shares no task with the unpruned model and is not compared."
        for run in runs[1:]
        if run.name not in compared
    ]
    return Section("Remarks", notes=notes) if notes else None


def as_html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return one page that needs no other file and no network."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("lm_eval_pruned.analysis", "."),
        autoescape=True,
        trim_blocks=True,
    )
    template = environment.get_template("report_template.html")
    return template.render(title=title, subtitle=subtitle, sections=sections)


def as_markdown(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the same as Markdown; the plots are links to files below ``plots/``."""
    lines = [f"# {_plain(title)}", "", _plain(subtitle)]
    for section in sections:
        lines += ["", f"## {section.heading}"]
        for text in section.paragraphs:
            lines += ["", _plain(text)]
        if section.table is not None:
            table = section.table
            columns = [_not_html(name) for name in table.columns]
            rows = [[_not_html(cell.text) for cell in row] for row in table.rows]
            align = "l" * table.text + "r" * (len(columns) - table.text)
            lines += ["", markdown_table(columns, rows, align)]
        for plot in section.plots:
            alternative = f"{plot.title}. {plot.description}".replace("]", ")").replace(
                "[", "("
            )
            lines += ["", f"![{_plain(alternative)}](plots/{plot.name}.png)"]
        if section.code:
            lines += ["", "```json", section.code, "```"]
        if section.notes:
            lines += ["", *(f"- {_plain(note)}" for note in section.notes)]
    return "\n".join(lines) + "\n"


def as_csv(base: Run, others: Sequence[Run], comparison: Comparison) -> str:
    """Return all scores in long form, one row per run, task and metric."""
    found = {(row.run, row.task, row.metric): row for row in comparison.rows}
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for run in (base, *others):
        for (task, metric), score in run.scores.items():
            row = found.get((run.name, task, metric))
            compared: dict[str, Any] = {}
            if row is not None:
                compared = {
                    name: getattr(row, name)
                    for name in _COLUMNS
                    if name in Difference.__dataclass_fields__ and name != "documents"
                }
            compared.update(
                run=run.name,
                expansion_ratio=run.expansion_ratio,
                intermediate_size=run.pruning.get("intermediate_size_after"),
                parameters=run.pruning.get("parameters_after"),
                criterion=run.pruning.get("criterion"),
                seed=run.pruning.get("seed"),
                task=task,
                metric=metric,
                higher_is_better=score.higher_is_better,
                score=score.value,
                stderr=score.stderr,
                documents=score.documents,
                base=base.name,
            )
            writer.writerow(compared)
    return text.getvalue()


def _score_cell(row: Difference | None) -> Cell:
    if row is None:
        return Cell("-", note="not evaluated")
    marks = {
        "better": "\u25b2",
        "worse": "\u25bc",
        "different": "\u25c6",
        "not tested": "\u00d7",
        "not comparable": "\u00d7",
    }
    parts = [f"{row.difference:+.4f}"]
    if row.low is not None and row.high is not None:
        parts.append(f"[{row.low:+.4f}, {row.high:+.4f}]")
    parts += [
        f"{name} = {value:.3g}"
        for name, value in (("p", row.p), ("q", row.q))
        if value is not None
    ]
    mark = row.verdict if row.verdict in ("better", "worse") else ""
    text = f"{_score(row.score)} {marks.get(row.verdict, '')}".rstrip()
    return Cell(text, mark, f"{', '.join(parts)}; {row.method}; {row.verdict}")


def _significant(row: Difference | None) -> bool | None:
    """Return whether a difference is significant, or None where it was not tested."""
    if row is None or row.q is None:
        return None
    return row.verdict != "not shown"


def _share(baseline: float, score: float, falls: bool) -> float | None:
    one, other = (score, baseline) if falls else (baseline, score)
    return other / one if one else None


def _column(run: Run) -> str:
    ratio = run.expansion_ratio
    label = "unpruned, " if run.is_baseline else ""
    return f"{run.name} ({label}{ratio:.2f})" if ratio is not None else run.name


def _series(run: Run) -> str:
    name = str(run.pruning.get("criterion") or "-")
    return f"{name}, seed {run.pruning['seed']}" if "seed" in run.pruning else name


def _axis(task: str, metric: str) -> str:
    name = metric.removesuffix(",none")
    unit = "" if "perplexity" in name or "bits" in name else " (share of 1)"
    return f"{task}, {name}{unit}"


def _model_name(run: Run) -> str:
    arguments = run.config.get("model_args")
    name = None
    if isinstance(arguments, dict):
        name = arguments.get("pretrained")
    elif isinstance(arguments, str):
        pairs = dict(part.partition("=")[::2] for part in arguments.split(","))
        name = pairs.get("pretrained")
    return Path(str(name)).name if name else "SmolLM2-135M-Instruct (the default model)"


def _own_version() -> str:
    try:
        return version("lm-eval-pruned")
    except PackageNotFoundError:
        return "unknown"


def _fact(value: Any) -> str:
    if value is None or value == "" or value == {}:
        return "-"
    if isinstance(value, str | int | float):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _float(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def _score(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _arrow(higher_is_better: bool | None) -> str:
    return {True: "\u2191", False: "\u2193", None: ""}[higher_is_better]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower() or "all"


def _plain(text: str) -> str:
    """Return text that Markdown neither takes for HTML nor for a table."""
    return _not_html(text).replace("|", "\\|").replace("\n", " ")


def _not_html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
