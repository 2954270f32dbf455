"""Which documents a pruned model answers otherwise than the unpruned one.

Two models with one accuracy may give different answers: as many may turn from right to
wrong as from wrong to right.

Source:
    Dutta et al., "Accuracy is Not All You Need", 2024, arXiv 2407.09141.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.documents import (
    Answer,
    Question,
    read_answer,
    read_question,
    read_samples,
)
from lm_eval_pruned.results.groups import primary_metrics


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.results.files import Run

    Answers = dict[tuple[str, str, int], tuple[Answer, Question | None]]

#: What can become of an answer, the kinds that change a score first.
KINDS = (
    "right to wrong",
    "wrong to right",
    "another wrong answer",
    "another right answer",
)


@dataclass(frozen=True)
class Flips:
    """How many documents of one task a run answers otherwise than the base.

    Attributes:
        run: Name of the run.
        expansion_ratio: Its expansion ratio, or None.
        task: Task or group.
        metric: Metric with filter that says what is right.
        documents: Documents that both answered.
        right_to_wrong: Those that the base alone answered right.
        wrong_to_right: Those that the run alone answered right.
        changed: Those with another answer, right or wrong; None where the samples do
            not tell which answer was chosen.
    """

    run: str
    expansion_ratio: float | None
    task: str
    metric: str
    documents: int
    right_to_wrong: int
    wrong_to_right: int
    changed: int | None

    @property
    def flipped_share(self) -> float:
        """Share of documents that turned right or wrong, which Dutta et al. call flips."""
        return (self.right_to_wrong + self.wrong_to_right) / self.documents

    @property
    def changed_share(self) -> float | None:
        """Share of documents with another answer, or None."""
        return None if self.changed is None else self.changed / self.documents


@dataclass(frozen=True)
class Changed:
    """One document that a run answered otherwise than the base.

    Attributes:
        run: Name of the run.
        task: Task or group, as in `Flips`.
        leaf: The task of a group that the document belongs to; else `task`.
        kind: One of `KINDS`.
        question: The document.
        before: Answer of the base.
        after: Answer of the run.
    """

    run: str
    task: str
    leaf: str
    kind: str
    question: Question
    before: Answer
    after: Answer


@dataclass(frozen=True)
class FlipCounts:
    """All flips of a sweep.

    Attributes:
        rows: Task by task, runs in the order given.
        changed: The documents behind them.
        not_counted: Tasks whose documents are neither right nor wrong.
        not_logged: Tasks without samples.
    """

    rows: tuple[Flips, ...]
    changed: tuple[Changed, ...]
    not_counted: tuple[str, ...]
    not_logged: tuple[str, ...]


class _NeitherRightNorWrong(Exception):
    pass


def find_flips(base: Run, others: Sequence[Run]) -> FlipCounts:
    """Compare the answers of runs with those of the base, document by document.

    The metric is the task's primary one where it counts each document as right or wrong,
    else the first of its metrics that does.

    Args:
        base: The unpruned model.
        others: Runs of the same sweep; a task that one of them lacks is left out of it.

    Raises:
        ResultsError: A file of samples cannot be read or is incomplete.
    """
    rows: list[Flips] = []
    changed: list[Changed] = []
    not_counted, not_logged = [], []
    for task, metrics in _metrics(base).items():
        if any(leaf not in base.samples for leaf in base.leaves(task)):
            not_logged.append(task)
            continue
        metric, before = _first_counted(base, task, metrics)
        if not before:
            not_counted.append(task)
            continue
        for run in others:
            after = _answers(run, task, metric, questions=False)
            both = [key for key in before if key in (after or {})]
            if not after or not both:
                continue
            here = [
                found
                for key in both
                if (found := _changed(run, task, key, before[key], after[key]))
            ]
            changed += here
            kinds = [each.kind for each in here]
            told = all(
                before[key][0].chosen is not None and after[key][0].chosen is not None
                for key in both
                if before[key][0].right == after[key][0].right
            )
            rows.append(
                Flips(
                    run=run.name,
                    expansion_ratio=run.expansion_ratio,
                    task=task,
                    metric=metric,
                    documents=len(both),
                    right_to_wrong=kinds.count(KINDS[0]),
                    wrong_to_right=kinds.count(KINDS[1]),
                    changed=len(here) if told else None,
                )
            )
    return FlipCounts(
        tuple(rows), tuple(changed), tuple(not_counted), tuple(not_logged)
    )


def _metrics(base: Run) -> dict[str, list[str]]:
    """Return the metrics of each task, the primary one first, without those to keep low."""
    primary = dict(primary_metrics([base]))
    shown = base.tasks(subtasks=False)
    metrics: dict[str, list[str]] = {task: [] for task in shown}
    for (task, metric), score in base.scores.items():
        if task in metrics and score.higher_is_better is not False:
            metrics[task].append(metric)
    for task, found in metrics.items():
        found.sort(key=lambda metric: metric != primary.get(task))
    return metrics


def _first_counted(base: Run, task: str, metrics: Sequence[str]) -> tuple[str, Answers]:
    for metric in metrics:
        if answers := _answers(base, task, metric, questions=True):
            return metric, answers
    return "", {}


def _answers(run: Run, task: str, metric: str, *, questions: bool) -> Answers | None:
    """Return the answers of a run by document; None where there is nothing to count."""
    if (task, metric) not in run.scores:
        return None
    name = metric.rpartition(",")[0]

    def take(row: Mapping[str, Any]) -> tuple[Answer, Question | None]:
        answer = read_answer(row, name)
        if answer is None:
            raise _NeitherRightNorWrong
        return answer, read_question(row) if questions else None

    answers: Answers = {}
    for leaf in run.leaves(task):
        if leaf not in run.samples:
            return None
        try:
            found = read_samples(run, leaf, metric, take)
        except _NeitherRightNorWrong:
            return None
        answers.update(((leaf, *key), taken) for key, taken in found)
    return answers


def _changed(
    run: Run,
    task: str,
    key: tuple[str, str, int],
    before: tuple[Answer, Question | None],
    after: tuple[Answer, Question | None],
) -> Changed | None:
    one, question = before
    other = after[0]
    assert question is not None
    if one.right != other.right:
        kind = KINDS[0] if one.right else KINDS[1]
    elif None in (one.chosen, other.chosen) or one.chosen == other.chosen:
        return None
    else:
        kind = KINDS[3] if one.right else KINDS[2]
    return Changed(run.name, task, key[0], kind, question, one, other)
