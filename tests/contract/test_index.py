"""docs/index.md: its command and its recipes are README's, which `test_readme` tests."""

from __future__ import annotations

import re

import pytest

from tests.helpers.checkpoints import ROOT


PAGE = (ROOT / "docs" / "index.md").read_text("utf-8")


def test_every_job_has_a_page():
    rows = re.findall(r"(?m)^\| [^|]+ \| \[[^\]]+\]\(([^)#]+)\S* \|$", PAGE)
    assert len(rows) == 11
    assert all((ROOT / "docs" / page).is_file() for page in rows)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_both_first_pages_say_the_same_of_the_recipes(page):
    text = " ".join((ROOT / page).read_text("utf-8").split())
    assert "In Gemma-3, *fast* is worse than a random cut up to 30 %." in text


def test_readme_and_site_begin_with_one_command():
    readme = (ROOT / "README.md").read_text("utf-8")
    first = re.findall("(?m)^python3 .* lm_eval .*", readme)
    assert len(first) == 1
    assert first[0] in PAGE.splitlines()
