"""Criteria that other packages declare under ``lm_eval_pruned.criteria``, on the inside."""

from __future__ import annotations

import sys

from lm_eval_pruned.checkpoints.sensitivity import measure_sensitivity
from lm_eval_pruned.pruning.criteria import ALIASES, CRITERIA, RANDOM
from tests.checkpoints.test_sensitivity import request_of
from tests.contract import test_own
from tests.helpers import checkpoints
from tests.helpers.ways_to_load import write_texts


install = test_own.install


def test_curves_are_measured_each_time(install, tiny_llama, tmp_path, monkeypatch):
    """Nothing tells whether the code of another package is still the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = write_texts(tmp_path / "text.jsonl")
    code = "def f(gate, up):\n    return gate.abs().sum(1)\n"
    file, found = install(code, "f = user_criteria:f"), []
    # Of another length, by which Python tells that its compiled file is of other source.
    for each in (code, code.replace("gate.abs()", "-gate.abs()"), code):
        file.write_text(each)
        sys.modules.pop("user_criteria", None)
        found.append(measure_sensitivity(request_of(tiny_llama), text, criteria=("f",)))
    assert found[0] == found[2] != found[1]


def test_every_built_in_criterion_is_documented_with_its_formula():
    text = (checkpoints.ROOT / "docs" / "criteria.md").read_text().replace("\\|", "|")
    assert all(f"`{name}`" in text for name in (*CRITERIA, RANDOM, *ALIASES))
    for name, criterion in CRITERIA.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
        assert f"| {criterion.formula}" in row
