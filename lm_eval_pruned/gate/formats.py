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


@dataclass(frozen=True)
class Finding:
    """What the gate says about one metric.

    Attributes:
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
    def title(self) -> str:
        """Run, task and metric in words."""
        return f"{place_of(self.run, self.task)} {self.metric}"

    def scores(self, form: str = "expected {}, got {}") -> str:
        """Return both scores in words."""
        both = (self.expected, self.score)
        return form.format(*("none" if x is None else f"{x:.6g}" for x in both))


def place_of(run: str, task: str) -> str:
    """Return run and task in words; the only run has no name."""
    return task if run == ONLY_RUN else f"{run} {task}"


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 where something failed, else 2 where something is undecided, else 0."""
    statuses = {finding.status for finding in findings}
    return 1 if "fail" in statuses else 2 if "undecided" in statuses else 0


def as_text(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    """Return the findings for people; what needs no attention is only counted."""
    lines = [
        f"{each.status.upper():8} {each.title}: {each.scores('{} -> {}')}. {each.message}"
        for each in findings
        if each.status != "pass"
    ]
    lines += [f"NOTE     {note}" for note in notes]
    return "\n".join([*lines, _summary(findings)]) + "\n"


def as_json(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    """Return the findings as a JSON object; numbers that are not finite become null."""
    rows = [asdict(each) | {"score": finite_or_none(each.score)} for each in findings]
    data = {"passed": not exit_code(findings), "findings": rows, "notes": list(notes)}
    return json.dumps(data, indent=2) + "\n"


def as_junit(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    """Return the findings as JUnit XML, one test case per metric."""
    counts = Counter(finding.status for finding in findings)
    numbers = {"failures": counts["fail"], "errors": counts["undecided"]}
    about = {"name": "lm-eval-pruned check", "tests": str(len(findings))}
    about |= {name: str(number) for name, number in numbers.items()}
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", about)
    for each in findings:
        name = {"classname": f"{each.run}.{each.task}", "name": each.metric}
        case = ElementTree.SubElement(suite, "testcase", name)
        if kind := {"fail": "failure", "undecided": "error"}.get(each.status):
            said = ElementTree.SubElement(case, kind, message=each.message)
            said.text = each.scores()
        else:
            said = ElementTree.SubElement(case, "system-out")
            said.text = f"{each.message} {each.scores()}"
    if notes:
        ElementTree.SubElement(suite, "system-out").text = "\n".join(notes)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def as_github(findings: Sequence[Finding], notes: Sequence[str]) -> str:
    """Return the findings as workflow commands, which GitHub Actions shows as annotations."""

    def coded(text: str, also: str = "") -> str:
        # "%" first, since the others bring it.
        for character in "%\r\n" + also:
            text = text.replace(character, f"%{ord(character):02X}")
        return text

    def command(kind: str, title: str, text: str) -> str:
        return f"::{kind} title={coded(title, ':,')}::{coded(text)}"

    kinds = {
        "fail": "error",
        "undecided": "error",
        "improved": "notice",
        "new": "notice",
    }
    lines = [
        command(kinds[each.status], each.title, f"{each.message} ({each.scores()})")
        for each in findings
        if each.status in kinds
    ]
    lines += [command("warning", "not as in the baseline", note) for note in notes]
    return "\n".join([*lines, _summary(findings)]) + "\n"


FORMATS = {"text": as_text, "json": as_json, "junit": as_junit, "github": as_github}


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.status for finding in findings)
    word = ("passed", "failed", "undecided")[exit_code(findings)]
    undecided = f"{counts['undecided']} undecided, " if counts["undecided"] else ""
    return (
        f"Check {word}: {counts['fail']} failed, {undecided}{counts['pass']} as expected, "
        f"{counts['improved']} improved, {counts['new']} not in the baseline."
    )
