"""Which answers a pruned model changed: counts by task and size, and a page that shows each.

Two models with one accuracy may give different answers (Dutta et al., "Accuracy is Not All
You Need", 2024, arXiv 2407.09141).
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

from lm_eval_pruned.report.page import Section, rendered, run_label
from lm_eval_pruned.results.documents import documents_of
from lm_eval_pruned.results.groups import primary_metrics
from lm_eval_pruned.util.tables import Column, Table


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.results.documents import Sample
    from lm_eval_pruned.results.files import Run

    #: Whether each document was answered rightly, and its sample, by what documents are matched by.
    _Answers = dict[tuple[str, str, int], tuple[bool, Sample]]

PAGE = "flips.html"
#: What can become of an answer; what changes a score comes first.
KINDS = (
    LOST := "right to wrong",
    GAINED := "wrong to right",
    "another wrong answer",
    "another right answer",
)


class Change(NamedTuple):
    """What became of one answer: one of `KINDS`, and what both models answered, as a reader sees it."""

    kind: str
    run: str
    task: str
    sample: Sample
    before: str
    after: str


class Counts(NamedTuple):
    """What became of all answers of a run to a task: a kind for each, as `_kind` says it."""

    run: str
    task: str
    metric: str
    kinds: list[str | None]

    @property
    def changed(self) -> float | None:
        """The share of other answers; None where the samples do not tell all of them."""
        if None in self.kinds:
            return None
        return sum(map(bool, self.kinds)) / len(self.kinds)


COUNTS = (
    Column("run", lambda row: row.run),
    Column("task", lambda row: row.task),
    Column("metric", lambda row: row.metric),
    Column("documents", lambda row: len(row.kinds), "d"),
    Column(LOST, lambda row: row.kinds.count(LOST), "d"),
    Column(GAINED, lambda row: row.kinds.count(GAINED), "d"),
    Column("another answer", lambda row: row.changed, ".0%"),
)


def changed_answers(
    title: str,
    base: Run,
    others: Sequence[Run],
    *,
    texts: bool = True,
) -> tuple[Section | None, str]:
    """Compare the answers of runs with those of the base, document by document.

    Returns the section, and the page `PAGE` that it links; None and no page where no task logged
    samples of answers that are right or wrong. Without `texts` the page names documents by number
    and hash alone. ResultsError if a file of samples cannot be read or is incomplete.
    """
    counts, not_counted, changes = find_changes(base, others)
    if not counts:
        return None, ""
    explanation = (
        "A pruned model as accurate as the unpruned one may answer other questions right "
        "(Dutta et al. 2024, Accuracy is Not All You Need, arXiv 2407.09141). The answer is the "
        "most likely choice, or the text after the task's filter; free texts nearly always differ "
        "somewhere. A dash means that the samples do not tell which answer was chosen."
    )
    none = "Without samples, or without a metric that counts single documents as right or wrong"
    heading = "Changed answers"
    section = Section(
        heading,
        [explanation],
        table=Table(heading, COUNTS, counts),
        notes=[f"{none}: {', '.join(not_counted)}."] if not_counted else [],
        links=[("All of them, one by one", PAGE)],
    )
    script = files(__package__).joinpath("changed_answers.js").read_text("utf-8")
    shown = {"title": f"Changed answers: {title}", "texts": texts, "changes": changes}
    return section, rendered("changed_answers.html", **shown, scripts=[script])


def find_changes(
    base: Run, others: Sequence[Run]
) -> tuple[list[Counts], list[str], list[Change]]:
    """Return counts by run and task, tasks without counts, and changes, those for the worse first."""
    counts: list[Counts] = []
    not_counted: list[str] = []
    changes: list[Change] = []
    for task in base.tasks(subtasks=False):
        metric, before = _counted(base, task)
        if not before:
            not_counted.append(task)
        for run in others:
            kinds, label = [], run_label(run)
            for key, now in _answers(run, task, metric).items():
                if (was := before.get(key)) is None:
                    continue
                pair = [sample.answer(metric) for _, sample in (was, now)]
                kinds.append(kind := _kind(was[0], now[0], pair))
                if kind:
                    texts = [_text(sample, metric) for _, sample in (was, now)]
                    changes.append(Change(kind, label, key[0], was[1], *texts))
            counts += [Counts(label, task, metric, kinds)] if kinds else []
    changes.sort(key=lambda change: KINDS.index(change.kind))
    return counts, not_counted, changes


def _counted(base: Run, task: str) -> tuple[str, _Answers]:
    """Return the first metric by which all answers are right or wrong, with them."""
    primary = primary_metrics([base])
    for key in sorted(base.scores, key=lambda key: key not in primary):
        # Of metrics to keep low, 1 is not right.
        wanted = key[0] == task and base.scores[key].higher_is_better is not False
        if wanted and (answers := _answers(base, *key)):
            return key[1], answers
    return "", {}


def _answers(run: Run, task: str, metric: str) -> _Answers:
    """Return answers by document; none where samples are missing or one is neither right nor wrong."""
    documents = documents_of(run, task, metric)
    if documents is None or not {*documents.values} <= {0.0, 1.0}:
        return {}
    rights = zip(documents.values.astype(bool), documents.samples, strict=True)
    return dict(zip(documents.keys, rights, strict=True))


def _kind(was_right: bool, is_right: bool, answers: Sequence[str | None]) -> str | None:
    """Return what became of an answer: empty if it is the same, None if samples do not tell."""
    if was_right != is_right:
        return LOST if was_right else GAINED
    if None in answers:
        return None
    return "" if answers[0] == answers[1] else KINDS[2 + is_right]


def _text(sample: Sample, metric: str) -> str:
    chosen = sample.answer(metric) or ""
    return "\n\nTaken from: ".join(filter(None, dict.fromkeys([chosen, sample.text])))
