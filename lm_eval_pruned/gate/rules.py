"""Whether a score keeps its rule: a tolerance, or a test over documents.

A decision is a status and a sentence, see `Finding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lm_eval_pruned.compare.pairing import paired_test
from lm_eval_pruned.compare.statistics import LEAST_UNITS, false_discovery
from lm_eval_pruned.gate.baseline_file import (
    Baseline,
    Expectation,
    Undecidable,
    documents_of,
)


if TYPE_CHECKING:
    from collections.abc import Mapping

    from lm_eval_pruned.results.files import Run

Decision = tuple[str, str]
#: Level of the tests behind a rule with a margin.
CLAIM_LEVEL = 0.05
#: What two equal scores may differ by, as a share of them.
_EQUAL = 1e-9
_IMPROVED = (
    "improved",
    "Better than the baseline; to expect this from now on, run with --update.",
)


def within_tolerance(score: float, expected: Expectation) -> Decision:
    """Decide a rule ``absolute`` or ``relative``."""
    change, tolerance = score - expected.score, expected.rule.value
    allowed = f"{tolerance:g}"
    if expected.rule.kind == "relative":
        tolerance *= abs(expected.score)
        allowed += " of the expected score"
    if abs(change) <= tolerance + _EQUAL * max(1.0, abs(expected.score)):
        return "pass", f"Within {allowed} of the baseline."
    better = expected.higher_is_better
    if better is not None and (change > 0) == better:
        return _IMPROVED
    direction = "Changed" if better is None else "Worse"
    return "fail", f"{direction} by {abs(change):.6g}, allowed is {allowed}."


@dataclass(frozen=True)
class DocumentTest:
    """What the documents of results and baseline say.

    Attributes:
        change: How far the two scores are apart.
        units: Independent documents, or clusters of them.
        worse: p of "the results are not worse", or not different where the direction
            is not known; None where no test could be made.
        better: p of "the results are not better"; None where that is not known.
        smallest: The p that nothing but wrong answers would have; None where documents
            are not independent and right or wrong.
        outside: p of "the true difference lies outside of the margin"; None for rules without
            one, and where no interval can be given.
    """

    change: float
    units: int
    worse: float | None
    better: float | None
    smallest: float | None
    outside: float | None


def document_test(
    run: Run, task: str, metric: str, expected: Expectation
) -> DocumentTest:
    """Test the documents of the results against those of the baseline.

    Raises:
        Undecidable: They are other documents, or weighted otherwise.
    """
    before, score = expected.documents, run.scores[task, metric].value
    assert before is not None
    after = documents_of(run, task, metric, expected.rule).in_the_order_of(before)
    if after is None:
        raise Undecidable(
            "Evaluated on other documents than the baseline (matched by doc_hash): evaluate with "
            "the same --limit and data, or run with --update."
        )
    if not before.is_scored_like(after):
        raise Undecidable(
            "The documents are weighted otherwise than in the baseline: run with --update."
        )
    better, test = expected.higher_is_better, paired_test((before, after))
    less, greater = test.sides or (None, None)
    sides = {True: (less, greater), False: (greater, less), None: (test.p, None)}
    outside = smallest = None
    if expected.rule.margin:
        within = expected.rule.margin.bounds(expected.score, score, better)
        outside = test.p_outside(*within) if within else None
    if test.method.startswith("McNemar"):
        right = int(before.values.sum())
        wrong = len(before.keys) - right
        worsened = {True: right, False: wrong, None: max(right, wrong)}[better]
        # McNemar's mid-p of so many changes in one direction; of both sides where none is worse.
        smallest = 0.5 ** (worsened + (better is not None))
    change = abs(score - expected.score)
    return DocumentTest(change, test.units, *sides[better], smallest, outside)


def by_documents(
    tests: Mapping[tuple[str, str, str], DocumentTest], baseline: Baseline
) -> dict[tuple[str, str, str], Decision]:
    """Decide the rules of documents together.

    The p of all rules ``alpha`` are adjusted as one family, and those of all rules with a
    margin as another, so that a gate of many metrics does not close by chance.
    """
    found = list(tests.values())
    families = [baseline[key].rule.margin is not None for key in tests]
    qs = [
        [q for q, _ in false_discovery([getattr(t, p) for t in found], families)]
        for p in ("outside", "worse", "better")
    ]
    return {
        key: _decision(baseline[key], test, *of_test)
        for (key, test), *of_test in zip(tests.items(), *qs, strict=True)
    }


def _decision(
    expected: Expectation,
    test: DocumentTest,
    q_outside: float | None,
    q: float | None,
    q_better: float | None,
) -> Decision:
    margin = expected.rule.margin
    alpha = float(expected.rule.value) if margin is None else CLAIM_LEVEL
    direction = "different" if expected.higher_is_better is None else "worse"
    if margin and q_outside is None:
        return "undecided", (
            f"No interval can be given that would lie within {margin.text}: use a tolerance for "
            "this metric."
        )
    if margin and q_outside is not None and q_outside < alpha:
        return "pass", (
            f"Shown to be {margin.verdict} within {margin.text} (q = {q_outside:.3g})."
        )
    worse = q is not None and q < alpha
    if (q is None or test.units < LEAST_UNITS) and (worse or not margin):
        return "undecided", (
            f"{test.units} independent documents are too few to decide, at least {LEAST_UNITS} "
            "are needed: use a tolerance instead of alpha."
        )
    if worse:
        return "fail", (
            f"Significantly {direction} by {test.change:.6g} (q = {q:.3g} < {alpha:g})."
        )
    if q_better is not None and q_better < alpha:
        return _IMPROVED
    if margin:
        return "undecided", (
            f"Not shown to be {margin.verdict} within {margin.text} (q = {q_outside:.3g} >= "
            f"{alpha:g}), nor worse: `lm-eval-pruned power` says how many documents decide."
        )
    if test.smallest is not None and test.smallest >= alpha:
        return "undecided", (
            "Too few documents to decide: not even the worst possible score would be significant "
            f"(p = {test.smallest:.3g} >= {alpha:g}): use a tolerance instead of alpha."
        )
    return "pass", f"Not significantly {direction} (q = {q:.3g} >= {alpha:g})."
