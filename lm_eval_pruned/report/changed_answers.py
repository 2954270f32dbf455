"""Which answers a pruned model changed: counts by task and size, and a page that shows each.

Two models with one accuracy may give different answers (Dutta et al., "Accuracy is Not All
You Need", 2024, arXiv 2407.09141).
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lm_eval_pruned.report.page import Section, rendered, run_label
from lm_eval_pruned.results.groups import primary_metrics
from lm_eval_pruned.util.tables import Column, Table


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.compare.judge import Difference
    from lm_eval_pruned.compare.pairing import Pair
    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.results.samples import Question

PAGE, ALL = "flips.html", "flips.jsonl"
#: Rows of the page, and characters of an answer on it.
ROWS, CHARACTERS = 1000, 500
#: Characters of a prompt, of which the end is shown.
END = 2000
#: What can become of an answer; what changes a score comes first.
KINDS = (
    LOST := "right to wrong",
    GAINED := "wrong to right",
    "another wrong answer",
    "another right answer",
)
#: Between an answer and the text that the task's filter took it from.
_LONGER = "\n\nTaken from: "


class Change(NamedTuple):
    """What became of one answer: one of `KINDS`, and what both models answered, as a reader sees it."""

    kind: str
    run: Run
    task: str
    question: Question
    before: str
    after: str

    def record(self, *, texts: bool) -> dict[str, Any]:
        """Return the change as a line of the file `ALL`, with `texts` or without."""
        asked = self.question
        named = {
            "change": self.kind,
            "run": self.run.name,
            "task": self.task,
            "doc_id": asked.number,
            "doc_hash": asked.key[1],
        }
        said = {
            "prompt": asked.prompt[-END:],
            "choices": asked.texts,
            "target": asked.target,
            "before": self.before,
            "after": self.after,
        }
        return named | said if texts else named


class Counts(NamedTuple):
    """What became of all answers of a run to a task: a kind for each, as `_kind` says it."""

    run: Run
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
    Column("run", lambda row: run_label(row.run)),
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
    rows: Sequence[Difference],
    *,
    texts: bool = True,
) -> tuple[Section | None, dict[str, str]]:
    """Say which answers differ from those of the base, document by document; `rows` are of `compare`.

    Returns the section, and the files that it links, by name: the page `PAGE` with the first `ROWS` of
    them, and `ALL`; None and no files where no task logged samples of answers that are right or wrong.
    Without `texts` both name documents by number and hash alone.
    """
    counts, not_counted, changes = find_changes(base, rows)
    if not counts:
        return None, {}
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
        links=[("One by one", PAGE), ("All of them as JSON Lines", ALL)],
    )
    script = files(__package__).joinpath("changed_answers.js").read_text("utf-8")
    shown: dict[str, Any] = {"title": f"Changed answers: {title}", "texts": texts}
    shown |= {"label": run_label, "scripts": [script]}
    shown |= {"count": len(changes), "changes": changes[:ROWS], "all": ALL}
    shown |= {"characters": CHARACTERS, "end": END}
    lines = (json.dumps(change.record(texts=texts)) + "\n" for change in changes)
    return section, {
        PAGE: rendered("changed_answers.html", **shown),
        ALL: "".join(lines),
    }


def find_changes(
    base: Run, rows: Sequence[Difference]
) -> tuple[list[Counts], list[str], list[Change]]:
    """Return counts by task and run, tasks without counts, and changes, those for the worse first.

    Of the `rows` of a task, those of the first metric count by which all answers are right or wrong.
    """
    counts: list[Counts] = []
    not_counted: list[str] = []
    changes: list[Change] = []
    primary = primary_metrics([base])
    ordered = sorted(rows, key=lambda row: row.case.key not in primary)
    for task in dict.fromkeys(row.task for row in rows):
        counted = [row for row in ordered if row.task == task and _is_counted(row)]
        if not counted:
            not_counted.append(task)
        for row in counted:
            pair, metric = row.case.pair, row.metric
            if pair is None or metric != counted[0].metric:
                continue
            run, samples = row.case.run, pair[0].samples
            asked = samples.questions if samples else ()
            answers = [documents.answers(metric) for documents in pair]
            rights = ((documents.values == 1).tolist() for documents in pair)
            kinds = [*map(_kind, *rights, zip(*answers, strict=True))]
            for n in [n for n, kind in enumerate(kinds) if kind]:
                texts = [
                    _LONGER.join(filter(None, dict.fromkeys([said[n], text])))
                    for said, text in zip(answers, _texts(pair, n), strict=True)
                ]
                leaf = pair[0].keys[n][0]
                changes.append(Change(kinds[n] or "", run, leaf, asked[n], *texts))
            counts.append(Counts(run, task, metric, kinds))
    changes.sort(key=lambda change: KINDS.index(change.kind))
    return counts, not_counted, changes


def _texts(pair: Pair, n: int) -> list[str]:
    """Return what each model wrote about a document, before the task's filter."""
    lines = (documents.samples for documents in pair)
    return [each.texts[n] if each and each.texts else "" for each in lines]


def _is_counted(row: Difference) -> bool:
    """Whether samples tell all answers of both models, and each is right or wrong."""
    # Of metrics to keep low, 1 is not right.
    if row.case.pair is None or row.case.scores[0].higher_is_better is False:
        return False
    return all(np.isin(each.values, (0.0, 1.0)).all() for each in row.case.pair)


def _kind(was_right: bool, is_right: bool, answers: Sequence[str | None]) -> str | None:
    """Return what became of an answer: empty if it is the same, None if samples do not tell."""
    if was_right != is_right:
        return LOST if was_right else GAINED
    if None in answers:
        return None
    return "" if answers[0] == answers[1] else KINDS[2 + is_right]
