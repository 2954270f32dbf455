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
    """The site takes it from the README."""
    readme = (ROOT / "README.md").read_text("utf-8")
    (shared,) = re.findall(r"(?s)\[start:command\].*?\[end:command\]", readme)
    assert re.findall("(?m)^python3 .* lm_eval .*", readme) == re.findall(
        "(?m)^python3 .*", shared
    )
    assert '--8<-- "README.md:command"' in PAGE.splitlines()
