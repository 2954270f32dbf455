"""The code gives today what it gave when the golden files were written."""

from __future__ import annotations

import json
import sys

import pytest

from tests.golden import loading, reading, records
from tests.helpers import layouts


GOLDEN = json.loads(loading.FILE.read_text())

same_versions = pytest.mark.skipif(
    loading.versions() != GOLDEN["versions"],
    reason=f"the golden files were written with {GOLDEN['versions']}",
)


@same_versions
@pytest.mark.parametrize(
    "family", layouts.breadth(layouts.FAMILIES, "llama", "phi3", "qwen3_moe")
)
def test_pruning_gives_what_it_gave(family):
    observed, golden = loading.observed(family), GOLDEN["families"][family]
    assert observed.keys() == golden.keys()
    for case, entry in observed.items():
        assert entry == golden[case], case


@same_versions
def test_mistakes_are_told_as_before():
    assert loading.sentences() == GOLDEN["mistakes"]


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="argparse breaks lines differently"
)
def test_commands_that_read_results_say_what_they_said():
    pytest.importorskip("vl_convert", reason="figures need the extra `report`")
    found = dict(reading.observed())
    assert found.keys() == {each.name for each in reading.FOLDER.iterdir()}
    for name, text in found.items():
        assert text == (reading.FOLDER / name).read_text(encoding="utf-8"), name


@pytest.mark.slow
def test_records_have_the_keys_and_types_that_they_had(one_thread):
    assert records.observed() == json.loads(records.FILE.read_text())
