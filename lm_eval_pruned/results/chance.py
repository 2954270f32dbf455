"""Levels that need no knowledge: of guessing, and of always giving the commonest answer.

Both come from the logged samples of multiple choice: how many choices a document has, and
which of them is right. What has no choices, such as generated text, has no such level.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.files import as_mapping


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Choices:
    """What one document offers.

    Attributes:
        chance: Score of a model that finds all choices equally likely.
        options: The choices, in order.
        right: Which of them is right; None where that is not one.
    """

    chance: float
    options: tuple[str, ...]
    right: int | None


@dataclass(frozen=True)
class Levels:
    """Levels of one score.

    Attributes:
        chance: Score of a model that finds all choices equally likely, or None.
        majority: Score of always giving the commonest answer; None where documents offer
            different choices, so that there is no such answer.
    """

    chance: float | None = None
    majority: float | None = None


def choices_of(row: Mapping[str, Any], metric: str) -> Choices | None:
    """Return what a line of the harness's samples says of its choices.

    Args:
        row: The line.
        metric: Metric without filter, such as ``acc_norm``.

    Returns:
        None where the document is no multiple choice, or the metric no share of right answers.
    """
    if not metric.startswith("acc"):
        return None
    requests = list(as_mapping(row.get("arguments")).values())
    # Asked once more without the question, for the metric that takes this away.
    if "acc_mutual_info" in row:
        requests = requests[: len(requests) // 2]
    asked_for = [as_mapping(request).get("arg_1") for request in requests]
    options = tuple(option for option in asked_for if isinstance(option, str))
    if len(options) < 2 or len(options) < len(asked_for):
        return None
    # The score of MC2 is the share of probability on true answers, which can be several.
    targets = as_mapping(as_mapping(row.get("doc")).get("mc2_targets"))
    labels, choices = targets.get("labels"), targets.get("choices")
    if isinstance(labels, list) and isinstance(choices, list):
        asked = [option.strip() for option in options]
        if (
            len(labels) == len(asked)
            and [str(each).strip() for each in choices] == asked
        ):
            return Choices(sum(map(bool, labels)) / len(labels), options, None)
    return Choices(1 / len(options), options, _right(row.get("target"), options))


def levels_of(documents: Sequence[Choices | None], weights: Sequence[float]) -> Levels:
    """Return the levels of a score from those of its documents.

    Args:
        documents: What each document offers.
        weights: What each counts for in the score.
    """
    known = [each for each in documents if each is not None]
    total = sum(weights)
    if len(known) < len(documents) or not total:
        return Levels()
    pairs = list(zip(known, weights, strict=True))
    chance = sum(each.chance * weight for each, weight in pairs) / total
    rights = [each.right for each in known]
    # The same choice in words may be the right one in every other context.
    if len({each.options for each in known}) > 1 or None in rights:
        return Levels(chance)
    shares: dict[int | None, float] = defaultdict(float)
    for each, weight in pairs:
        shares[each.right] += weight / total
    return Levels(chance, max(shares.values()))


def _right(target: Any, options: Sequence[str]) -> int | None:
    text = str(target).strip()
    if text.isdecimal():
        return int(text) if int(text) < len(options) else None
    named = [number for number, option in enumerate(options) if option.strip() == text]
    return named[0] if len(named) == 1 else None
