"""A comparison as Markdown tables, CSV and JSON."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.compare.judge import Difference
from lm_eval_pruned.compare.kept import NO_LOSS
from lm_eval_pruned.results.groups import scale_name
from lm_eval_pruned.util.tables import csv_table, markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lm_eval_pruned.compare.comparison import Comparison


def number_text(value: float | None, form: str) -> str:
    """Return a number in the given format, ``p`` for a p value; a dash without one."""
    if form == "p" and value is not None:
        return "<0.0001" if value < 0.0001 else f"{value:.4f}"
    return "-" if value is None else format(value, form)


def interval_text(low: float | None, high: float | None, digits: int) -> str:
    """Return an interval as tables show it, or a dash where it lacks an end."""
    form = f"+.{digits}f"
    return "-" if None in (low, high) else f"[{low:{form}}, {high:{form}}]"


class Column(NamedTuple):
    """A column: what it shows of a row, in which format, and whether a terminal shows it.

    `of` is the name of an attribute, with dots for parts of it; or two names, of the ends of an
    interval, whose format is a number of digits; or a function. Formats are also ``p`` for a p
    value, and ``s`` for words, which are aligned to the left.
    """

    title: str
    of: str | Callable[[Any], Any]
    form: str = "s"
    terminal: bool = False

    def text(self, row: Any) -> str:
        """Return the cell of a row; a dash where there is nothing to say."""
        if callable(self.of):
            return number_text(self.of(row), self.form)
        values = []
        for name in self.of.split():
            values.append(row)
            for part in name.split("."):
                values[-1] = getattr(values[-1], part, None)
        if values[1:]:
            return interval_text(values[0], values[1], int(self.form))
        return number_text(values[0], self.form)


def filled(columns: Sequence[Column], rows: Sequence[Any]) -> list[Column]:
    """Return the columns that say something of any row."""
    return [each for each in columns if any(each.text(row) != "-" for row in rows)]


def titles(columns: Sequence[Column], alpha: float) -> list[str]:
    """Return the headings of columns; an interval is told with its confidence."""
    interval = f"{1 - alpha:.0%} interval"
    return [interval if each.title == "interval" else each.title for each in columns]


def _commonest(of: Difference) -> str | None:
    both = of.answers and (of.answers.base_commonest, of.answers.commonest)
    return "{:.0%} -> {:.0%}".format(*both) if both else None


#: Of `Difference`. CSV and JSON have its attributes.
DIFFERENCES = (
    Column("run", "run", terminal=True),
    Column("task", "task", terminal=True),
    Column("metric", "metric"),
    Column("base", "base_score", ".4f"),
    Column("score", "score", ".4f", terminal=True),
    Column("difference", "difference", "+.4f", terminal=True),
    Column("interval", "low high", "4", terminal=True),
    Column("relative", "relative", "+.1%"),
    Column("p", "p", "p"),
    Column("q", "q", "p", terminal=True),
    Column("smallest detectable", "smallest_detectable", ".4f"),
    Column("margin", "claim.margin", ".4g"),
    Column("q margin", "claim.q", "p"),
    Column("documents", "documents", "d"),
    Column("floor", "floor.floor", ".4f", terminal=True),
    Column("kept", "kept_text", ">", terminal=True),
    Column("equal answers", "answers.equal_answers", ".0%", terminal=True),
    Column("KL", "answers.kl", ".3f"),
    Column("commonest answer", _commonest, ">"),
    Column("test", "method"),
    Column("verdict", "said", terminal=True),
)
#: Of `Standing`, of the base.
ABOVE = {True: "yes", False: f"no: {NO_LOSS}", None: "not tested"}
FLOORS = (
    Column("task", "task", terminal=True),
    Column("metric", "metric"),
    Column("without knowledge", "floor_name", terminal=True),
    Column("floor", "floor", ".4f", terminal=True),
    Column("base", "score", ".4f", terminal=True),
    Column("p", "p_floor", "p", terminal=True),
    Column("test", "floor_test"),
    Column("base is above", lambda each: ABOVE[each.above_floor], terminal=True),
)
#: Of `TaskTrend`.
TRENDS = (
    Column("series", "series"),
    Column("task", "task"),
    Column("metric", lambda each: scale_name("", each.metric)),
    Column("n", "trend.n", "d"),
    Column("slope", "trend.slope", "+.4f"),
    Column("interval", "trend.low trend.high", "4"),
    Column("p", "trend.p", "p"),
    Column("q", "q", "p"),
    Column("documents", lambda each: each.trend.units or None, "d"),
    Column("test", "trend.method"),
)
#: Of `TaskCorrelation`.
CORRELATIONS = (
    Column("series", "series"),
    Column("task", lambda pair: scale_name(*pair.tasks[0])),
    Column("task", lambda pair: scale_name(*pair.tasks[1])),
    Column("n", "correlation.n", "d"),
    Column("Pearson r", "correlation.pearson", "+.3f"),
    Column("interval", "correlation.pearson_low correlation.pearson_high", "2"),
)
DIFFERENCE = (
    "difference = run - base; q: p after Benjamini-Hochberg over the runs of each task without random "
    "controls, so that among many tasks some may show a difference by chance; interval: widened to match "
    "q, so that it excludes 0 exactly where a difference is shown; smallest detectable: the difference "
    "that would be found with a chance of 80 % after this correction."
)
FLOOR = (
    "Floor: the best score without knowledge, whether from a model that knows nothing, from chance, or "
    "from always giving the commonest right answer; at floor: not shown to be above it (one-sided tests); "
    "kept: the share of what the base has above the floor, where it is shown to have any. "
    "If the base is not shown to be above its floor, the task cannot show a loss."
)
ANSWERS = (
    "equal answers: share of documents with the same answer as the base; KL: mean divergence of the "
    "distribution over choices from that of the base, in nats; commonest answer: its share of all "
    "answers, for the base and the run."
)
TREND = (
    "Trend over expansion ratios (change of the score when the ratio rises by 1, positive if the score "
    "falls with pruning; tested on the slopes of single documents):"
)
CORRELATION = (
    "Correlation of two tasks over expansion ratios (the interval treats sizes as independent draws, "
    "which steps of pruning are not):"
)


#: Characters of a line in a terminal, and the columns that go first where there are more.
WIDTH, SPARED = 80, ("equal answers", "floor", "score", "q", "without knowledge", "p")


def findings(comparison: Comparison) -> str:
    """Return in a sentence how many scores of the runs differ, and which way."""
    counts = Counter(row.verdict for row in comparison.rows if row.primary)
    parts = (f"{count} {verdict}" for verdict, count in counts.most_common())
    return f"Compared with {comparison.base}: {', '.join(parts)}."


def fitted_table(columns: Sequence[Column], rows: Sequence[Any], alpha: float) -> str:
    """Return a padded table whose lines have at most `WIDTH` characters.

    The columns `SPARED` go first, then the middle of the longest names of runs and tasks.
    """

    def table(longest: int) -> str:
        cells = [[column.text(row) for column in columns] for row in rows]
        for line in cells:
            for place, column in enumerate(columns):
                if column.title in ("run", "task"):
                    line[place] = shortened(line[place], longest)
        align = "".join("l" if column.form == "s" else "r" for column in columns)
        return markdown_table(titles(columns, alpha), cells, align, padded=True)

    longest = WIDTH
    for title in SPARED:
        if len(table(longest).partition("\n")[0]) > WIDTH:
            columns = [column for column in columns if column.title != title]
    while len(table(longest).partition("\n")[0]) > WIDTH and longest > 5:
        longest -= 1
    return table(longest)


def shortened(name: str, longest: int) -> str:
    """Return a name without its middle where it has more characters than `longest`.

    Example:
        >>> shortened("prune_percent-40", 9)
        'prun…t-40'
    """
    if len(name) <= longest:
        return name
    end = (longest - 1) // 2
    return f"{name[: longest - 1 - end]}…{name[-end:]}"


def as_table(
    comparison: Comparison, *, everything: bool = True, padded: bool = False
) -> str:
    """Return Markdown tables, `padded` for a terminal; without `everything`, those that fit one."""
    rows, margin = comparison.rows, comparison.margin
    shown = [row for row in rows if everything or row.primary]
    floors = [e for e in comparison.floors if everything or e.primary]
    tables: list[tuple[str, Sequence[Column], Sequence[Any]]]
    tables = [("", DIFFERENCES, shown), (FLOOR, FLOORS, floors)]
    about = ["--all shows all columns, restated metrics, trends and correlations."]
    if everything:
        restated = "Rows that are `restated` are other metrics of the same answers."
        about = [DIFFERENCE, *[restated] * any(not row.primary for row in rows)]
        if margin:
            about.append(
                f"Margin: {margin.text}; {margin.verdict} is shown where q margin is below "
                f"{comparison.alpha:g} (two one-sided tests)."
            )
        about += [ANSWERS] * any(row.answers for row in rows)
        tables.append((TREND, TRENDS, comparison.trends))
        tables.append((CORRELATION, CORRELATIONS, comparison.correlations))
    parts = [f"{findings(comparison)} {' '.join(about)}"]
    for heading, columns, of in tables:
        columns = [e for e in filled(columns, of) if everything or e.terminal]
        if of and everything:
            cells = [[column.text(row) for column in columns] for row in of]
            align = "".join("l" if e.form == "s" else "r" for e in columns)
            heads = titles(columns, comparison.alpha)
            parts += [heading, markdown_table(heads, cells, align, padded=padded)]
        elif of:
            parts += [heading, fitted_table(columns, of, comparison.alpha)]
    notes = [f"Note: {note}" for note in comparison.notes]
    if not everything:
        parts, notes = ([_wrapped(text) for text in each] for each in (parts, notes))
    parts.append("\n".join(notes))
    return "\n\n".join(filter(None, parts)) + "\n"


def _wrapped(text: str) -> str:
    if text[:1] == "|":
        return text
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def as_csv(comparison: Comparison) -> str:
    """Return the differences as CSV; of margins, floors and answers where there are any."""
    names = [field.name for field in fields(Difference)][:-4]
    names += ["margin", "p_margin", "q_margin"] * (comparison.margin is not None)
    rows = []
    for row in comparison.rows:
        found, more = asdict(row), beside(row)
        if claim := row.claim:
            found |= {"margin": claim.margin, "p_margin": claim.p, "q_margin": claim.q}
        names += [name for name in more if name not in names]
        rows.append(found | more)
    return csv_table(names, [{name: row.get(name) for name in names} for row in rows])


def beside(row: Difference | None) -> dict[str, Any]:
    """Return what CSV says of floor and answers of a row."""
    floor = asdict(row.floor) if row and row.floor else {}
    if floor:
        kept = floor["kept"] or dict.fromkeys(("share", "low", "high"))
        names = ("kept", "kept_low", "kept_high")
        floor |= dict(zip(names, kept.values(), strict=True))
    return floor | (asdict(row.answers) if row and row.answers else {})


def as_json(comparison: Comparison) -> str:
    """Return the whole comparison as JSON; numbers that are not finite become null."""
    text = json.dumps(asdict(comparison))
    return json.dumps(json.loads(text, parse_constant=lambda _: None), indent=2) + "\n"


FORMATS = {"markdown": as_table, "csv": as_csv, "json": as_json}
