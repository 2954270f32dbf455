"""The notice about kept widths that a device computes with slowly."""

from __future__ import annotations

import logging

import pytest
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning import alignment
from tests.helpers.layouts import save_family


@pytest.fixture
def on_cuda(monkeypatch):
    """Let models pass for ones on a card."""
    monkeypatch.setattr(alignment, "device_types", lambda model: {"cuda"})


def notices(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.endswith(".alignment")]


@pytest.mark.parametrize("route", ["load", "prune"])
@pytest.mark.parametrize(
    ("arguments", "kept", "multiple", "width"),
    [
        # Of 88 neurons.
        ({"prune_percent": 40}, 53, 8, 48),
        ({"prune_percent": 40, "multiple_of": 3}, 51, 24, 48),
        ({"intermediate_size": 84}, 84, 8, 80),
    ],
)
def test_the_nearest_multiple_is_named(
    route, arguments, kept, multiple, width, tiny_llama, on_cuda, caplog
):
    with caplog.at_level(logging.WARNING):
        if route == "load":
            load_pruned(str(tiny_llama), dtype="bfloat16", **arguments)
        else:
            model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="bfloat16")
            prune_model(model, **arguments)
    (message,) = notices(caplog)
    assert message == (
        f"{kept} neurons are no multiple of 8, which CUDA's kernels for 16-bit weights want: "
        f"add multiple_of={multiple} ({width} neurons) for speed."
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        followed = {**arguments, "multiple_of": multiple}
        model = load_pruned(str(tiny_llama), dtype="bfloat16", **followed)
    assert model.config.intermediate_size == width
    assert not notices(caplog)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"intermediate_size": 80},
        {"prune_percent": 40, "multiple_of": 8},
        # No multiple of 8 is left.
        {"intermediate_size": 5},
    ],
)
def test_other_widths_get_no_notice(arguments, tiny_llama, on_cuda, caplog):
    with caplog.at_level(logging.WARNING):
        load_pruned(str(tiny_llama), dtype="bfloat16", **arguments)
    assert not notices(caplog)


def test_other_devices_and_dtypes_get_no_notice(tiny_llama, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        load_pruned(str(tiny_llama), dtype="bfloat16", prune_percent=40)
        monkeypatch.setattr(alignment, "device_types", lambda model: {"cuda"})
        load_pruned(str(tiny_llama), dtype="float32", prune_percent=40)
    assert not notices(caplog)


def test_layers_that_keep_their_width_get_no_notice(tmp_path, on_cuda, caplog):
    save_family(tmp_path, "llama", 87)
    with caplog.at_level(logging.WARNING):
        load_pruned(str(tmp_path), dtype="bfloat16", intermediate_size=80, layers="0")
    assert not notices(caplog)


def test_stacked_experts_have_a_notice_of_their_own(tmp_path, on_cuda, caplog):
    save_family(tmp_path, "qwen2_moe", 64)
    with caplog.at_level(logging.WARNING):
        model = load_pruned(str(tmp_path), dtype="bfloat16", intermediate_size=44)
    # Shared experts keep ceil(129 * 44 / 64) = 89, or ceil(129 * 40 / 64) = 81 as 80.
    assert caplog.text.count("The experts of 44 neurons run one by one") == 1
    (message,) = notices(caplog)
    assert message.startswith("89 neurons are no multiple of 8,")
    assert "multiple_of=8 (80 neurons)" in message
    model.save_pretrained(tmp_path / "saved")
    again = load_pruned(str(tmp_path / "saved"))
    assert again.config._experts_implementation == "eager"
