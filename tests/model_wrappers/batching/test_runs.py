"""What the harness does around requests keeps working on the fast paths."""

from __future__ import annotations

import json

import pytest
from lm_eval.models.huggingface import HFLM

from tests.helpers import checkpoints, evaluations
from tests.helpers.answering import GENERATED


def loaded(cls, pretrained, **arguments):
    arguments = {"device": "cpu", "max_length": 256, "batch_size": 1} | arguments
    return cls(str(pretrained), **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    "short",
    ["none", "slots", "shared"],
)
def test_two_processes_that_share_a_model(tiny_llama, tmp_path, short):
    """They have to run the same passes: one that is short of memory cannot go on alone."""
    module = [*evaluations.TWO_PROCESSES, "-m", "tests.helpers.split_model"]
    command, root = [*module, tiny_llama, tmp_path, short], checkpoints.ROOT
    done = evaluations.run(command, root, check=short == "none")
    if short != "none":
        assert "RuntimeError: CUDA out of memory" in done.stderr
        assert "SIGABRT" not in done.stderr
        return
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert first == second
    answers, record = first
    assert answers == GENERATED.ask(loaded(HFLM, tiny_llama, max_length=64))
    assert record["requests"] == {"slots": record["slots"]} == {"slots": len(answers)}
