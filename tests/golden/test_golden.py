"""The code gives today what it gave when the golden files were written."""

from __future__ import annotations

import json

import pytest

from tests.golden import loading
from tests.helpers import layouts


GOLDEN = json.loads(loading.FILE.read_text())

pytestmark = pytest.mark.skipif(
    loading.versions() != GOLDEN["versions"],
    reason=f"the golden files were written with {GOLDEN['versions']}",
)


@pytest.mark.parametrize(
    "family", layouts.breadth(layouts.FAMILIES, "llama", "phi3", "qwen3_moe")
)
def test_pruning_gives_what_it_gave(family, one_thread):
    assert loading.observed(family) == GOLDEN["families"][family]


def test_mistakes_are_told_as_before():
    assert loading.sentences() == GOLDEN["mistakes"]
