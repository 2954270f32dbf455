"""What the gate says about one metric."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Sequence


#: Name of the run where the results are not a sweep's.
ONLY_RUN = "run"


@dataclass(frozen=True)
class Finding:
    """What the gate says about one metric.

    Attributes:
        run: Name of the run.
        task: The task.
        metric: The metric.
        status: ``pass``, ``improved`` (passes), ``new`` (passes), ``fail``, or
            ``undecided`` where the score cannot be held against the baseline.
        expected: Score of the baseline, or None.
        score: Score of the results, or None.
        message: One sentence.
    """

    run: str
    task: str
    metric: str
    status: str
    expected: float | None
    score: float | None
    message: str

    @property
    def failed(self) -> bool:
        """Whether the result is known to be bad."""
        return self.status == "fail"


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 where something failed, else 2 where something is undecided, else 0."""
    statuses = {finding.status for finding in findings}
    return 1 if "fail" in statuses else 2 if "undecided" in statuses else 0


def failed_with(finding: Finding, message: str) -> Finding:
    """Return the finding as one that fails."""
    return replace(finding, status="fail", message=message)


def undecided_with(finding: Finding, message: str) -> Finding:
    """Return the finding as one that cannot be decided."""
    return replace(finding, status="undecided", message=message)


def place_of(run: str, task: str) -> str:
    """Return run and task in words; the only run has no name."""
    return task if run == ONLY_RUN else f"{run} {task}"


def title_of(finding: Finding) -> str:
    """Return run, task and metric in words."""
    return f"{place_of(finding.run, finding.task)} {finding.metric}"
