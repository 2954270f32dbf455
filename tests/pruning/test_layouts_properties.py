"""Every layout of GLU-MLPs: on load, in memory and by hand are the same, bit for bit."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.criteria import CALIBRATED, CRITERIA
from tests.helpers import by_hand
from tests.helpers.checkpoints import auto_class
from tests.helpers.layouts import EAGER, FAMILIES, breadth, logits, save_family


HIDDEN = 32

sizes = st.one_of(
    st.integers(0, 99).map(lambda percent: {"prune_percent": percent}),
    st.integers(1, 12).map(lambda width: {"intermediate_size": width}),
    st.integers(1, 37).map(lambda hundredths: {"ratio": f"0.{hundredths:02}"}),
)


def kept_width(size: dict, width: int) -> int:
    ((name, value),) = size.items()
    if name == "prune_percent":
        return width - math.floor(Fraction(value, 100) * width)
    return value if name == "intermediate_size" else math.ceil(Fraction(value) * HIDDEN)


def assert_same(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(own[name], tensor), name


@pytest.mark.parametrize(
    "family", breadth(FAMILIES, "phi3", "t5", "mixtral", "gpt_oss", "deepseek_v3")
)
@settings(max_examples=settings.default.max_examples // 10)
@given(width=st.integers(12, 20), size=sizes, seed=st.integers(0, 3))
def test_on_load_in_memory_and_by_hand_agree(
    family, width, size, seed, tmp_path_factory
):
    folder = tmp_path_factory.mktemp(family)
    whole = save_family(folder, family, width, seed)
    kept = kept_width(size, width)
    expected, masks = by_hand.sliced(
        whole,
        by_hand.best(lambda path, own: math.ceil(Fraction(own * kept, width))),
    )
    auto = auto_class(whole.config)

    loaded = load_pruned(folder, auto_class=auto, **size, **EAGER)
    in_memory = prune_model(auto.from_pretrained(folder, **EAGER), **size)

    assert_same(loaded, expected)
    assert_same(in_memory, expected)
    assert loaded.prune_record.as_dict() == in_memory.prune_record.as_dict()
    assert loaded.config.to_dict() == in_memory.config.to_dict()
    pruned_logits = logits(loaded)
    assert pruned_logits.isfinite().all()
    assert torch.equal(pruned_logits, logits(in_memory))

    # What is left computes what the whole model computes without the removed neurons.
    with torch.no_grad():
        for name, mask in masks.items():
            whole.get_parameter(name).mul_(mask)
    torch.testing.assert_close(pruned_logits, logits(whole), rtol=1e-3, atol=1e-3)

    saved = tmp_path_factory.mktemp(f"{family}-saved")
    loaded.save_pretrained(saved)
    reloaded = auto.from_pretrained(saved, **EAGER)
    assert_same(reloaded, expected)
    assert torch.equal(pruned_logits, logits(reloaded))
    once_more = load_pruned(saved, auto_class=auto, **EAGER)
    assert_same(once_more, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_sets_are_nested_and_the_own_ratio_is_the_identity(
    family, tmp_path, caplog
):
    whole = save_family(tmp_path, family, 16)
    auto = auto_class(whole.config)
    with caplog.at_level("INFO", logger="lm_eval.pruned"):
        larger, smaller = (
            load_pruned(tmp_path, auto_class=auto, intermediate_size=k, **EAGER)
            for k in (9, 4)
        )
    assert "pruned in memory" not in caplog.text
    for more, fewer in zip(
        larger.prune_record.kept, smaller.prune_record.kept, strict=True
    ):
        assert set(fewer.tolist()) < set(more.tolist())
    assert len({tuple(k.tolist()) for k in smaller.prune_record.kept}) > 1

    same = load_pruned(tmp_path, auto_class=auto, ratio="0.5", **EAGER)
    assert_same(same, whole.state_dict())
    assert same.prune_record.digest is None
    assert torch.equal(logits(same), logits(whole))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_checkpoints_that_stack_experts_load_the_same(family, tmp_path):
    """Some store experts one by one, some as transformers holds them."""
    from safetensors.torch import save_file

    whole = save_family(tmp_path, family, 16)
    expected = load_pruned(tmp_path, prune_percent=40, **EAGER)
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    whole.config.save_pretrained(stacked)
    save_file(whole.state_dict(), stacked / "model.safetensors", {"format": "pt"})
    assert "experts.gate_up_proj" in " ".join(whole.state_dict())
    loaded = load_pruned(stacked, prune_percent=40, **EAGER)
    assert_same(loaded, expected.state_dict())
    assert loaded.prune_record.digest == expected.prune_record.digest


@pytest.mark.parametrize("family", ["phi3", "mixtral", "t5", "gpt_oss"])
@pytest.mark.parametrize("criterion", sorted({*CRITERIA, "random"} - {*CALIBRATED}))
def test_every_criterion_ranks_alike_on_load_and_in_memory(family, criterion, tmp_path):
    whole = save_family(tmp_path, family, 16)
    auto = auto_class(whole.config)
    loaded = load_pruned(
        tmp_path, auto_class=auto, prune_percent=50, criterion=criterion, **EAGER
    )
    in_memory = prune_model(whole, prune_percent=50, criterion=criterion)
    assert_same(loaded, in_memory.state_dict())


@pytest.mark.parametrize("family", ["phi3", "mixtral", "t5", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family, dtype, tmp_path):
    whole = save_family(tmp_path, family, 16)
    auto = auto_class(whole.config)
    loaded = load_pruned(
        tmp_path, auto_class=auto, prune_percent=50, dtype=dtype, **EAGER
    )
    in_memory = prune_model(
        auto.from_pretrained(tmp_path, dtype=dtype, **EAGER), prune_percent=50
    )
    assert_same(loaded, in_memory.state_dict())


def test_t5_keeps_its_float32_projection(tmp_path):
    """In half precision transformers keeps wo in float32."""
    whole = save_family(tmp_path, "t5", 16)
    loaded = load_pruned(
        tmp_path,
        auto_class=auto_class(whole.config),
        prune_percent=50,
        dtype=torch.float16,
    )
    dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
    assert dtypes["encoder.block.0.layer.1.DenseReluDense.wo.weight"] == torch.float32
    assert dtypes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"] == torch.float16


def test_the_record_tells_kinds_apart(tmp_path):
    save_family(tmp_path, "deepseek_v3", 16)
    record = load_pruned(tmp_path, prune_percent=50, **EAGER).prune_record
    assert record.layers == 2
    assert [
        (g.kind, g.config_key, g.mlps, g.width_before, g.width_after)
        for g in record.groups
    ] == [
        ("dense", "intermediate_size", 1, 48, 24),
        ("expert", "moe_intermediate_size", 3, 16, 8),
        ("shared", "moe_intermediate_size", 1, 32, 16),
    ]
    assert record.as_dict()["intermediate_size_after"] == 8
