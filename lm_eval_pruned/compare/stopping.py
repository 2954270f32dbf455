"""When a comparison with the unpruned model is decided, so that no more documents are needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.compare.pairing import paired_documents, paired_test
from lm_eval_pruned.results.documents import read_documents
from lm_eval_pruned.results.series import primary_metrics
from lm_eval_pruned.results.stopping_record import Stopping


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.results.documents import Documents
    from lm_eval_pruned.results.files import Run

#: Chance, over the sizes of a sweep, that any comparison of a task is decided wrongly.
LEVEL = 0.05


@dataclass(frozen=True)
class StopRule:
    """What ends a comparison.

    Attributes:
        text: ``decided``: a difference from zero is shown. ``decided:MARGIN``: that, or
            equivalence within a margin as `Margin` takes it.

    Raises:
        ValueError: It is something else.

    Example:
        >>> StopRule("decided:1pt").margin.text
        '1pt'
    """

    text: str

    def __post_init__(self) -> None:
        word, colon, margin = self.text.partition(":")
        if word != "decided" or (colon and not margin):
            raise ValueError(
                f"stop_when={self.text} is no rule: pass decided, or decided:MARGIN with a "
                "margin such as 1pt."
            )
        if margin:
            Margin("equivalent", margin)

    @property
    def margin(self) -> Margin | None:
        """Within which two scores count as the same; None without one."""
        margin = self.text.partition(":")[2]
        return Margin("equivalent", margin) if margin else None


class Looks:
    """The looks at one unit, from the first to the one that decides.

    Args:
        rule: What ends them.
        base: The unpruned model's results on all documents.
        counts: Documents at each look, the last being all.
        sizes: Sizes over which the family-wise error is bounded.
    """

    def __init__(
        self, rule: StopRule, base: Run, counts: Sequence[int], sizes: int
    ) -> None:
        self._rule = rule
        self._base = base
        self._counts = tuple(counts)
        self._fractions = tuple(count / counts[-1] for count in counts)
        share = LEVEL / sizes
        self._levels = statistics.nominal_levels(self._fractions, share)
        # Each of the two one-sided tests may spend `share`.
        both = min(1.0, 2 * share)
        self._margin_levels = [
            level / 2 for level in statistics.nominal_levels(self._fractions, both)
        ]
        self._sizes = sizes
        self._p: list[float | None] = []
        self._p_margin: list[float | None] = []

    def add(self, run: Run, task: str) -> Stopping | None:
        """Look at the results so far.

        Args:
            run: The unit's results on the first documents, as many as the next look has.
            task: The unit's task or group.

        Returns:
            What ended the comparison, or None where it goes on.

        Raises:
            ResultsError: Base and run do not belong together.
        """
        metric = next(
            (m for t, m in primary_metrics([self._base, run]) if t == task), ""
        )
        # That a run is partial is known here before its results file says so.
        run = replace(run, stopping={task: self._so_far(task, metric)})
        pair = paired_documents(self._base, run, task, metric) if metric else None
        scores = tuple(
            each.scores[task, metric].value if metric else 0.0
            for each in (self._base, run)
        )
        return self.look(task, metric, pair, scores)

    def look(
        self,
        task: str,
        metric: str,
        pair: tuple[Documents, Documents] | None,
        scores: tuple[float, ...],
    ) -> Stopping | None:
        """Look at the documents so far.

        Args:
            task: The unit's task or group.
            metric: The metric that decides.
            pair: Its first documents, as many as the next look has: of the unpruned model and
                of the unit, in one order. None where there are none to compare.
            scores: Of the unpruned model and of the unit, which give a relative margin its size.

        Returns:
            What ended the comparison, or None where it goes on.
        """
        so_far = self._so_far(task, metric)
        number, count, level = len(self._p), so_far.documents, so_far.nominal_level
        test = paired_test(pair, level) if pair else None
        p = _p(pair, test) if pair and test else None
        self._p.append(p)
        claim = None
        if pair and test and self._rule.margin:
            size = self._rule.margin.size(*scores)
            claim = None if size is None else _p_margin(pair, test, size)
        if self._rule.margin:
            self._p_margin.append(claim)
        if test:
            so_far = replace(
                so_far, difference=test.difference, low=test.low, high=test.high
            )
        so_far = replace(so_far, p=tuple(self._p), p_margin=tuple(self._p_margin))
        if p is not None and p < level:
            return replace(so_far, reason="difference")
        if claim is not None and claim < self._margin_levels[number]:
            return replace(so_far, reason="equivalent")
        if count == self._counts[-1]:
            tested = any(p is not None for p in self._p)
            return replace(so_far, reason="all documents" if tested else "no test")
        return None

    def _so_far(self, task: str, metric: str) -> Stopping:
        number = len(self._p)
        return Stopping(
            rule=self._rule.text,
            task=task,
            metric=metric,
            documents=self._counts[number],
            of=self._counts[-1],
            reason="no test",
            level=LEVEL,
            sizes=self._sizes,
            looks=self._counts[: number + 1],
            p=(),
            p_margin=(),
            nominal_level=self._levels[number],
            difference=None,
            low=None,
            high=None,
            scores={},
        )


def with_scores(stopping: Stopping, run: Run) -> Stopping:
    """Return the record with the intervals of all scores of its task.

    They hold at all looks together, as that of the difference does: each is the interval
    at the nominal level of its look (Jennison and Turnbull 2000, chapter 9).
    """
    found = {}
    for task, metric in run.scores:
        if task == stopping.task:
            found[metric] = _score_interval(run, task, metric, stopping.nominal_level)
    return replace(stopping, scores=found)


def _counts_answers(test: statistics.PairedTest) -> bool:
    return test.method.startswith("McNemar")


def _p(pair: tuple[Documents, Documents], test: statistics.PairedTest) -> float | None:
    """Return p of no difference; of means, the larger of two tests."""
    if test.p is None or _counts_answers(test):
        return test.p
    base, run = pair
    if len(run.keys) < statistics.LEAST_OF_MEANS:
        return None
    tails = statistics.skewed_tails(base.values, run.values, run.weights, run.clusters)
    return min(1.0, max(test.p, 2 * min(tails)))


def _p_margin(
    pair: tuple[Documents, Documents], test: statistics.PairedTest, size: float
) -> float | None:
    """Return p of a difference of `size` or more either way; of means, the larger of two."""
    p = test.p_outside(-size, size)
    if p is None or _counts_answers(test):
        return p
    base, run = pair
    if len(run.keys) < statistics.LEAST_OF_MEANS:
        return None
    if run.transform == "mean":
        values = base.values, run.values, run.weights, run.clusters
        below, _ = statistics.skewed_tails(*values, size)
        _, above = statistics.skewed_tails(*values, -size)
        p = max(p, below, above)
    return p


def _score_interval(
    run: Run, task: str, metric: str, alpha: float
) -> tuple[float | None, float | None]:
    documents = read_documents(run, task, metric)
    score = run.scores[task, metric]
    if documents is not None and documents.transform == "mean":
        values = documents.values
        plain = documents.clusters is None and (documents.weights == 1).all()
        if plain and np.isin(values, (0, 1)).all():
            right = stats.binomtest(int(values.sum()), len(values))
            ends = right.proportion_ci(1 - alpha, method="wilson")
            return float(ends.low), float(ends.high)
        none = replace(documents, values=np.zeros(len(values)))
        test = paired_test((none, documents), alpha)
        if test.low is not None:
            return test.low, test.high
    if score.stderr is None:
        return None, None
    half = float(stats.norm.isf(alpha / 2)) * score.stderr
    return score.value - half, score.value + half
