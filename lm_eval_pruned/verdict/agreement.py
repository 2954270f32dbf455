"""How far two models answer alike, whether or not they are right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import log_softmax

from lm_eval_pruned.results.documents import read_samples
from lm_eval_pruned.results.files import as_mapping


if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval_pruned.results.files import Run


class Agreement(NamedTuple):
    """Of `documents`, the share with `equal` answers.

    `divergence` is the mean KL of the candidate's choices from the base's, in nats; `beginning` the
    mean share of the base's text, in words, before the first difference.
    """

    documents: int
    equal: float
    divergence: float | None
    beginning: float | None


def agreement_on(base: Run, candidate: Run, task: str) -> Agreement | None:
    """Compare the logged answers of two runs on a task; None where samples do not tell."""
    if not all(task in run.samples for run in (base, candidate)):
        return None
    metric = next(name for of, name in base.scores if of == task)
    both = [dict(read_samples(r, task, metric, _answer)) for r in (base, candidate)]
    pairs = [(both[0][key], both[1][key]) for key in both[0] if key in both[1]]
    if pairs and all(isinstance(each, str) for pair in pairs for each in pair):
        equal = float(np.mean([one == other for one, other in pairs]))
        return Agreement(len(pairs), equal, None, float(np.mean([*map(_begun, pairs)])))
    if not pairs or not all(np.size(a) == np.size(b) > 1 for a, b in pairs):
        return None
    logs = [(log_softmax(one), log_softmax(other)) for one, other in pairs]
    equal = float(np.mean([one.argmax() == other.argmax() for one, other in logs]))
    divergence = float(np.mean([np.exp(p) @ (p - q) for p, q in logs]))
    return Agreement(len(pairs), equal, divergence, None)


def _answer(row: Mapping[str, Any]) -> Any:
    """Return the likelihoods of the choices in a line of samples, or the text, or None."""
    answers = [each[0] for each in row.get("resps") or () if each]
    if answers and all(isinstance(each, list) for each in answers):
        return [float(each[0]) for each in answers]
    asked = as_mapping(as_mapping(row.get("arguments")).get("gen_args_0"))
    # A model that writes is told when to stop; one that reads is not.
    return str(answers[0]) if answers and as_mapping(asked.get("arg_1")) else None


def _begun(pair: tuple[str, str]) -> float:
    one, other = (text.split() for text in pair)
    same = [*(a == b for a, b in zip(one, other, strict=False)), False].index(False)
    return same / len(one) if one else float(not other)
