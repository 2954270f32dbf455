"""Two mechanical explanations of scores that pruning leaves or raises, as tests.

MC2 of TruthfulQA may rise because a pruned model finds all answers more nearly equally likely,
and IFEval may hold because a pruned model says less. Both are tested on logged samples of an
unpruned and of a pruned model, question by question.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.results.documents import read_question, read_samples
from lm_eval_pruned.tasks.demo.utils import repeatable_language_detection


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike

    from lm_eval_pruned.compare.statistics import PairedTest
    from lm_eval_pruned.results.files import Run

MC2 = "truthfulqa_mc2", "acc,none"
IFEVAL = "ifeval", "inst_level_strict_acc,none"


@dataclass(frozen=True)
class Drift:
    """What of a change of MC2 is a move toward the level of equally likely answers.

    Attributes:
        questions: Number of questions.
        level: Mean level.
        base: Mean score of the unpruned model.
        run: Mean score of the pruned model.
        distance_base: Mean of abs(score - level) over questions, unpruned.
        distance_run: The same, pruned.
        shrinks: Paired test of the two distances; below 0 where scores come closer.
        moved: Share of the way to its level that a question goes on average: the slope.
        explained: Part of the mean change that this share makes.
        rest: The other part: the change of a question that is at its level already.
        rest_low: Lower end of its 95 % interval.
        rest_high: Upper end.
        rest_p: p of "the rest is nothing".
    """

    questions: int
    level: float
    base: float
    run: float
    distance_base: float
    distance_run: float
    shrinks: PairedTest
    moved: float
    explained: float
    rest: float
    rest_low: float
    rest_high: float
    rest_p: float


def drift(base: ArrayLike, run: ArrayLike, level: ArrayLike) -> Drift:
    """Test whether scores of MC2 drift to a level, such as that of equally likely answers.

    A model that finds all answers of a question equally likely scores the share of them that is
    true. The change of each question is regressed on its way to that level,
    ``run - base = rest + moved * (level - base)``, so that the mean change is the sum of what the
    move explains and of the rest. A share that moved says no more than that scores of the unpruned
    model are forgotten; only a distance that shrinks says that answers become equally likely.

    Args:
        base: Scores of the unpruned model, shape (n,), n >= 3.
        run: Scores of the pruned model on the same questions.
        level: Of each question, such as true answers / all answers.

    Raises:
        ValueError: All questions are equally far from their levels, so that there is no slope.
    """
    base, run, level = (np.asarray(each, dtype=float) for each in (base, run, level))
    way, change = level - base, run - base
    if np.ptp(way) == 0:
        raise ValueError(
            f"level - base is {way[0]:g} for all questions: give questions that differ in it."
        )
    shrinks = statistics.paired_difference(np.abs(base - level), np.abs(run - level))
    # Least squares over questions whose spread around the line need not be equal.
    design = np.stack([np.ones_like(way), way], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    rest, moved = inverse @ design.T @ change
    residuals = change - design @ [rest, moved]
    count = len(way)
    scores = design * residuals[:, None]
    covariance = count / (count - 2) * inverse @ (scores.T @ scores) @ inverse
    error = float(np.sqrt(covariance[0, 0]))
    width = float(stats.t.ppf(0.975, count - 2)) * error
    p = 2 * float(stats.t.sf(abs(rest) / error, count - 2)) if error else 1.0
    return Drift(
        questions=count,
        level=float(level.mean()),
        base=float(base.mean()),
        run=float(run.mean()),
        distance_base=float(np.abs(base - level).mean()),
        distance_run=float(np.abs(run - level).mean()),
        shrinks=shrinks,
        moved=float(moved),
        explained=float(moved * way.mean()),
        rest=float(rest),
        rest_low=float(rest - width),
        rest_high=float(rest + width),
        rest_p=p,
    )


#: Levels to which a score of MC2 may drift: the share of answers that is true, and that of the
#: shortest answers alone. Likelihoods of MC2 are of whole answers, so if every word gets less likely,
#: long answers lose most.
LIKELIHOOD, LENGTH = MC2_LEVELS = ("equally likely answers", "the shortest answer")


def drifts_of(base: Run, run: Run) -> dict[str, Drift]:
    """Test two runs that logged samples of ``truthfulqa_mc2``.

    Returns:
        By level of `MC2_LEVELS`; empty where a run has no such samples, or other questions.
    """
    before, after = (_by_document(each, MC2, _mc2_of) for each in (base, run))
    if not before or before.keys() != after.keys() or None in before.values():
        return {}
    pairs = [(before[key], after[key]) for key in before]
    scores = [[pair[side][0] for pair in pairs] for side in (0, 1)]
    levels = [[one[number] for one, _ in pairs] for number in (1, 2)]
    return {
        name: drift(*scores, level)
        for name, level in zip(MC2_LEVELS, levels, strict=True)
    }


def _mc2_of(row: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """Return score and levels of one line of samples."""
    question = read_question(row)
    labels = row["doc"]["mc2_targets"]["labels"]
    if question.chance is None or len(question.choices) != len(labels):
        return None
    lengths = [len(choice) for choice in question.choices]
    of_shortest = [
        bool(label)
        for label, length in zip(labels, lengths, strict=True)
        if length == min(lengths)
    ]
    return float(row["acc"]), question.chance, sum(of_shortest) / len(of_shortest)


#: Instructions that an answer which satisfies them goes on to satisfy if its end is cut away, with the
#: argument that must say "less than", if there is one. A fixed list, and none that is found by
#: cutting the answers under test: that would choose by the outcome. All in capitals or in small letters is
#: not among them, since its check detects the language too, which a cut can turn.
NEED_NO_LENGTH: dict[str, str | None] = {
    "punctuation:no_comma": None,
    "keywords:forbidden_words": None,
    "keywords:frequency": "relation",
    "keywords:letter_frequency": "let_relation",
    "length_constraints:number_words": "relation",
    "length_constraints:number_sentences": "relation",
    "change_case:capital_word_frequency": "capital_relation",
}
PARTS = ("all", "shorter is enough", "others")


def shorter_is_enough(instruction: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether an answer that satisfies an instruction still does when its end is cut away.

    Example:
        >>> shorter_is_enough("length_constraints:number_words", {"relation": "less than"})
        True
    """
    if instruction not in NEED_NO_LENGTH:
        return False
    relation = NEED_NO_LENGTH[instruction]
    return relation is None or arguments.get(relation) == "less than"


