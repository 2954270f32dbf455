"""docs/vllm.md where vLLM is not installed; `test_vllm_engine.py` is for where it is."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from lm_eval.api.registry import get_model

from tests.contract.commands import pruned


pytestmark = pytest.mark.skipif(
    find_spec("vllm") is not None, reason="vLLM is installed"
)


def test_without_vllm_one_sentence_says_how_to_get_it():
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install 'lm-eval-pruned\[vllm\]'"
    ) as error:
        get_model("pruned-vllm")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_sweep_is_refused_before_anything_runs(tiny_llama, tmp_path):
    words = ["--model_args", f"pretrained={tiny_llama}", "--tasks", "pruned_demo"]
    words += ["--prune_percents", 40, "--output_path", tmp_path / "sweep"]
    done = pruned("sweep", "--model", "pruned-vllm", *words)
    assert "run `pip install 'lm-eval-pruned[vllm]'`" in done.sentence
    assert not done.out and not [*tmp_path.iterdir()]
