"""The sections of a report that draw something over the expansion ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from lm_eval_pruned.compare.comparison_table import CORRELATIONS, number_text
from lm_eval_pruned.report.page import Section, Table, run_label
from lm_eval_pruned.report.sections import declared_table
from lm_eval_pruned.results.files import as_mapping, finite_or_none
from lm_eval_pruned.results.groups import primary_metrics, series_of


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.comparison import Comparison
    from lm_eval_pruned.results.files import Run

#: Tasks that stand for knowledge and for truthfulness, the study's own first.
KNOWLEDGE = ("mmlu", "gsm8k", "arc_challenge", "boolq", "lambada_openai", "wikitext")
TRUTHFULNESS = ("truthfulqa_mc2", "truthfulqa_mc1", "pruned_demo_truthfulness")


def slug(name: str) -> str:
    """Return a name as part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower() or "all"


def truthfulness_section(runs: Sequence[Run], comparison: Comparison) -> Section | None:
    """A truthfulness task against a knowledge task, one point per size, with Pearson's r."""
    import altair as alt

    from lm_eval_pruned.util.figures import HUES, Plot

    plots, rows = [], []
    for series, members in series_of(runs).items():
        metrics = dict(primary_metrics(members))
        known = [
            next((t for t in of if t in metrics), "")
            for of in (KNOWLEDGE, TRUTHFULNESS)
        ]
        if not all(known) or len(members) < 2:
            continue
        pair = [(task, metrics[task]) for task in known]
        rows += [
            each
            for each in comparison.correlations
            if each.series == series and {*each.tasks} == {*pair}
        ]
        scores = [[run.scores[key].value for key in pair] for run in members]
        points = pd.DataFrame(scores, columns=["x", "y"])
        points["ratio"] = [run.expansion_ratio for run in members]
        axes = [f"{task}, {metric.removesuffix(',none')}" for task, metric in pair]
        scale = alt.Scale(zero=False)
        chart = alt.Chart(points).encode(
            alt.X("x:Q", scale=scale, title=axes[0]),
            alt.Y("y:Q", scale=scale, title=axes[1]),
        )
        labels = chart.mark_text(align="left", dx=6, dy=-6)
        chart = (
            chart.mark_line(color=HUES[0], opacity=0.5).encode(order="ratio:Q")
            + chart.mark_point(color=HUES[0], filled=True, opacity=1)
            + labels.encode(text=alt.Text("ratio:Q", format=".2f"))
        )
        name = f"knowledge-truthfulness-{slug(series)}"
        title = f"{known[1]} against {known[0]} ({series})"
        said = "One point per configuration, labelled with its expansion ratio."
        plots.append(Plot(name, title, said, chart))
    heading = "Knowledge against truthfulness"
    said = "The interval takes the sizes for independent draws, which steps of pruning are not."
    if not plots:
        return None
    table = declared_table(heading, CORRELATIONS, rows, comparison.alpha)
    return Section(heading, [said], table=table if rows else None, plots=plots)


def energy_section(runs: Sequence[Run]) -> Section | None:
    """What the meter logged, by configuration and kind of request."""
    rows, sources = [], set()
    notes: dict[str, None] = {}
    blocks = [(run, *block) for run in runs for block in run.energy.items()]
    for run, tasks, block in blocks:
        for part, source in as_mapping(block.get("sources")).items():
            sources.add(f"{part.upper()}: {as_mapping(source).get('kind')}")
        notes |= dict.fromkeys(map(str, block.get("notes") or ()))
        for kind, record in as_mapping(block.get("request_types")).items():
            known = {**as_mapping(record)}
            known["joules"] = as_mapping(known.get("joules")).get("total")
            names = ("seconds", "joules", "joules_per_processed_token")
            seconds, joules, per_token = (finite_or_none(known.get(n)) for n in names)
            generated = finite_or_none(known.get("generated_tokens"))
            latency = 1000 * seconds / generated if seconds and generated else None
            totals = [number_text(each, ",.1f") for each in (seconds, joules)]
            shares = [number_text(each, ".4g") for each in (per_token, latency)]
            rows.append([run_label(run), tasks, kind, *totals, *shares])
    if not rows:
        return None
    said = (
        "As the meter logged them while the tasks ran, with all that the machine did beside. "
        f"Sources: {'; '.join(sorted(sources)) or 'not known'}. Modelled energy is an estimate, not "
        "a measurement. The time per generated token includes reading the prompts."
    )
    columns = ["configuration", "tasks", "requests", "seconds", "joules"]
    columns += ["J / processed token", "ms / generated token"]
    table = Table("Energy and latency", columns, rows, text=3)
    return Section(table.label, [said], table=table, notes=list(notes))
