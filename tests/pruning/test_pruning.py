"""The heart of the project: pruned on load, pruned in memory and sliced by hand are one model."""

from __future__ import annotations

import copy
import hashlib
import logging
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning import criteria
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers import by_hand, checkpoints
from tests.helpers.comparing import assert_same_model


#: Every family names a config key of its MLP's bias, or None where it has none.
FAMILIES = {
    "llama": "mlp_bias",
    "mistral": None,
    "qwen2": None,
    "qwen3": None,
    "gemma": None,
    "gemma2": None,
    "gemma3_text": None,
    "smollm3": "mlp_bias",
    "olmo2": None,
    "granite": "mlp_bias",
    "stablelm": None,
    "cohere": None,
    "seed_oss": "mlp_bias",
    "ernie4_5": "use_bias",
}
#: Criteria that need no text, and an alias.
CRITERIA = sorted({*criteria.CRITERIA} - {*criteria.CALIBRATED} | {"ppm", "random"})


@st.composite
def architectures(draw):
    """Draw the arguments of `save_tiny` for a small model."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    hidden_size = draw(st.sampled_from([16, 32, 48]))
    overrides = {
        "hidden_size": hidden_size,
        "head_dim": hidden_size // 2,
        "intermediate_size": draw(st.integers(1, 70)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": 2,
        "num_key_value_heads": draw(st.sampled_from([1, 2])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if FAMILIES[family]:
        overrides[FAMILIES[family]] = draw(st.booleans())
    return family, overrides


def logits(model, seed=0):
    tokens = torch.randint(0, 250, (2, 7), generator=torch.manual_seed(seed))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.smoke
@settings(max_examples=settings.default.max_examples // 3)
@given(
    architecture=architectures(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    criterion=st.sampled_from(CRITERIA),
    seed=st.integers(0, 1000),
    sharded=st.booleans(),
    data=st.data(),
)
def test_on_load_in_memory_and_by_hand_are_one_model(
    architecture, dtype, criterion, seed, sharded, data
):
    family, overrides = architecture
    width = data.draw(st.integers(1, overrides["intermediate_size"]), label="width")
    arguments = {"intermediate_size": width, "criterion": criterion, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save_tiny(
            Path(folder),
            family,
            seed=seed,
            dtype=dtype,
            max_shard_size="3KB" if sharded else "5GB",
            **overrides,
        )
        full = AutoModelForCausalLM.from_pretrained(folder)
        on_load = load_pruned(folder, **arguments)
    assert full.dtype == dtype
    in_memory = prune_model(copy.deepcopy(full), **arguments)
    record = on_load.prune_record
    assert_same_model(on_load, in_memory)
    assert record.digest == in_memory.prune_record.digest
    assert record.parameters_before == sum(p.numel() for p in full.parameters())
    assert record.parameters_after == sum(p.numel() for p in on_load.parameters())
    assert (
        on_load.config.intermediate_size == in_memory.config.intermediate_size == width
    )

    if width == overrides["intermediate_size"]:
        assert_same_model(on_load, full)
        return
    kept = by_hand.listed(record.kept)
    if criterion in ("maw", "ppm"):
        kept = by_hand.best(width)
    sliced = by_hand.narrow(copy.deepcopy(full), kept)
    assert_same_model(on_load, sliced)
    assert torch.equal(logits(on_load), logits(in_memory))
    assert torch.equal(logits(on_load), logits(sliced))


@settings(max_examples=settings.default.max_examples // 3)
@given(architecture=architectures(), seed=st.integers(0, 1000), data=st.data())
def test_pruning_is_silencing_the_removed_neurons(architecture, seed, data):
    family, overrides = architecture
    width = data.draw(st.integers(1, overrides["intermediate_size"]))
    full = checkpoints.tiny_model(checkpoints.tiny_config(family, **overrides), seed)
    full = full.double()
    pruned = prune_model(copy.deepcopy(full), intermediate_size=width)
    layers = full.config.num_hidden_layers
    kept = pruned.prune_record.kept or [torch.arange(width)] * layers
    # In float64 both sum the same terms, in another order: only rounding differs.
    torch.testing.assert_close(
        logits(pruned),
        logits(by_hand.silence(full, by_hand.listed(kept))),
        rtol=1e-9,
        atol=1e-9,
    )


def test_a_nested_text_config_is_narrowed_and_other_towers_are_not(tmp_path):
    from transformers import (
        AutoModelForImageTextToText,
        Gemma3Config,
        Gemma3ForConditionalGeneration,
    )

    text = checkpoints.tiny_config("gemma3_text").to_dict()
    config = Gemma3Config(
        text_config=text,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 88,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    full = Gemma3ForConditionalGeneration(config).eval()
    full.save_pretrained(tmp_path)
    pruned = load_pruned(
        str(tmp_path), ratio=1.5, auto_class=AutoModelForImageTextToText
    )
    assert pruned.config.text_config.intermediate_size == 48
    assert pruned.config.vision_config.intermediate_size == 88
    assert_same_model(pruned, prune_model(copy.deepcopy(full), ratio=1.5))
    assert torch.equal(
        logits(pruned), logits(prune_model(copy.deepcopy(full), ratio=1.5))
    )


def test_a_pruned_model_saves_and_opens_in_stock_transformers(tiny_llama, tmp_path):
    pruned = load_pruned(str(tiny_llama), prune_percent=40)
    pruned.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values())
    assert_same_model(pruned, again)
    assert torch.equal(logits(pruned), logits(again))


def test_the_pruned_model_can_be_pruned_again(tiny_llama, tmp_path):
    load_pruned(str(tiny_llama), ratio=2).save_pretrained(tmp_path)
    twice = load_pruned(str(tmp_path), ratio=1)
    assert_same_model(twice, load_pruned(str(tiny_llama), ratio=1))


def test_the_digest_is_what_its_docstring_says(tiny_llama):
    record = load_pruned(str(tiny_llama), ratio=1).prune_record
    packed = b"".join(
        struct.pack("<q", index) for kept in record.kept for index in kept.tolist()
    )
    assert record.digest == hashlib.sha256(packed).hexdigest()
    assert record.as_dict() == {
        "criterion": "maw",
        "asked": {"ratio": "1"},
        "multiple_of": 1,
        "layers": 3,
        "hidden_size": 32,
        "intermediate_size_before": 88,
        "intermediate_size_after": 32,
        "expansion_ratio_before": 2.75,
        "expansion_ratio_after": 1.0,
        "parameters_before": record.parameters_after + 3 * 3 * 56 * 32,
        "parameters_after": record.parameters_after,
        "kept_digest": record.digest,
        "groups": [
            {
                "kind": "dense",
                "config_key": "intermediate_size",
                "mlps": 3,
                "width_before": 88,
                "width_after": 32,
            }
        ],
        "config_expresses_widths": True,
    }


def test_the_baseline_records_that_nothing_was_removed(tiny_llama):
    record = load_pruned(str(tiny_llama)).prune_record
    assert record.digest is None
    assert record.as_dict()["criterion"] is None
    assert record.parameters_before == record.parameters_after
    assert "baseline, nothing removed" in record.as_table()


def test_the_random_control_records_its_seed(tiny_llama):
    # Read from a command line, the name is another object than the one in the code.
    for criterion in ("random", "".join(list("random"))):
        model = load_pruned(str(tiny_llama), ratio=1, criterion=criterion, seed=4)
        assert model.prune_record.as_dict()["seed"] == 4
    for criterion in ("maw", "vow"):
        model = load_pruned(str(tiny_llama), ratio=1, criterion=criterion, seed=4)
        assert "seed" not in model.prune_record.as_dict()


def test_layers_that_are_not_pruned_keep_their_very_parameters():
    model = checkpoints.tiny_model(checkpoints.tiny_config(intermediate_size=300))
    before = dict(model.named_parameters())
    prune_model(model, ratio=1, layers=1)
    for name, parameter in model.named_parameters():
        assert (parameter is before[name]) is ("layers.1.mlp" not in name), name


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_models_without_a_glu_are_refused_by_name(family):
    model = checkpoints.tiny_model(checkpoints.tiny_config(family))
    with pytest.raises(UnsupportedModelError, match="has no GLU-MLP") as error:
        prune_model(model, ratio=1)
    assert type(model).__name__ in str(error.value)
    assert family in str(error.value)


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_cannot_be_ranked_are_named(tiny_llama, projection, bad):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = copy.deepcopy(model)
    getattr(model.model.layers[1].mlp, projection).weight.data[3, 5] = bad
    before.load_state_dict(model.state_dict())
    name = rf"model\.layers\.1\.mlp\.{projection}\.weight holds 1 NaN or infinite"
    with pytest.raises(ValueError, match=name):
        prune_model(model, ratio=1)
    assert model.config.intermediate_size == 88
    for one, other in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_large_finite_weights_are_not_mistaken_for_infinite_ones(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers[0].mlp.gate_proj.weight.data.fill_(3e38)
    assert prune_model(model, ratio=1).prune_record.kept[0].tolist() == list(range(32))


def test_a_quantised_model_is_refused(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)

    class Linear4bit(torch.nn.Module):
        weight = torch.zeros(88, 32, dtype=torch.int8)

    model.model.layers[2].mlp.up_proj = Linear4bit()
    with pytest.raises(UnsupportedModelError, match="Linear4bit"):
        prune_model(model, ratio=1)


def test_pruning_in_memory_logs_nothing_and_keeps_requires_grad(tiny_llama, caplog):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        prune_model(model, ratio=1)
    assert not caplog.records
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[0].mlp.gate_proj.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_run_one_by_one_just_where_their_rows_are_unaligned(dtype, caplog):
    config = checkpoints.tiny_config(
        "mixtral", num_hidden_layers=1, intermediate_size=24, num_local_experts=2
    )
    full = checkpoints.tiny_model(config).to(dtype)
    assert full.config._experts_implementation == "grouped_mm"
    multiple = {torch.float32: 4, torch.bfloat16: 8}[dtype]
    for width in range(1, 25):
        caplog.clear()
        pruned = prune_model(copy.deepcopy(full), intermediate_size=width)
        aligned = width % multiple == 0
        chosen = pruned.config._experts_implementation
        assert chosen == ("grouped_mm" if aligned else "eager"), width
        assert len(caplog.messages) == (0 if aligned else 1)
        for message in caplog.messages:
            assert f"The experts of {width} neurons run one by one" in message
            assert f"a multiple of {multiple}: add multiple_of={multiple} f" in message
        assert logits(pruned).isfinite().all()


def test_experts_that_run_otherwise_are_left_alone(caplog):
    config = checkpoints.tiny_config(
        "mixtral", num_hidden_layers=1, intermediate_size=24, num_local_experts=2
    )
    full = checkpoints.tiny_model(config)
    for implementation in ("batched_mm", "eager", "sonicmoe"):
        full.set_experts_implementation(implementation)
        pruned = prune_model(copy.deepcopy(full), intermediate_size=7)
        assert pruned.config._experts_implementation == implementation
    assert not caplog.messages


def test_the_table_of_a_record_says_what_was_done(tiny_llama):
    record = load_pruned(str(tiny_llama), ratio=1, layers="0,2").prune_record
    assert record.as_table().splitlines() == [
        "|                 |        before|         after|",
        "|-----------------|-------------:|-------------:|",
        "|expansion ratio  |        2.7500|        1.0000|",
        "|intermediate size|            88|            32|",
        f"|parameters       |{record.parameters_before:>14,}|{record.parameters_after:>14,}|",
        f"ratio=1, criterion=maw, 3 layers (0,2 pruned), kept digest {record.digest[:12]}",
    ]
    baseline = load_pruned(str(tiny_llama)).prune_record.as_table().splitlines()
    assert baseline[-1] == "baseline, nothing removed, 3 layers, kept digest none"


@pytest.mark.parametrize(
    ("layers", "subject"),
    [("1", "model.layers.1.mlp"), ("0,2", "Each of 2 GLU-MLPs")],
)
def test_widths_that_the_config_cannot_express_are_told(
    tiny_llama, caplog, layers, subject
):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    record = prune_model(model, ratio=1, layers=layers).prune_record
    assert not record.config_expresses_widths
    (message,) = caplog.messages
    assert message.startswith(f"{subject} keeps a width of its own, which intermediate")
    assert vars(model.config)["intermediate_size"] == 88
    assert [len(kept) for kept in record.kept] == [
        32 if str(layer) in layers else 88 for layer in range(3)
    ]


def test_pruned_weights_are_leaves_that_can_be_trained(tiny_llama):
    model = prune_model(AutoModelForCausalLM.from_pretrained(tiny_llama), ratio=1)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    model(torch.arange(12)[None]).logits.sum().backward()
    mlp = model.model.layers[1].mlp
    for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        assert projection.weight.grad.shape == projection.weight.shape
