"""docs/index.md: its command is README's, which `test_readme` tests."""

from __future__ import annotations

import re

from tests.helpers.checkpoints import ROOT


PAGE = (ROOT / "docs" / "index.md").read_text("utf-8")


def test_every_job_has_a_page():
    rows = re.findall(r"(?m)^\| [^|]+ \| \[[^\]]+\]\(([^)#]+)\S* \|$", PAGE)
    assert len(rows) == 12
    assert all((ROOT / "docs" / page).is_file() for page in rows)


def test_readme_and_site_begin_with_one_command():
    readme = (ROOT / "README.md").read_text("utf-8")
    first = re.findall("(?m)^python3 .* lm_eval .*", readme)
    assert len(first) == 1
    assert first[0] in PAGE.splitlines()
