"""The two walks are no longer than docs/architecture.md says, which holds the bounds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.helpers.checkpoints import ROOT
from tests.project.walk import load_walk, verdict_walk


PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
#: What the page says of a walk, as `Walk` does.
COUNTS = re.compile(
    r"(\d+) functions in (\d+) files, and ([\d,]+) calls from one file into another"
)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return load_walk(tmp_path_factory.mktemp("walk"))


def bounds(section: str) -> list[int]:
    """Return the counts in a section of the page: functions, files, calls between files."""
    text = " ".join(PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0].split())
    (found,) = COUNTS.findall(text)
    return [int(number.replace(",", "")) for number in found]


def assert_within(walk, section: str) -> None:
    counts = [len(walk.functions), len(walk.files), walk.moves]
    assert all(n <= most for n, most in zip(counts, bounds(section), strict=True)), (
        f"docs/architecture.md says {bounds(section)}, and the walk takes {walk}"
    )


def test_a_ratio_walks_no_further_than_the_page_says(load):
    assert_within(load, "From the command line to a sliced tensor")


def test_a_finished_unit_walks_no_further_than_the_page_says(tmp_path):
    assert_within(verdict_walk(tmp_path), "From the options of a sweep to its report")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames have no qualified names")
def test_the_functions_that_the_page_names_are_on_the_walk_of_a_ratio(load):
    section = PAGE.partition("## From the command line to a sliced tensor\n")[2]
    rows = re.findall(
        r"(?m)^\| (`.*?)\(`(\S+\.py)`\) \|", section.partition("\n## ")[0]
    )
    named = {
        (file, name)
        for names, file in rows
        for name in re.findall(r"`([\w.]+)`", names)
    }
    assert len(named) > 5
    walked = {
        (str(Path(file).relative_to(ROOT)).removeprefix("lm_eval_pruned/"), name)
        for file, name in load.functions
    }
    assert named <= walked
