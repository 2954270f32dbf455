"""Samples in columns: how a model was asked about documents, and what it answered."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import special


if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, eq=False)
class Question:
    """How a model was asked about a document. Runs that were asked alike share one.

    `key` is what documents are matched by: the task, the harness's ``doc_hash``, and 0 for the first
    repetition; `number` is its ``doc_id``. Documents of one `cluster` ask about the same text. `choices` is
    empty where the model wrote freely, `right` the index of the one right choice, and `target` the text of
    the right choice, of IFEval the names of the instructions. `rivals` are indices of MC1's choices where
    the document has more of them. `level` is empty where the task declares none. Of `endings` continuations
    log-likelihoods were asked for, 0 where the model wrote.
    """

    key: tuple[str, str, int]
    number: str
    cluster: str
    prompt: str
    target: str
    choices: tuple[str, ...]
    right: int | None
    chance: float | None
    rivals: tuple[int, ...]
    level: str
    endings: int

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The choices as answers."""
        return tuple(choice.strip() for choice in self.choices)

    @cached_property
    def letters(self) -> tuple[int, ...]:
        """What the harness divides by: the letters of the choices without the space in front, at least 1."""
        return tuple(len(choice.removeprefix(" ")) or 1 for choice in self.choices)

    @cached_property
    def bytes(self) -> tuple[int, ...]:
        """The same in bytes."""
        texts = (choice.removeprefix(" ") for choice in self.choices)
        return tuple(len(text.encode()) or 1 for text in texts)


class Sample(NamedTuple):
    """One line of samples: what was asked, and what the model answered.

    The answer is in the `likelihoods` of the choices, natural logarithms, or is what the model wrote:
    `written` after the task's filter, `text` before, and its `tokens` where a verdict had it written. None
    or empty where the line does not tell.
    """

    question: Question
    likelihoods: tuple[float, ...] = ()
    written: str | None = None
    text: str = ""
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Samples:
    """The lines of n documents, in columns; see `Sample`.

    Attributes:
        questions: Length n.
        likelihoods: Shape (n, most choices), float64; -inf where a document has fewer.
        counts: How many of them a document has, shape (n,).
        written, texts, tokens: Length n, or empty where no line has any.
    """

    questions: tuple[Question, ...]
    likelihoods: np.ndarray
    counts: np.ndarray
    written: tuple[str | None, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        questions: Sequence[Question],
        likelihoods: Sequence[Sequence[float]],
        written: Sequence[str | None],
        texts: Sequence[str],
        tokens: Sequence[tuple[int, ...]],
    ) -> Samples:
        """Return n >= 1 lines from the columns of `Sample`."""
        counts = np.fromiter(map(len, likelihoods), int, len(likelihoods))
        present = np.arange(counts.max()) < counts[:, None]
        table = np.full(present.shape, -np.inf)
        table[present] = [*itertools.chain.from_iterable(likelihoods)]
        return cls(
            tuple(questions),
            table,
            counts,
            () if {*written} == {None} else tuple(written),
            tuple(texts) if any(texts) else (),
            tuple(tokens) if any(tokens) else (),
        )

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """Return the lines of several tasks."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(part._columns() for part in parts), strict=True)
        return cls.of(*([*itertools.chain(*column)] for column in columns))

    def _columns(self) -> tuple[Sequence[Any], ...]:
        rows = zip(self.likelihoods.tolist(), self.counts.tolist(), strict=True)
        n = len(self.questions)
        return (
            self.questions,
            [row[:count] for row, count in rows],
            self.written or [None] * n,
            self.texts or [""] * n,
            self.tokens or [()] * n,
        )

    def taken(self, order: Sequence[int]) -> Samples:
        """Return the lines with these indices."""
        lines = (self.questions, self.written, self.texts, self.tokens)
        questions, *others = (tuple(c[n] for n in order) if c else () for c in lines)
        table, counts = self.likelihoods[[*order]], self.counts[[*order]]
        return Samples(questions, table, counts, *others)  # type: ignore[arg-type]

    def choice_probs(self) -> list[float | None]:
        """Return the probability of the right choice among all choices; None where there is not one."""
        rights = [question.right for question in self.questions]
        if not self.likelihoods.size:
            return [None] * len(rights)
        with np.errstate(invalid="ignore"):
            shares = special.softmax(self.likelihoods, axis=1)
        of_right = shares[np.arange(len(rights)), [right or 0 for right in rights]]
        known = zip(rights, self.counts.tolist(), of_right.tolist(), strict=True)
        return [
            share if right is not None and count else None
            for right, count, share in known
        ]

    def answers(self, metric: str) -> list[str | None]:
        """Return the answers that a metric judges, likeliest for their length where the metric divides by it.

        None where a line does not tell.
        """
        answers = [*self.written] or [None] * len(self.questions)
        chosen = np.flatnonzero(self.counts).tolist()
        if not chosen:
            return answers
        scores = np.where(np.isnan(self.likelihoods), -np.inf, self.likelihoods)
        if metric.startswith(("acc_norm", "acc_bytes")):
            in_bytes = metric.startswith("acc_bytes")
            asked = (self.questions[n] for n in chosen)
            lengths = [each.bytes if in_bytes else each.letters for each in asked]
            present = np.arange(scores.shape[1]) < self.counts[:, None]
            scores[present] /= [*itertools.chain(*lengths)]
        best = scores.argmax(1).tolist()
        for n in chosen:
            question = self.questions[n]
            if question.rivals and metric.startswith("mc1"):
                best[n] = max(question.rivals, key=scores[n].__getitem__)
            answers[n] = question.texts[best[n]]
        return answers
