"""Criteria that other packages declare under ``lm_eval_pruned.criteria``, on the inside."""

from __future__ import annotations

from lm_eval_pruned.pruning.criteria import ALIASES, CRITERIA, RANDOM
from tests.helpers import checkpoints


def test_every_built_in_criterion_is_documented_with_its_formula():
    text = (checkpoints.ROOT / "docs" / "criteria.md").read_text().replace("\\|", "|")
    assert all(f"`{name}`" in text for name in (*CRITERIA, RANDOM, *ALIASES))
    for name, criterion in CRITERIA.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
        assert f"| {criterion.formula}" in row
