"""How far two models answer alike, whether or not they are right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax

from lm_eval_pruned.results.documents import read_samples
from lm_eval_pruned.results.files import as_mapping


if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval_pruned.results.files import Run


@dataclass(frozen=True)
class Agreement:
    """How far two models answer alike on a task.

    Attributes:
        documents: How many both answered.
        equal: Share of them with the same answer.
        divergence: Mean KL divergence of the candidate's choices from the base's, in nats.
        beginning: Mean share of the base's text, in words, before the first difference.
    """

    documents: int
    equal: float
    divergence: float | None = None
    beginning: float | None = None


def agreement_on(base: Run, candidate: Run, task: str) -> Agreement | None:
    """Compare the logged answers of two runs on a task; None where one of them logged none."""
    if not all(task in run.samples for run in (base, candidate)):
        return None
    metric = next(metric for name, metric in base.scores if name == task)
    one, other = (
        dict(read_samples(r, task, metric, _answer)) for r in (base, candidate)
    )
    pairs = [(one[key], other[key]) for key in one if key in other]
    if pairs and all(isinstance(each, str) for pair in pairs for each in pair):
        equal = float(np.mean([a == b for a, b in pairs]))
        return Agreement(len(pairs), equal, None, float(np.mean([*map(_begun, pairs)])))
    chosen = [(a, b) for a, b in pairs if np.size(a) == np.size(b) > 1]
    if not chosen or len(chosen) < len(pairs):
        return None
    equal = float(np.mean([np.argmax(a) == np.argmax(b) for a, b in chosen]))
    logs = [(log_softmax(a), log_softmax(b)) for a, b in chosen]
    return Agreement(
        len(pairs),
        equal,
        float(np.mean([(np.exp(p) * (p - q)).sum() for p, q in logs])),
    )


def _answer(row: Mapping[str, Any]) -> Any:
    """Return the likelihoods of the choices in a line of samples, or the text, or None."""
    answers = [each[0] for each in row.get("resps") or () if each]
    if answers and all(isinstance(each, list) for each in answers):
        return [float(each[0]) for each in answers]
    # What a model is asked to write comes with how; a text that it reads does not.
    asked = as_mapping(as_mapping(row.get("arguments")).get("gen_args_0"))
    return (
        str(answers[0])
        if answers and "until" in as_mapping(asked.get("arg_1"))
        else None
    )


def _begun(pair: tuple[str, str]) -> float:
    one, other = (text.split() for text in pair)
    same = [a == b for a, b in zip(one, other, strict=False)]
    same += [False]
    return same.index(False) / len(one) if one else float(not other)
