"""``pruned-vllm`` where vLLM is not installed."""

from __future__ import annotations

import re
import sys

import pytest


def test_without_vllm_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in (
        "lm_eval.models.vllm_causallms",
        "lm_eval_pruned.model_wrappers.pruned_vllm",
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(
        ModuleNotFoundError, match=re.escape("pip install 'lm-eval-pruned[vllm]'")
    ):
        import lm_eval_pruned.model_wrappers.pruned_vllm  # noqa: F401
