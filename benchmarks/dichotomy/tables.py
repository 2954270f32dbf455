"""What is measured and what the tables of the page hold, and the words for single tests."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare import statistics


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.compare.statistics import PairedTest

Row = dict[str, Any]
ALPHA = 0.05


@dataclass(frozen=True)
class Measure:
    """How one task is read.

    Attributes:
        metric: The one that stands for the task.
        label: On the page.
        higher_is_better: Which way is up.
        margin: A change within it is none that matters, in the unit of the metric.
        share: Whether it is a share, shown in points.
    """

    metric: str
    label: str
    higher_is_better: bool = True
    margin: float = 0.03
    share: bool = True


#: In the order of the page. Bits per byte are a mean over bytes, which the word perplexity is
#: not: it stands beside them as a score, and is not tested.
MEASURES = {
    "truthfulqa_mc1": Measure("acc,none", "TruthfulQA MC1"),
    "truthfulqa_mc2": Measure("acc,none", "TruthfulQA MC2"),
    "ifeval": Measure("inst_level_strict_acc,none", "IFEval, instructions"),
    "boolq": Measure("acc,none", "BoolQ"),
    "gsm8k": Measure("exact_match,strict-match", "GSM8K"),
    "held_text": Measure(
        *("bits_per_byte,none", "held text, bits per byte", False, 0.05, False)
    ),
}
_RUN = ("model", "step", "run", "method", "criterion", "seed", "percent", "parameters")
_TEST = ("difference", "low", "high", "p", "q")
TABLES = {
    "scores": (
        *_RUN,
        *("allocation", "width", "ratio", "layers", "task", "metric", "n", "score"),
        *("stderr", "word_perplexity", "chance", "majority", "p_levels", *_TEST),
        *("p_margin", "q_margin", "verdict"),
    ),
    "chance": (
        *("model", "step", "task", "criterion", "percent", "parameters", "score"),
        *("random", "seeds", *_TEST, "verdict"),
    ),
    "contrasts": (
        *("question", "model", "task", "criterion", "percent", "seeds", "one", "other"),
        *("parameters_one", "parameters_other", "score_one", "score_other", *_TEST),
        *("p_margin", "q_margin", "verdict"),
    ),
    "mc2": (
        *(*_RUN, "toward", "n", "level", "base", "score", "distance_base", "distance"),
        *(
            "closer",
            "closer_low",
            "closer_high",
            "closer_p",
            "closer_q",
            "moved",
            "explained",
        ),
        *("rest", "rest_low", "rest_high", "rest_p", "rest_q"),
    ),
    "ifeval": (
        *(*_RUN, "part", "instructions", "prompts", "words_base", "words"),
        *("base", "cut", "score"),
        *(
            f"{part}_{each}"
            for part in ("total", "length", "rest")
            for each in ("difference", "low", "high", "p", "q")
        ),
    ),
    "settings": ("model", "step", "setting", "value"),
    "latency": (
        *("model", "name", "width", "ratio", "parameters", "batch_size", "length"),
        "repeats",
        *("ms_first_token", "ms_per_token", "seconds"),
        *("seconds_change", "seconds_low", "seconds_high", "seconds_verdict"),
        "device",
    ),
}


def written(value: Any) -> Any:
    """Return a value as it stands in a table."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


def plainly(value: Any) -> str:
    """Return a setting as it is typed."""
    if isinstance(value, dict):
        return " ".join(f"{name}={each}" for name, each in value.items())
    return str(value)


def tested(test: PairedTest | None, margin: float) -> Row:
    """Return the columns of a paired test, with that of "the change is larger than the margin"."""
    if test is None:
        return {}
    return {
        "difference": test.difference,
        "low": test.low,
        "high": test.high,
        "p": test.p,
        "p_margin": test.p_outside(-margin, margin),
    }


#: Tests that are adjusted together have these columns in common, and are of random controls or
#: of none: each task is a question, and what is certain does not belong to what is asked.
_FAMILIES = {
    "scores": ("model", "step", "task"),
    "chance": ("model", "step", "task"),
    "contrasts": ("question", "model", "task"),
    "mc2": ("model", "step"),
    "ifeval": ("model", "step"),
}


def adjust(tables: Mapping[str, Sequence[Row]]) -> None:
    """Add q to the rows of each table, and what they say, whoever measured them and when.

    A p is read as it is written, so that rows that were written and read again have the same q.
    """
    for name, columns in _FAMILIES.items():
        rows = tables[name]
        families = [
            (
                *(str(row[column]) for column in columns),
                row.get("criterion") == "random",
            )
            for row in rows
        ]
        for q in (
            column for column in TABLES[name] if re.search("(^|_)q(_|$)", column)
        ):
            p = re.sub("(^|_)q(_|$)", r"\1p\2", q)
            made = [written(row.get(p)) for row in rows]
            found = statistics.false_discovery(
                [float(each) if each != "" else None for each in made], families
            )
            for row, (value, _) in zip(rows, found, strict=True):
                row[q] = value
        if "verdict" in TABLES[name]:
            say = change_verdict if name == "scores" else against_verdict
            for row in rows:
                row["verdict"] = say(row)


def change_verdict(row: Row) -> str:
    """Return ``falls``, ``rises``, ``holds`` (within the margin), ``undecided`` or nothing."""
    if row.get("q") is None:
        return ""
    if row["q"] < ALPHA:
        better = MEASURES[row["task"]].higher_is_better
        return "rises" if (float(row["difference"]) > 0) == better else "falls"
    within = row.get("q_margin")
    return "holds" if within is not None and within < ALPHA else "undecided"


def against_verdict(row: Row) -> str:
    """Return whether the first of two is ``better`` or ``worse``, or that it is not shown."""
    change = change_verdict(row)
    words = {"rises": "better", "falls": "worse", "holds": "equal within the margin"}
    return words.get(change, "not shown" if change else "")
