"""What the gate says about each metric: for people, as JSON, for GitHub Actions."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lm_eval_pruned.results.files import finite_or_none


if TYPE_CHECKING:
    from collections.abc import Sequence

#: Name of the run where the results are not a sweep's.
ONLY_RUN = "run"
#: By status: annotation of GitHub Actions, and words of the summary.
STATUSES = {
    "fail": ("error", "failed"),
    "undecided": ("error", "undecided"),
    "pass": ("", "as expected"),
    "improved": ("notice", "improved"),
    "new": ("notice", "not in the baseline"),
}


@dataclass(frozen=True)
class Finding:
    """What the gate says about one metric: one of `STATUSES`, both scores, and a sentence.

    ``undecided`` is a score that cannot be compared with the baseline.
    """

    run: str
    task: str
    metric: str
    status: str
    expected: float | None
    score: float | None
    message: str

    @property
    def title(self) -> str:
        """Run, task and metric in words; the only run has no name."""
        names = (self.run, self.task, self.metric)
        return " ".join(names[self.run == ONLY_RUN :])

    def scores(self, form: str = "expected {}, got {}") -> str:
        """Return both scores in words."""
        both = (self.expected, self.score)
        return form.format(*("none" if x is None else f"{x:.6g}" for x in both))


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 where something failed, else 2 where something is undecided, else 0."""
    statuses = {finding.status for finding in findings}
    return 1 if "fail" in statuses else 2 if "undecided" in statuses else 0


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.status for finding in findings)
    parts = [
        f"{counts[status]} {words}"
        for status, (_, words) in STATUSES.items()
        if counts[status] or status != "undecided"
    ]
    word = ("passed", "failed", "undecided")[exit_code(findings)]
    return f"Check {word}: {', '.join(parts)}.\n"


def _text(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    lines = [
        f"{finding.status.upper():8} {finding.title}: {finding.scores('{} -> {}')}. "
        f"{finding.message}\n"
        for finding in findings
        if finding.status != "pass"
    ]
    lines += [f"NOTE     {note}\n" for note in notes]
    return "".join([*lines, _summary(findings)])


def _json(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    rows = [asdict(f) | {"score": finite_or_none(f.score)} for f in findings]
    data = {"passed": not exit_code(findings), "findings": rows, "notes": list(notes)}
    return json.dumps(data, indent=2) + "\n"


def _github(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    in_text = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
    in_title = in_text | str.maketrans({":": "%3A", ",": "%2C"})
    annotations = [
        (STATUSES[f.status][0], f.title, f"{f.message} ({f.scores()})")
        for f in findings
    ]
    annotations += [("warning", "not as in the baseline", note) for note in notes]
    lines = [
        f"::{kind} title={title.translate(in_title)}::{text.translate(in_text)}\n"
        for kind, title, text in annotations
        if kind
    ]
    return "".join([*lines, _summary(findings)])


#: What writes findings and notes, by the value of ``--format``.
FORMATS = {"text": _text, "json": _json, "github": _github}
