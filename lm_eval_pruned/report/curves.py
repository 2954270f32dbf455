"""The sections of a report that draw something over the expansion ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from lm_eval_pruned.compare.comparison_table import number_text
from lm_eval_pruned.report.page import Section, Table, run_label
from lm_eval_pruned.results.files import as_mapping, finite_or_none
from lm_eval_pruned.results.groups import is_perplexity, primary_metrics, series_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.comparison import Comparison
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.util.figures import Plot

#: Tasks that stand for knowledge and for truthfulness, the study's own first.
KNOWLEDGE = ("mmlu", "gsm8k", "arc_challenge", "boolq", "lambada_openai", "wikitext")
TRUTHFULNESS = ("truthfulqa_mc2", "truthfulqa_mc1", "pruned_demo_truthfulness")


def slug(name: str) -> str:
    """Return a name as part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower() or "all"


def truthfulness_section(runs: Sequence[Run], comparison: Comparison) -> Section | None:
    """A truthfulness task against a knowledge task, one point per size."""
    import altair as alt

    from lm_eval_pruned.util.figures import HUES, Plot

    plots = []
    for series, members in series_of(runs).items():
        metrics = dict(primary_metrics(members))
        knowledge, truth = (
            next(((task, metrics[task]) for task in tasks if task in metrics), None)
            for tasks in (KNOWLEDGE, TRUTHFULNESS)
        )
        if knowledge is None or truth is None or len(members) < 2:
            continue
        caption = f"Too few different points for a correlation (n = {len(members)})."
        for each in comparison.correlations:
            found, pair = each.correlation, {knowledge, truth}
            if each.series != series or {*each.tasks} != pair or found.pearson is None:
                continue
            logs = any(is_perplexity(metric) for _, metric in pair)
            caption = (
                f"Pearson r{' of log perplexity' if logs else ''} = {found.pearson:.3f}, "
                f"{1 - comparison.alpha:.0%} interval [{found.pearson_low:.2f}, "
                f"{found.pearson_high:.2f}] if sizes were independent draws, n = {found.n}."
            )
        points = pd.DataFrame(
            {
                "x": run.scores[knowledge].value,
                "y": run.scores[truth].value,
                "ratio": run.expansion_ratio,
            }
            for run in members
        )
        scale = alt.Scale(zero=False)
        chart = alt.Chart(points).encode(
            alt.X("x:Q", scale=scale, title=_axis(*knowledge)),
            alt.Y("y:Q", scale=scale, title=_axis(*truth)),
        )
        labels = chart.mark_text(align="left", dx=6, dy=-6)
        plots.append(
            Plot(
                f"knowledge-truthfulness-{slug(series)}",
                f"{truth[0]} against {knowledge[0]} ({series})",
                "One point per configuration, labelled with its expansion ratio, joined in the "
                f"order of pruning. {caption}",
                chart.mark_line(color=HUES[0], opacity=0.5).encode(order="ratio:Q")
                + chart.mark_point(color=HUES[0], filled=True, opacity=1)
                + labels.encode(text=alt.Text("ratio:Q", format=".2f")),
            )
        )
    return Section("Knowledge against truthfulness", plots=plots) if plots else None


def _axis(task: str, metric: str) -> str:
    name = metric.removesuffix(",none")
    unit = "" if "perplexity" in name or "bits" in name else " (share of 1)"
    return f"{task}, {name}{unit}"


def energy_section(runs: Sequence[Run]) -> Section | None:
    """What the meter logged, by configuration and kind of request."""
    rows, points, sources = [], [], set()
    notes: dict[str, None] = {}
    blocks = [(run, *block) for run in runs for block in run.energy.items()]
    for run, tasks, block in blocks:
        for part, source in as_mapping(block.get("sources")).items():
            sources.add(f"{part.upper()}: {as_mapping(source).get('kind')}")
        notes |= dict.fromkeys(map(str, block.get("notes") or ()))
        for kind, record in as_mapping(block.get("request_types")).items():
            record = as_mapping(record)
            seconds = finite_or_none(record.get("seconds"))
            joules = finite_or_none(as_mapping(record.get("joules")).get("total"))
            generated = finite_or_none(record.get("generated_tokens"))
            per_token = finite_or_none(record.get("joules_per_processed_token"))
            latency = 1000 * seconds / generated if seconds and generated else None
            rows.append(
                [
                    run_label(run),
                    tasks,
                    kind,
                    number_text(seconds, ",.1f"),
                    number_text(joules, ",.1f"),
                    number_text(per_token, ".4g"),
                    number_text(latency, ".4g"),
                ]
            )
            ratio = None if run.is_shallow else run.expansion_ratio
            points.append((f"{tasks}, {kind}", ratio, per_token, latency))
    if not rows:
        return None
    known = f"Sources: {'; '.join(sorted(sources))}"
    said = (
        "As the meter logged them while the tasks ran, with all that the machine did beside. "
        f"{known if sources else 'The sources are not known'}. Modelled energy is an estimate, not "
        "a measurement. The time per generated token includes reading the prompts."
    )
    columns = ["configuration", "tasks", "requests", "seconds", "joules"]
    columns += ["J / processed token", "ms / generated token"]
    return Section(
        "Energy and latency",
        [said],
        table=Table("Energy and latency", columns, rows, text=3),
        plots=_energy_plots(points),
        notes=list(notes),
    )


def _energy_plots(points: list[tuple]) -> list[Plot]:
    import altair as alt

    from lm_eval_pruned.util.figures import Plot, line_look, lines, over_ratios

    logged = pd.DataFrame(points, columns=["line", "ratio", "energy", "latency"])
    plots = []
    for name, unit in (
        ("energy", "energy per processed token (J)"),
        ("latency", "wall time per generated token (ms)"),
    ):
        drawn = logged[["line", "ratio", name]].dropna()
        drawn = drawn[drawn.groupby("line")[name].transform("size") > 1]
        if drawn.empty:
            continue
        title = f"{name.capitalize()} per token"
        y = alt.Y(f"{name}:Q", scale=alt.Scale(zero=False), title=unit)
        look = line_look(list(drawn["line"].unique()))
        said = f"{title} against the expansion ratio, as logged while the tasks ran."
        plots.append(Plot(name, title, said, lines(drawn, over_ratios(), y, look)))
    return plots
