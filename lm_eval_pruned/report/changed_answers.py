"""Which answers a pruned model changed: counts by task and size, and a page that shows each.

Two models with one accuracy may give different answers (Dutta et al., "Accuracy is Not All
You Need", 2024, arXiv 2407.09141).
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from lm_eval_pruned.report.page import Section, Table, rendered, run_label
from lm_eval_pruned.results.documents import (
    Answer,
    Question,
    read_answer,
    read_question,
    read_samples,
)
from lm_eval_pruned.results.groups import primary_metrics


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.results.files import Run

    _Answers = dict[tuple[str, tuple[str, int]], tuple[Answer, Question]]

PAGE = "flips.html"
#: What can become of an answer; what changes a score comes first.
KINDS = (
    LOST := "right to wrong",
    GAINED := "wrong to right",
    STILL_WRONG := "another wrong answer",
    STILL_RIGHT := "another right answer",
)


def changed_answers(
    title: str, base: Run, others: Sequence[Run], *, texts: bool = True
) -> tuple[Section | None, str]:
    """Compare the answers of runs with those of the base, document by document.

    Returns:
        The section, and the page `PAGE` that it links; None and no page where no task logged
        samples of answers that are right or wrong. Without `texts` the page names documents by
        number and hash alone.

    Raises:
        ResultsError: A file of samples cannot be read or is incomplete.
    """
    rows, not_counted = [], []
    changes: list[tuple[str, str, str, Answer, Question, Answer]] = []
    for task in base.tasks(subtasks=False):
        metric, before = _counted(base, task)
        if not before:
            not_counted.append(task)
        for run in others:
            after = _answers(run, task, metric)
            both = [key for key in before if key in after]
            kinds = {key: _kind(before[key][0], after[key][0]) for key in both}
            found, label = [*kinds.values()], run_label(run)
            if found:
                counts = len(found), found.count(LOST), found.count(GAINED)
                share = sum(map(bool, found)) / len(found)
                another = "-" if None in found else f"{share:.0%}"
                rows.append([label, task, metric, *map(str, counts), another])
            changes += [
                (kind, label, key[0], *before[key], after[key][0])
                for key, kind in kinds.items()
                if kind
            ]
    if not rows:
        return None, ""
    changes.sort(key=lambda change: KINDS.index(change[0]))
    explanation = (
        "A pruned model with the accuracy of the unpruned one may answer other questions right "
        "(Dutta et al. 2024, Accuracy is Not All You Need, arXiv 2407.09141). The answer is the "
        "most likely choice, or the text after the task's filter; free texts nearly always differ "
        "in something. A - stands where the samples do not tell which answer was chosen."
    )
    columns = ["run", "task", "metric", "documents", LOST, GAINED, "another answer"]
    none = "Without samples, or without a metric that counts single documents as right or wrong"
    section = Section(
        "Changed answers",
        [explanation],
        table=Table("Changed answers", columns, rows, text=3),
        notes=[f"{none}: {', '.join(not_counted)}."] if not_counted else [],
        links=[("All of them, one by one", PAGE)],
    )
    page = rendered(
        "changed_answers.html",
        title=f"Changed answers: {title}",
        texts=texts,
        changes=changes,
        written=_written,
        scripts=[files(__package__).joinpath("changed_answers.js").read_text("utf-8")],
    )
    return section, page


def _counted(base: Run, task: str) -> tuple[str, _Answers]:
    """Return the first metric by which all answers are right or wrong, with them."""
    primary = primary_metrics([base])
    for key in sorted(base.scores, key=lambda key: key not in primary):
        # Of metrics to keep low, 1 is not right.
        wanted = key[0] == task and base.scores[key].higher_is_better is not False
        if wanted and (found := _answers(base, *key)):
            return key[1], found
    return "", {}


def _answers(run: Run, task: str, metric: str) -> _Answers:
    """Return answers by document; none where samples are missing or one is neither right nor wrong."""
    leaves, name = run.leaves(task), metric.rpartition(",")[0]
    if (task, metric) not in run.scores or not run.samples.keys() >= {*leaves}:
        return {}
    found: _Answers = {}
    for leaf in leaves:
        for key, (answer, question) in read_samples(
            run, leaf, metric, lambda row: (read_answer(row, name), read_question(row))
        ):
            if answer is None:
                return {}
            found[leaf, key] = answer, question
    return found


def _kind(before: Answer, after: Answer) -> str | None:
    """Return what became of an answer: empty if it is the same, None if samples do not tell."""
    if before.right != after.right:
        return LOST if before.right else GAINED
    if before.chosen is None or after.chosen is None:
        return None
    if before.chosen == after.chosen:
        return ""
    return STILL_RIGHT if before.right else STILL_WRONG


def _written(answer: Answer, question: Question) -> str:
    chosen = answer.chosen or ""
    if question.choices and chosen:
        return question.choices[int(chosen)].strip()
    if chosen and answer.text not in ("", chosen):
        return f"{chosen}\n\nTaken from: {answer.text}"
    return chosen or answer.text
