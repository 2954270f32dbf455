"""docs/architectures.md: the page is what its script finds, and the script looks as a user would."""

from __future__ import annotations

import functools
import re

import make_architectures as script
import pytest
import transformers

from tests.helpers.checkpoints import ROOT


TABLE = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")


@functools.cache
def candidates() -> dict[str, tuple]:
    """Return what the script checks, by model type."""
    return {row[0]: row for row in script.candidates()}


def in_the_table(outcome) -> set[str]:
    """Return the model types in a section of the table, in its rows or in a list."""
    text = TABLE.partition(f"## {outcome.capitalize()}")[2].partition("\n## ")[0]
    found = re.findall(r"^\|`([^`]+)`\|", text, flags=re.MULTILINE)
    lists = re.findall(r"^(?:\|[^`|]+\|)?`.*", text, flags=re.MULTILINE)
    return {*found, *re.findall(r"`([^`]+)`", " ".join(lists))}


@pytest.mark.parametrize(
    ("model_type", "outcome"),
    [
        ("aria_text", "pruned"),
        # A class that is handed a part of its config.
        ("mllama", "pruned"),
        # An encoder whose config has one of text beside one of images.
        ("t5gemma2", "pruned"),
        ("bitnet", "refused"),
        # A part of text whose config has no vocabulary.
        ("blt", "refused"),
    ],
)
def test_a_listed_architecture_is_sliced_whole_and_its_export_reopens_or_it_is_refused(
    model_type, outcome
):
    assert script.check(*candidates()[model_type]).outcome == outcome
    assert model_type in in_the_table(outcome)


@pytest.mark.slow
def test_the_page_is_what_its_script_writes_today():
    if f"transformers {transformers.__version__}, " not in TABLE:
        pytest.skip("the table was written with another version of transformers")
    found = {name: script.check(*row).outcome for name, row in candidates().items()}
    for outcome in ("pruned", "refused"):
        listed = {name for name, each in found.items() if each == outcome}
        assert listed == in_the_table(outcome)