def cut_to(text: str, words: int) -> str:
    """Return the beginning of a text, so many words long; the whole text where it has no more.

    Example:
        >>> cut_to("one,  two three", 2)
        'one,  two'
    """
    ends = [found.end() for found in re.finditer(r"\S+", text)]
    return text if words >= len(ends) else text[: ends[words - 1]] if words else ""


@dataclass(frozen=True)
class LengthSplit:
    """What of a change of IFEval the length of answers explains, over some instructions.

    Attributes:
        part: One of `PARTS`.
        instructions: How many instructions.
        prompts: In how many prompts.
        words_base: Mean words of an answer of the unpruned model.
        words_run: Of the pruned model.
        base: Share of instructions that the unpruned model follows.
        cut: That its answers follow when each is cut to the length of the pruned model's.
        run: Share that the pruned model follows.
        total: Paired test of `run` against `base`.
        by_length: Paired test of `cut` against `base`.
        rest: Paired test of `run` against `cut`.
    """

    part: str
    instructions: int
    prompts: int
    words_base: float
    words_run: float
    base: float
    cut: float
    run: float
    total: PairedTest
    by_length: PairedTest
    rest: PairedTest


@dataclass(frozen=True)
class Answer:
    """One answer: the harness's document, its text, and which instructions it follows."""

    doc: Mapping[str, Any]
    text: str
    followed: tuple[bool, ...]

    @property
    def words(self) -> int:
        """How many words the answer has."""
        return len(self.text.split())


def split_by_length(
    base: Sequence[Answer], run: Sequence[Answer]
) -> dict[str, LengthSplit]:
    """Split a change of IFEval into what shorter answers explain, and the rest.

    Each answer of the unpruned model is cut to as many words as the pruned model's has, and scored
    again by the harness. Where the pruned model says more, nothing is cut: a longer answer cannot be
    made up, and its effect is in the rest.

    Args:
        base: Answers of the unpruned model.
        run: Answers of the pruned model to the same prompts, in the same order.

    Returns:
        By part, without parts that have no instruction.
    """
    cut = [
        one.followed
        if other.words >= one.words
        else followed(one.doc, cut_to(one.text, other.words))
        for one, other in zip(base, run, strict=True)
    ]
    kinds = [
        [
            shorter_is_enough(name, arguments or {})
            for name, arguments in zip(
                one.doc["instruction_id_list"], one.doc["kwargs"], strict=True
            )
        ]
        for one in base
    ]
    words = [float(np.mean([each.words for each in side])) for side in (base, run)]
    splits = {}
    for part in PARTS:
        taken = [
            [part == "all" or kind == (part == PARTS[1]) for kind in row]
            for row in kinds
        ]
        weights = np.array([sum(row) for row in taken], dtype=float)
        used = weights > 0
        if not used.any():
            continue
        sides = [[a.followed for a in base], cut, [a.followed for a in run]]
        weights = weights[used]
        shares = [
            np.array(
                [
                    np.sum(np.logical_and(*each))
                    for each in zip(side, taken, strict=True)
                ]
            )[used]
            / weights
            for side in sides
        ]
        before, between, after = (np.average(each, weights=weights) for each in shares)
        tests = [
            statistics.paired_difference(shares[one], shares[other], weights=weights)
            for one, other in ((0, 2), (0, 1), (1, 2))
        ]
        splits[part] = LengthSplit(
            *(part, int(weights.sum()), int(used.sum()), *words),
            *(float(before), float(between), float(after), *tests),
        )
    return splits


def split_of(base: Run, run: Run) -> dict[str, LengthSplit]:
    """Split the change of two runs that logged samples of ``ifeval``; empty where they have none."""

    def take(row: Mapping[str, Any]) -> Answer:
        verdicts = row["inst_level_strict_acc"]
        return Answer(row["doc"], str(row["filtered_resps"][0]), tuple(verdicts))

    before, after = (_by_document(each, IFEVAL, take) for each in (base, run))
    if not before or before.keys() != after.keys():
        return {}
    return split_by_length(list(before.values()), [after[key] for key in before])


def followed(doc: Mapping[str, Any], text: str) -> tuple[bool, ...]:
    """Return which instructions of a document of IFEval a text follows, by the harness's strict rule.

    Needs NLTK's ``punkt_tab``, as the harness's task does.
    """
    from lm_eval.tasks.ifeval import utils

    example = utils.InputExample(
        *(doc["key"], doc["instruction_id_list"], doc["prompt"], doc["kwargs"])
    )
    state = random.getstate()
    # Where a prompt asks for a letter that is none, such as "!", the harness draws one.
    random.seed(0)
    try:
        with repeatable_language_detection():
            output = utils.test_instruction_following_strict(example, text)
    finally:
        random.setstate(state)
    return tuple(output.follow_instruction_list)


def _by_document(run: Run, key: tuple[str, str], take: Any) -> dict[Any, Any]:
    task, metric = key
    if task not in run.samples or key not in run.scores:
        return {}
    return dict(read_samples(run, task, metric, take))
