"""What engines that read layers one after the other cannot wait for."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.checkpoints.stream import check_buildable
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"allocation": "global"}, "allocation=global"),
        ({"criterion": "best", "calibration": "texts.jsonl"}, "criterion=best"),
    ],
)
def test_an_engine_cannot_wait_for_the_whole_model(tiny_llama, arguments, named):
    asked = PruneArguments(ratio=2, **arguments)
    request = LoadRequest.resolve(AutoModelForCausalLM, str(tiny_llama), asked, {})
    with pytest.raises(
        UnsupportedModelError, match=f"^{named} looks at the whole model before"
    ):
        check_buildable(request)
