"""What ``pruned-vllm`` takes and refuses, without vLLM."""

from __future__ import annotations

import re
import sys

import pytest

from lm_eval_pruned.model_wrappers.vllm_arguments import (
    check_vllm_arguments,
    split_arguments,
)


def test_arguments_of_pruning_are_told_from_those_of_vllm():
    own, others = split_arguments(
        {"ratio": 2.0, "seed": 3, "max_model_len": 512, "layers": None}
    )
    assert own == {"ratio": 2.0, "seed": 3}
    assert others == {"max_model_len": 512}


def test_layers_that_the_harness_split_at_commas_are_put_together():
    own, others = split_arguments({"skip_layers": 0, "15": "", "ratio": 2})
    assert own == {"skip_layers": [0, "15"], "ratio": 2}
    assert others == {}


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
