"""The table of architectures says what its script finds."""

from __future__ import annotations

import pytest
import transformers

from tests.helpers.architectures import TABLE, candidates, listed, script


PRUNED = ("cohere", "gemma3", "aria_text", "t5gemma")


def test_the_table_is_whole():
    assert len(listed("Pruned")) >= 60
    assert {"llama", "phi3", "glm4", "t5", "umt5", "mixtral"} <= listed("Pruned")
    assert {"gpt2", "bert", "opt", "bitnet"} <= listed("Refused")


@pytest.mark.parametrize(
    ("model_type", "outcome"),
    [
        *(pytest.param(each, "pruned", marks=pytest.mark.slow) for each in PRUNED),
        ("gpt2", "refused"),
        ("bitnet", "refused"),
    ],
)
def test_a_listed_architecture_is_pruned_or_refused(model_type, outcome):
    assert script().check(*candidates()[model_type]).outcome == outcome
    assert model_type in listed(outcome.capitalize())


@pytest.mark.slow
def test_the_table_is_what_the_script_writes_today():
    """Every class of the installed transformers either equals slicing by hand or is refused."""
    if f"transformers {transformers.__version__}, " not in TABLE:
        pytest.skip("the table was written with another version of transformers")
    found = {name: script().check(*row).outcome for name, row in candidates().items()}
    for outcome in ("pruned", "refused"):
        own = {name for name, each in found.items() if each == outcome}
        assert own == listed(outcome.capitalize())
