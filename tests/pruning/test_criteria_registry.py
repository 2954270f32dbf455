"""Criteria that other packages declare under ``lm_eval_pruned.criteria``, on the inside."""

from __future__ import annotations

import re

from lm_eval_pruned.pruning.criteria import ALIASES, CRITERIA, RANDOM
from tests.helpers import checkpoints


def test_every_built_in_criterion_is_documented():
    text = (checkpoints.ROOT / "docs" / "criteria.md").read_text().replace("\\|", "|")
    assert all(f"`{name}`" in text for name in (*CRITERIA, RANDOM, *ALIASES))
    for name in CRITERIA:
        assert len(re.findall(rf"(?m)^\| `{name}`.* \| \S", text)) == 1
