"""The notice about kept widths that CUDA computes with slowly."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import PreTrainedModel

from lm_eval_pruned import load_pruned
from tests.helpers.layouts import save_family


@pytest.fixture
def notices(monkeypatch, caplog):
    """Load a model that passes for one on a card, and return what is said of its speed."""
    on_cuda = property(lambda model: torch.device("cuda"))
    monkeypatch.setattr(PreTrainedModel, "device", on_cuda)

    def of(folder, dtype="bfloat16", **arguments) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_pruned(str(folder), dtype=dtype, **arguments)
        return [each for each in caplog.messages if each.endswith("for speed.")]

    return of


@pytest.mark.parametrize(
    ("arguments", "kept", "multiple"),
    [
        # Of 88 neurons.
        ({"prune_percent": 40}, 53, 8),
        ({"prune_percent": 40, "multiple_of": 3}, 51, 24),
    ],
)
def test_a_multiple_is_named(arguments, kept, multiple, tiny_llama, notices):
    (message,) = notices(tiny_llama, **arguments)
    assert message.startswith(
        f"{kept} neurons are no multiple of 8, which CUDA's kernels"
    )
    assert message.endswith(f"add multiple_of={multiple} for speed.")
    assert not notices(tiny_llama, **{**arguments, "multiple_of": multiple})


@pytest.mark.parametrize(
    "arguments",
    [{}, {"intermediate_size": 80}, {"prune_percent": 40, "dtype": "float32"}],
)
def test_other_widths_and_dtypes_get_no_notice(arguments, tiny_llama, notices):
    assert not notices(tiny_llama, **arguments)


def test_layers_that_keep_their_width_get_no_notice(tmp_path, notices):
    save_family(tmp_path, "llama", 87)
    assert not notices(tmp_path, intermediate_size=80, layers="0")
