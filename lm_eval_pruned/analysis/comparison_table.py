"""A comparison as Markdown tables, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict
from typing import Any

from lm_eval_pruned.analysis.comparison_rows import Comparison, Difference
from lm_eval_pruned.analysis.series import scale_name


#: What the tables of trends and correlations show.
TREND = (
    "Trend over expansion ratios (change of the score per 1 of ratio, positive where it falls "
    "with pruning; slopes of single documents)"
)


CORRELATION = (
    "Correlation of two tasks over expansion ratios (p of r and of rho take the sizes for "
    "independent draws, which steps of pruning are not; p both: both tasks have a trend)"
)


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
