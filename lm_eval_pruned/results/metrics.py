"""What a metric can be: between which limits a score lies, and whether it is a bias or a loss on text.

This is known from the name of the metric, or from what the task declares, never from scores at hand: values
that happen to lie between 0 and 1 say nothing about the next document.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval_pruned.results.parts import ResultsError, as_mapping, finite_or_none


if TYPE_CHECKING:
    from collections.abc import Mapping

    #: The smallest and the largest score that there is.
    Limits = tuple[float, float]

#: Key of a task's metadata: by metric, the smallest and the largest score of a document.
BOUNDS = "bounds"
SHARE: Limits = (0.0, 1.0)


class Metric(NamedTuple):
    """A row of `METRICS`: regular expressions that match whole names, and what is known of these metrics.

    `limits` are None where a score can be any number. A `bias` says which way a model leans, and neither
    way is better; a `loss` is one on text.
    """

    metrics: str
    limits: Limits | None = None
    bias: bool = False
    loss: bool = False
    tasks: str = ".*"


#: The first row that matches counts.
METRICS = (
    Metric("(HasAns_|NoAns_|best_)?(exact|f1)", (0, 100), tasks=".*squad.*"),
    Metric("(bleu|rouge[12L])_max", (0, 100)),
    Metric("(bleu|rouge[12L])_diff", (-100, 100)),
    Metric("bias|pct_stereotype", SHARE, bias=True),
    Metric("(dis)?amb_bias_score.*", (-1, 1), bias=True),
    Metric("(.*_)?perplexity|bits_per_byte|bpb|kl", loss=True),
    Metric("(.*_)?acc(uracy)?(_norm|_bytes|_mutual_info|_all)?", SHARE),
    Metric(
        "(quasi_)?(prefix_)?exact_match(_mc)?|em|f1|mc[12]|choice_prob(_norm)?", SHARE
    ),
    Metric("pass(@|_at_)[0-9]+|sibling|ended|repeated", SHARE),
    Metric("mcc", (-1, 1)),
    # A squared distance of probabilities from the right answer: 2 where another one is certain.
    Metric("brier_score", (0, 2)),
    Metric(".*"),
)


def metric_of(
    task: str, metric: str, metadata: Mapping[str, Any] | None = None
) -> Metric:
    """Return what is known of a metric of a task, whose `metadata` may declare ``bounds`` for it.

    ResultsError if these are not two numbers.
    """
    name = metric.partition(",")[0]
    row = next(
        row
        for row in METRICS
        if re.fullmatch(row.metrics, name) and re.fullmatch(row.tasks, task)
    )
    declared = as_mapping((metadata or {}).get(BOUNDS)).get(name)
    if declared is None:
        return row
    ends = [*map(finite_or_none, declared)] if isinstance(declared, list) else []
    if len(ends) != 2 or None in ends or ends[0] >= ends[1]:  # type: ignore[operator]
        raise ResultsError(
            f"{task} declares the bounds {declared!r} of {name}: pass the smallest and the largest "
            "score of a document, such as [0, 1]."
        )
    return row._replace(limits=(ends[0], ends[1]))  # type: ignore[arg-type]


def is_share(task: str, metric: str, metadata: Mapping[str, Any] | None = None) -> bool:
    """Whether a metric is a share of 1."""
    return metric_of(task, metric, metadata).limits == SHARE


def is_bias(metric: str) -> bool:
    """Whether a metric says which way a model is biased; neither way is better."""
    return metric_of("", metric).bias


def is_loss(metric: str) -> bool:
    """Whether a metric is a loss on text."""
    return metric_of("", metric).loss


def is_perplexity(metric: str) -> bool:
    """Whether a metric is a perplexity, whose logarithm is the mean over documents."""
    return "perplexity" in metric
