"""Whether a score keeps its rule: a tolerance, or a test over documents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.margins import CLAIMS, Margin
from lm_eval_pruned.gate.baseline_file import (
    Expectation,
    Undecidable,
    documents_of,
)
from lm_eval_pruned.gate.findings import Finding, failed_with, undecided_with


if TYPE_CHECKING:
    from lm_eval_pruned.results.files import Run


#: Level of the tests behind the rules of `CLAIMS`.
CLAIM_LEVEL = 0.05
#: What two equal scores may differ by, as a share of them.
_EQUAL = 1e-9


def within_tolerance(finding: Finding, expected: Expectation) -> Finding:
    """Decide a rule ``absolute`` or ``relative``."""
    assert finding.score is not None
    change = finding.score - expected.score
    rule = expected.rule
    tolerance = rule.value
    if rule.kind == "relative":
        tolerance *= abs(expected.score)
    allowed = f"{rule.value:g}" + (
        " of the expected score" if rule.kind == "relative" else ""
    )
    fuzz = _EQUAL * max(1.0, abs(expected.score))
    if abs(change) <= tolerance + fuzz:
        return replace(finding, message=f"Within {allowed} of the baseline.")
    if _is_improvement(change, expected):
        return replace(finding, status="improved", message=_IMPROVED)
    direction = "Changed" if expected.higher_is_better is None else "Worse"
    return failed_with(
        finding, f"{direction} by {abs(change):.6g}, allowed is {allowed}."
    )


def significance(
    finding: Finding,
    expected: Expectation,
    test: AlphaTest,
    q: float | None,
    q_better: float | None,
) -> Finding:
    """Decide a rule ``alpha`` by p values that were adjusted over all such rules."""
    assert finding.score is not None
    alpha = level_of(expected)
    least = statistics.LEAST_UNITS
    if q is None or test.units < least:
        message = (
            f"{test.units} independent documents are too few to decide, at least {least} are "
            "needed: use a tolerance instead of alpha."
        )
        return undecided_with(finding, message)
    if q < alpha:
        change = abs(finding.score - expected.score)
        direction = "different" if expected.higher_is_better is None else "worse"
        return failed_with(
            finding,
            f"Significantly {direction} by {change:.6g} (q = {q:.3g} < {alpha:g}).",
        )
    if q_better is not None and q_better < alpha:
        return replace(finding, status="improved", message=_IMPROVED)
    if test.smallest is not None and test.smallest >= alpha:
        message = (
            "Too few documents to decide: not even the worst possible score would be significant "
            f"(p = {test.smallest:.3g} >= {alpha:g}): use a tolerance instead of alpha."
        )
        return undecided_with(finding, message)
    direction = "different" if expected.higher_is_better is None else "worse"
    return replace(
        finding, message=f"Not significantly {direction} (q = {q:.3g} >= {alpha:g})."
    )


def claimed(
    finding: Finding,
    expected: Expectation,
    test: AlphaTest,
    q_outside: float | None,
    q: float | None,
    q_better: float | None,
) -> Finding:
    """Decide a rule of `CLAIMS` by p values that were adjusted over all such rules."""
    margin, alpha = Margin(expected.rule.kind, expected.rule.value), CLAIM_LEVEL
    if q_outside is None:
        message = (
            f"No interval can be given that would lie within {margin.text}: use a tolerance for "
            "this metric."
        )
        return undecided_with(finding, message)
    if q_outside < alpha:
        message = (
            f"Shown to be {margin.verdict} within {margin.text} (q = {q_outside:.3g})."
        )
        return replace(finding, message=message)
    if q is not None and q < alpha:
        return significance(finding, expected, test, q, q_better)
    if q_better is not None and q_better < alpha:
        return replace(finding, status="improved", message=_IMPROVED)
    message = (
        f"Not shown to be {margin.verdict} within {margin.text} (q = {q_outside:.3g} >= "
        f"{alpha:g}), nor worse: `lm-eval-pruned power` says how many documents decide."
    )
    return undecided_with(finding, message)


def level_of(expected: Expectation) -> float:
    """Return the level at which a rule of documents is tested."""
    return CLAIM_LEVEL if expected.rule.kind in CLAIMS else float(expected.rule.value)


_IMPROVED = "Better than the baseline; to expect this from now on, run with --update."


def _is_improvement(change: float, expected: Expectation) -> bool:
    better = expected.higher_is_better
    return better is not None and (change > 0) == better


@dataclass(frozen=True)
class AlphaTest:
    """What the documents say.

    Attributes:
        worse: p of "the results are not worse", or not different where the direction
            is not known; None where no test could be made.
        better: p of "the results are not better"; None where that is not known.
        smallest: The p that nothing but wrong answers would have; None where documents
            are not independent and right or wrong.
        units: Independent documents, or clusters of them.
        outside: p of "the true difference lies outside of the margin", for rules of
            `CLAIMS`; None for others, and where no interval can be given.
    """

    worse: float | None
    better: float | None
    smallest: float | None
    units: int
    outside: float | None = None


def alpha_test(run: Run, task: str, metric: str, expected: Expectation) -> AlphaTest:
    """Test the documents of the results against those of the baseline.

    Raises:
        Undecidable: They are other documents, or weighted otherwise.
    """
    before = expected.documents
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

    def compared(
        values: np.ndarray, alternative: statistics.Alternative
    ) -> statistics.PairedTest:
        return statistics.paired_difference(
            before.values,
            values,
            weights=before.weights,
            clusters=before.clusters,
            strata=before.strata,
            transform=before.transform,
            alpha=level_of(expected),
            alternative=alternative,
        )

    sides = _SIDES[expected.higher_is_better]
    test = compared(after.values, sides[0])
    worst = []
    if (
        before.clusters is None
        and before.transform == "mean"
        and (before.weights == 1).all()
        and np.isin(before.values, (0, 1)).all()
    ):
        worst = [
            np.full(len(before.keys), value)
            for value in _WORST[expected.higher_is_better]
        ]
    smallest = [p for p in (compared(w, sides[0]).p for w in worst) if p is not None]
    better = compared(after.values, sides[1]).p if len(sides) > 1 else None
    outside = None
    if expected.rule.kind in CLAIMS:
        bounds = Margin(expected.rule.kind, expected.rule.value).bounds(
            expected.score, run.scores[task, metric].value, expected.higher_is_better
        )
        outside = None if bounds is None else test.p_outside(*bounds)
    return AlphaTest(test.p, better, min(smallest, default=None), test.units, outside)


#: Alternatives for worse and better, by `Expectation.higher_is_better`.
_SIDES: dict[bool | None, tuple[statistics.Alternative, ...]] = {
    True: ("less", "greater"),
    False: ("greater", "less"),
    None: ("two-sided",),
}


#: The worst answers of right-or-wrong documents.
_WORST = {True: (0.0,), False: (1.0,), None: (0.0, 1.0)}
