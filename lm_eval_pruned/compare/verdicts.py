"""What tests show: claims within a margin, and the verdict in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lm_eval_pruned.compare import statistics
from lm_eval_pruned.compare.margins import Claim, Margin


if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence


def claims(
    margin: Margin,
    tests: Sequence[statistics.PairedTest | None],
    scores: Sequence[tuple[float, float, bool | None]],
    families: Sequence[Hashable],
    alpha: float,
) -> list[Claim | None]:
    """Decide one claim for each test of a table.

    Args:
        margin: What is claimed.
        tests: One for each row; None for rows that are no part of the table's family.
        scores: Score of the base, score of the run, and whether higher is better.
        families: Which tests are adjusted together.
        alpha: Rate of wrong claims in each family.

    Returns:
        None where there is no test, no margin, or no interval.
    """
    bounds = [margin.bounds(*row) for row in scores]
    ps = [
        test.p_outside(*within) if test and within else None
        for test, within in zip(tests, bounds, strict=True)
    ]
    found: list[Claim | None] = []
    for test, within, p, (q, level) in zip(
        tests, bounds, ps, statistics.false_discovery(ps, families, alpha), strict=True
    ):
        if not test or not within or p is None or q is None or level is None:
            found.append(None)
            continue
        low, high = (
            end if math.isfinite(bound) else None
            for end, bound in zip(test.interval(2 * level), within, strict=True)
        )
        found.append(Claim(min(map(abs, within)), low, high, p, q))
    return found


def verdict_of(
    difference: float,
    q: float | None,
    alpha: float,
    higher_is_better: bool | None,
    margin: Margin | None = None,
    claim: Claim | None = None,
) -> str:
    """Return what a test says of a difference, in the words of `Difference.verdict`."""
    if q is None:
        verdict = "not tested"
    elif q >= alpha:
        verdict = "not shown"
    elif higher_is_better is None:
        verdict = "different"
    else:
        verdict = "better" if (difference > 0) == higher_is_better else "worse"
    if margin is None:
        return verdict
    # What is better is not worse, and says more; what is equivalent may differ for certain.
    says_more = margin.claim == "not_worse" and verdict == "better"
    if claim is not None and claim.q < alpha and not says_more:
        return margin.verdict
    return "undecided" if verdict.startswith("not ") else verdict
