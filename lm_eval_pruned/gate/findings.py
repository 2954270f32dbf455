"""What the gate says about each metric: for people, as JSON, as JUnit XML, for GitHub Actions."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from lm_eval_pruned.results.files import finite_or_none


if TYPE_CHECKING:
    from collections.abc import Sequence

#: Name of the run where the results are not a sweep's.
ONLY_RUN = "run"
#: By status: element of JUnit XML, annotation of GitHub Actions, and words of the summary.
STATUSES = {
    "fail": ("failure", "error", "failed"),
    "undecided": ("error", "error", "undecided"),
    "pass": ("", "", "as expected"),
    "improved": ("", "notice", "improved"),
    "new": ("", "notice", "not in the baseline"),
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
    told = {s: counts[s] for s in STATUSES if counts[s] or s != "undecided"}
    parts = [f"{count} {STATUSES[status][2]}" for status, count in told.items()]
    word = ("passed", "failed", "undecided")[exit_code(findings)]
    return f"Check {word}: {', '.join(parts)}.\n"


def _text(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    lines = [
        f"{each.status.upper():8} {each.title}: {each.scores('{} -> {}')}. {each.message}\n"
        for each in findings
        if each.status != "pass"
    ]
    lines += [f"NOTE     {note}\n" for note in notes]
    return "".join([*lines, _summary(findings)])


def _json(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    rows = [asdict(each) | {"score": finite_or_none(each.score)} for each in findings]
    data = {"passed": not exit_code(findings), "findings": rows, "notes": list(notes)}
    return json.dumps(data, indent=2) + "\n"


def _junit(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    counts = Counter(finding.status for finding in findings)
    sums = {"failures": counts["fail"], "errors": counts["undecided"]}
    about = {"name": "lm-eval-pruned check", "tests": len(findings), **sums}
    root = ElementTree.Element("testsuites")
    texts = {name: str(value) for name, value in about.items()}
    suite = ElementTree.SubElement(root, "testsuite", texts)
    for each in findings:
        name = {"classname": f"{each.run}.{each.task}", "name": each.metric}
        case = ElementTree.SubElement(suite, "testcase", name)
        if element := STATUSES[each.status][0]:
            said = ElementTree.SubElement(case, element, message=each.message)
            said.text = each.scores()
    if notes:
        ElementTree.SubElement(suite, "system-out").text = "\n".join(notes)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _github(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    in_text = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
    in_title = in_text | str.maketrans({":": "%3A", ",": "%2C"})
    said = [
        (STATUSES[each.status][1], each.title, f"{each.message} ({each.scores()})")
        for each in findings
    ]
    said += [("warning", "not as in the baseline", note) for note in notes]
    lines = [
        f"::{kind} title={title.translate(in_title)}::{text.translate(in_text)}\n"
        for kind, title, text in said
        if kind
    ]
    return "".join([*lines, _summary(findings)])


#: What writes findings and notes, by the value of ``--format``.
FORMATS = {"text": _text, "json": _json, "junit": _junit, "github": _github}
