"""What ``pruned-vllm`` takes and refuses, without vLLM."""

from __future__ import annotations

import re
import sys

import pytest

from lm_eval_pruned.model_wrappers.vllm_arguments import (
    check_vllm_arguments,
    loader_config,
)
from lm_eval_pruned.pruning.arguments import PruneArguments


def test_the_loader_is_told_what_was_asked():
    asked = PruneArguments(ratio=2.0, criterion="ppm", skip_layers=[0, "15"])
    told = loader_config(asked)
    assert told == {"ratio": 2.0, "skip_layers": [0, "15"]}
    assert PruneArguments.taken_from(dict(told)) == asked


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"load_format": "dummy"}, "load_format=dummy cannot be combined with pruning"),
        ({"gguf_file": "a.gguf"}, "gguf_file=a.gguf cannot be combined with pruning"),
        ({"quantization": "awq"}, "quantization=awq is for checkpoints that are"),
    ],
)
def test_what_would_bypass_the_loader_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_vllm_arguments(arguments)


def test_what_quantises_while_loading_is_taken():
    check_vllm_arguments({"quantization": "fp8", "load_format": "pruned"})


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
