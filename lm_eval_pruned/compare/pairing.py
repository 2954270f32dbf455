"""The documents that two runs were both scored on: whether they were asked alike, and answer alike."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import special

from lm_eval_pruned.compare.claims import Paired, paired
from lm_eval_pruned.results.documents import Documents, documents_of
from lm_eval_pruned.results.files import (
    CHANGES_ANSWERS,
    SERVED_WITH,
    ResultsError,
    Run,
    asked_differently,
)
from lm_eval_pruned.results.metrics import metric_of


if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike

    from lm_eval_pruned.results.metrics import Limits
    from lm_eval_pruned.results.samples import Samples

    Pair = tuple[Documents, Documents]


def another_test(base: Run, run: Run, task: str, more: Iterable[str] = ()) -> str:
    """Say why the scores of two runs on a task are those of different tests; empty where they are not.

    `more` settings are compared beside what was asked.
    """
    if why := _other_version(base, run, task):
        return why
    one, other = base.settings.get(task, {}), run.settings.get(task, {})
    return asked_differently(one, other, f"in {base.name}", more)


def served_otherwise(base: Run, run: Run) -> dict[str, tuple[Any, Any]]:
    """Return the settings, apart from the weights, with which two models are served and that differ.

    By name, the value of the base and that of the run; empty where no task had both models write.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for task, settings in base.settings.items():
        one, other = (
            item.get(SERVED_WITH) or {}
            for item in (settings, run.settings.get(task, {}))
        )
        both = [name for name in one if name in other]
        found |= {n: (one[n], other[n]) for n in both if one[n] != other[n]}
    return found


def answers_changed_by(served: Iterable[str]) -> list[str]:
    """Return which of the settings that differ change what a model generates."""
    return [name for name in CHANGES_ANSWERS if name in {*served}]


def _other_version(base: Run, run: Run, task: str) -> str:
    for name in base.leaves(task):
        versions = base.versions.get(name), run.versions.get(name)
        if None not in versions and versions[0] != versions[1]:
            return (
                f"{name} has version {versions[0]} in {base.name} and {versions[1]} in {run.name}: scores "
                "of different versions of a task cannot be compared, so evaluate both again."
            )
    return ""


def paired_documents(base: Run, run: Run, task: str, metric: str) -> Pair | None:
    """Return the documents of two runs in the same order, or None without samples.

    Raises:
        ResultsError: The runs saw different documents or task versions.
    """
    if why := _other_version(base, run, task):
        raise ResultsError(why)
    one, other = (documents_of(item, task, metric) for item in (base, run))
    if one is None or other is None:
        return None
    if one.keys != other.keys:
        before, after = {*one.keys}, {*other.keys}
        if before != after:
            raise ResultsError(
                f"{task} was evaluated on different documents: {len(before - after)} of {len(before)} "
                f"only in {base.name}, {len(after - before)} of {len(after)} only in {run.name} "
                "(matched by doc_hash); evaluate both with the same --limit and data."
            )
        other = other.taken(one.keys)
    if one.transform != other.transform or not np.allclose(one.weights, other.weights):
        return None
    return one, other


def limits_of(run: Run, task: str, metric: str, *values: ArrayLike) -> Limits | None:
    """Return the smallest and the largest score of a document, or None if it can be any number.

    ResultsError where some of the `values`, shape (n,) each, lie outside of them.
    """
    limits = metric_of(task, metric, run.metadata.get(task)).limits
    for scores in values if limits else ():
        seen = np.asarray(scores, float)
        if (
            limits
            and not ((seen >= limits[0] - 1e-9) & (seen <= limits[1] + 1e-9)).all()
        ):
            raise ResultsError(
                f"{task} {metric.partition(',')[0]} has documents of {seen.min():.6g} to {seen.max():.6g} in "
                f"{run.name}, but lies between {limits[0]:g} and {limits[1]:g}: declare other bounds in the "
                "metadata of the task, or evaluate again."
            )
    return limits


def paired_test(
    pair: Pair, base: Run, task: str, metric: str, floor: ArrayLike = 0.0
) -> Paired:
    """Test what the second of two runs differs by, on what `paired_documents` returned."""
    one, other = pair
    limits = None
    if one.transform == "mean":
        limits = limits_of(base, task, metric, one.values, other.values)
    how = {"transform": one.transform, "limits": limits, **one.groups}
    return paired(one.values, other.values, floor, **how)


@dataclass(frozen=True)
class Agreement:
    """How the answers of a run relate to those of the base, on the same documents.

    `equal_answers` is a share of documents; an answer is a choice, or the text after the task's
    filter. `kl` is the mean divergence, in nats, of the run's distribution over the choices from
    that of the base, None for texts; `beginning` the mean share of the base's text, in words, before
    the first difference, None for choices; `same_tokens` the share of texts that begin with the same 8
    tokens, None where the tokens are not known. The shares of the commonest answers follow.

    Source: Dutta et al. 2024, arXiv 2407.09141.
    """

    equal_answers: float
    kl: float | None
    beginning: float | None
    same_tokens: float | None
    base_commonest: float
    commonest: float


def agreement(pair: Pair | None, metric: str) -> Agreement | None:
    """Compare the answers of two runs; None where the samples do not tell all of them."""
    answers = [
        [answer for answer in run.answers(metric) if answer is not None]
        for run in pair or ()
    ]
    if pair is None or {*map(len, answers)} != {len(pair[0].keys)}:
        return None
    before, after = answers
    one, other = (run.samples for run in pair)
    assert one and other
    kl = float(np.mean(divergence(one, other)))
    beginning = None
    if math.isnan(kl):
        beginning = float(np.mean([*map(_beginning, before, after)]))
    same = [one == other for one, other in zip(before, after, strict=True)]
    commonest = (max(Counter(texts).values()) for texts in answers)
    same_tokens = None
    if one.tokens and all(one.tokens):
        tokens = zip(one.tokens, other.tokens or [()] * len(before), strict=True)
        same_tokens = float(np.mean([a[:8] == b[:8] for a, b in tokens]))
    base_share, share = (count / len(before) for count in commonest)
    return Agreement(
        equal_answers=float(np.mean(same)),
        kl=kl if beginning is None else None,
        beginning=beginning,
        same_tokens=same_tokens,
        base_commonest=base_share,
        commonest=share,
    )


def divergence(before: Samples, after: Samples) -> np.ndarray:
    """Return KL(before || after) in nats, of softmaxes over the log-likelihoods of choices, shape (n,).

    NaN without choices, and where the models were offered different numbers of them.
    """
    alike = (before.counts > 0) & (before.counts == after.counts)
    found = np.full(len(alike), np.nan)
    if alike.any():
        most = before.counts[alike].max()
        p, q = (
            special.log_softmax(each.likelihoods[alike, :most], axis=1)
            for each in (before, after)
        )
        with np.errstate(invalid="ignore"):
            found[alike] = np.where(p > -np.inf, np.exp(p) * (p - q), 0).sum(1)
    return found


def _beginning(before: str, after: str) -> float:
    one, other = before.split(), after.split()
    same = [*(a == b for a, b in zip(one, other, strict=False)), False].index(False)
    return same / len(one) if one else float(not other)
