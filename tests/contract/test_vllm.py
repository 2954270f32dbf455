"""docs/vllm.md where vLLM is not installed; `tests/model_wrappers` has the tests with the engine."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from lm_eval.api.registry import get_model


pytestmark = pytest.mark.skipif(
    find_spec("vllm") is not None, reason="vLLM is installed"
)


def test_without_vllm_one_sentence_says_how_to_get_it():
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install 'lm-eval-pruned\[vllm\]'"
    ) as error:
        get_model("pruned-vllm")
    assert "\n" not in str(error.value)
