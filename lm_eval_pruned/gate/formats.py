"""Findings for people, as JSON, as JUnit XML and as annotations of GitHub Actions."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from lm_eval_pruned.gate.findings import Finding, exit_code, title_of


if TYPE_CHECKING:
    from collections.abc import Sequence


def as_text(findings: Sequence[Finding], notes: Sequence[str] = ()) -> str:
    """Return the findings for people; what needs no attention is only counted."""
    lines = []
    for finding in findings:
        if finding.status != "pass":
            scores = f"{_number(finding.expected)} -> {_number(finding.score)}"
            lines.append(
                f"{finding.status.upper():8} {title_of(finding)}: {scores}. {finding.message}"
            )
    lines += [f"NOTE     {note}" for note in notes]
    lines.append(_summary(findings))
    return "\n".join(lines) + "\n"


def as_json(findings: Sequence[Finding], notes: Sequence[str] = ()) -> str:
    """Return the findings as a JSON object; numbers that are not finite become null."""
    rows = [
        {
            name: None
            if isinstance(value, float) and not math.isfinite(value)
            else value
            for name, value in asdict(finding).items()
        }
        for finding in findings
    ]
    passed = exit_code(findings) == 0
    data = {"passed": passed, "findings": rows, "notes": list(notes)}
    return json.dumps(data, indent=2) + "\n"


def as_junit(findings: Sequence[Finding], notes: Sequence[str] = ()) -> str:
    """Return the findings as JUnit XML, one test case per metric."""
    counts = {
        status: str(sum(finding.status == status for finding in findings))
        for status in ("fail", "undecided")
    }
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name="lm-eval-pruned check",
        tests=str(len(findings)),
        failures=counts["fail"],
        errors=counts["undecided"],
    )
    for finding in findings:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"{finding.run}.{finding.task}",
            name=finding.metric,
        )
        scores = f"expected {_number(finding.expected)}, got {_number(finding.score)}"
        if finding.status in ("fail", "undecided"):
            kind = "failure" if finding.failed else "error"
            bad = ElementTree.SubElement(case, kind, message=finding.message)
            bad.text = scores
        else:
            ElementTree.SubElement(
                case, "system-out"
            ).text = f"{finding.message} {scores}"
    if notes:
        ElementTree.SubElement(suite, "system-out").text = "\n".join(notes)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def as_github(findings: Sequence[Finding], notes: Sequence[str] = ()) -> str:
    """Return the findings as workflow commands, which GitHub Actions shows as annotations."""
    commands = {
        "fail": "error",
        "undecided": "error",
        "improved": "notice",
        "new": "notice",
    }
    lines = []
    for finding in findings:
        if finding.status in commands:
            title = _escape(title_of(finding)).replace(":", "%3A").replace(",", "%2C")
            scores = (
                f"expected {_number(finding.expected)}, got {_number(finding.score)}"
            )
            lines.append(
                f"::{commands[finding.status]} title={title}::"
                + _escape(f"{finding.message} ({scores})")
            )
    lines += [
        f"::warning title=not as in the baseline::{_escape(note)}" for note in notes
    ]
    lines.append(_summary(findings))
    return "\n".join(lines) + "\n"


FORMATS = {
    "text": as_text,
    "json": as_json,
    "junit": as_junit,
    "github": as_github,
}


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def _summary(findings: Sequence[Finding]) -> str:
    counts = {
        status: sum(finding.status == status for finding in findings)
        for status in ("fail", "undecided", "improved", "new", "pass")
    }
    word = ("passed", "failed", "undecided")[exit_code(findings)]
    undecided = f"{counts['undecided']} undecided, " if counts["undecided"] else ""
    return (
        f"Check {word}: {counts['fail']} failed, {undecided}{counts['pass']} as expected, "
        f"{counts['improved']} improved, {counts['new']} not in the baseline."
    )


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
