"""Whether two models answer alike, right or wrong, and whether one gives a single answer."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import special


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.pairing import Pair


@dataclass(frozen=True)
class Agreement:
    """How the answers of a run relate to those of the base, on the same documents.

    `equal_answers` is a share of documents; an answer is a choice, or the text after the task's
    filter. `kl` is the mean divergence, in nats, of the run's distribution over the choices from
    that of the base, None for texts; `beginning` the mean share of the base's text, in words, before
    the first difference, None for choices. The shares of the commonest answers follow.

    Source: Dutta et al. 2024, arXiv 2407.09141.
    """

    equal_answers: float
    kl: float | None
    beginning: float | None
    base_commonest: float
    commonest: float


def agreement(pair: Pair | None, metric: str) -> Agreement | None:
    """Compare the answers of two runs; None where the samples do not tell all of them."""
    replies = [[s.reply for s in run.samples if s.reply] for run in pair or ()]
    if not pair or {*map(len, replies)} != {len(pair[0].keys)}:
        return None
    before, after = ([*map(str, run.answers(metric))] for run in pair)
    likelihoods = ([reply.likelihoods for reply in run] for run in replies)
    kl = float(np.mean([*map(divergence, *likelihoods)]))
    no_choices = math.isnan(kl)
    beginning = float(np.mean([*map(_beginning, before, after)]))
    same = [one == other for one, other in zip(before, after, strict=True)]
    commonest = (max(Counter(answers).values()) for answers in (before, after))
    base_share, share = (count / len(before) for count in commonest)
    return Agreement(
        equal_answers=float(np.mean(same)),
        kl=None if no_choices else kl,
        beginning=beginning if no_choices else None,
        base_commonest=base_share,
        commonest=share,
    )


def divergence(before: Sequence[float], after: Sequence[float]) -> float:
    """Return KL(before || after) in nats, of softmaxes over the log-likelihoods of choices.

    NaN without choices, and where the models were offered different numbers of them.

    Example:
        >>> divergence([0.0, 0.0], [-5.0, -5.0])
        0.0
    """
    if not before or len(before) != len(after):
        return np.nan
    p, q = special.log_softmax([before, after], axis=1)
    with np.errstate(invalid="ignore"):
        return float(np.where(p > -np.inf, np.exp(p) * (p - q), 0).sum())


def _beginning(before: str, after: str) -> float:
    one, other = before.split(), after.split()
    same = [*(a == b for a, b in zip(one, other, strict=False)), False].index(False)
    return same / len(one) if one else float(not other)
