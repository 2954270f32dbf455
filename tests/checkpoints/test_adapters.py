"""``peft=ADAPTER``: applied to the pruned model, or merged before pruning."""

from __future__ import annotations

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers import by_hand, checkpoints, evaluations
from tests.helpers.checkpoints import byte_tokenizer, tiny_config, tiny_model
from tests.helpers.comparing import assert_same_model
from tests.helpers.layouts import logits
from tests.helpers.ways_to_load import forbid_reading, write_texts


MLP = ["gate_proj", "up_proj", "down_proj"]
METHODS = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=[*MLP, "q_proj"]),
    "lora-rank-pattern": LoraConfig(
        r=4, target_modules=MLP, rank_pattern={"down_proj": 2}, use_rslora=True
    ),
    "dora": LoraConfig(r=4, target_modules=MLP, use_dora=True),
    "ia3": IA3Config(
        target_modules=[*MLP, "k_proj"], feedforward_modules=["down_proj", "up_proj"]
    ),
    "loha": LoHaConfig(r=4, alpha=8, target_modules=MLP),
}


def save_adapter(folder, base, config):
    """Write an adapter whose every tensor is drawn, so that it changes the model."""
    adapted = get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("ia3" in name))
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter(tmp_path):
    """Write an adapter of a method for MLPs of a width, and return its folder."""

    def written(config=METHODS["lora"], width=88):
        base = tiny_model(tiny_config(intermediate_size=width))
        return save_adapter(tmp_path / "adapter", base, config)

    return written


@pytest.fixture(params=METHODS)
def config(request):
    return METHODS[request.param]


def whole_model(tiny_llama):
    """Return the unpruned model as HFLM hands it to peft: as long as the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(len(byte_tokenizer()))
    return model


def merged_model(tiny_llama, adapter):
    adapted = PeftModel.from_pretrained(whole_model(tiny_llama), adapter)
    return adapted.merge_and_unload()


def hf_model(tiny_llama, **arguments):
    return PrunedHFLM(pretrained=str(tiny_llama), device="cpu", **arguments)


def test_after_equals_merging_into_the_sliced_model(tiny_llama, adapter, config):
    folder = adapter(config, 64)
    model = hf_model(tiny_llama, ratio=2, peft=folder)
    assert isinstance(model.model, PeftModel)
    assert model.get_model_info()["pruning"]["intermediate_size_after"] == 64
    plain = prune_model(whole_model(tiny_llama), ratio=2)
    expected = logits(plain.double())
    applied = PeftModel.from_pretrained(plain.float(), folder)
    assert torch.equal(logits(model.model), logits(applied))
    # Merging rounds differently; in float64 the difference vanishes.
    merged = logits(applied.double().merge_and_unload())
    torch.testing.assert_close(logits(model.model.double()), merged)
    assert not torch.allclose(merged, expected)


def test_before_equals_slicing_the_merged_model(tiny_llama, adapter, config):
    folder = adapter(config)
    model = hf_model(tiny_llama, ratio=2, peft=folder, peft_stage="before").model
    assert not isinstance(model, PeftModel)
    sliced = by_hand.narrow(merged_model(tiny_llama, folder), by_hand.best(64))
    assert_same_model(model, sliced)
    assert torch.equal(logits(model), logits(sliced))
    # The adapter decides: another kept set than without it.
    plain = load_pruned(str(tiny_llama), ratio=2)
    assert model.prune_record.digest != plain.prune_record.digest


def test_before_can_be_calibrated(tiny_llama, tmp_path, adapter):
    asked = {"ratio": 2, "criterion": "act"}
    asked["calibration"] = write_texts(tmp_path / "t.jsonl")
    model = hf_model(tiny_llama, peft=adapter(), peft_stage="before", **asked).model
    merged = merged_model(tiny_llama, adapter())
    expected = prune_model(merged, **asked, tokenizer=byte_tokenizer())
    assert model.prune_record.digest == expected.prune_record.digest


def test_an_adapter_that_leaves_the_mlps_alone_fits_any_width(tiny_llama, adapter):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = hf_model(tiny_llama, ratio=2, peft=adapter(config))
    assert isinstance(model.model, PeftModel)


BEFORE = {"peft_stage": "before"}


@pytest.mark.parametrize(
    ("trained_on", "arguments", "word"),
    [
        (88, {}, "88 neurons, but .*MLPs of 64 .*or peft_stage=before"),
        (40, {}, "40 neurons, but .*MLPs of 64 .*or intermediate_size=40"),
        (120, {}, "120 neurons, but .*MLPs of 64 .*of 64 neurons"),
        (64, BEFORE, "64 neurons, but .*MLPs of 88 .*or peft_stage=after"),
        (40, BEFORE, "40 neurons, but .*MLPs of 88 .*intermediate_size=40"),
        (64, {"ratio": None}, "64 neurons, but .*MLPs of 88"),
        (88, {**BEFORE, "load_in_8bit": True}, "load_in_8bit quantises"),
        (88, {**BEFORE, "peft": None}, "peft_stage=before says nothing"),
        (88, {"peft_stage": "during"}, "peft_stage=during says nothing"),
        (88, {**BEFORE, "peft": "nowhere", "ratio": 9}, "ratio=9 is above"),
        (88, {"peft": "."}, r"peft=\. is no adapter"),
    ],
)
def test_what_does_not_fit_is_told_before_weights_are_read(
    tiny_llama, adapter, config, monkeypatch, trained_on, arguments, word
):
    given = {"ratio": 2, "peft": adapter(config, trained_on)} | arguments
    given = {name: value for name, value in given.items() if value is not None}
    forbid_reading(monkeypatch)
    with pytest.raises(ValueError, match=word):
        hf_model(tiny_llama, **given)


def test_an_adapter_whose_weights_are_missing_or_damaged(
    tiny_llama, tmp_path, adapter, monkeypatch
):
    folder = adapter()
    forbid_reading(monkeypatch)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"peft={folder} is no adapter"):
            hf_model(tiny_llama, ratio=2, peft=folder)
        file.unlink(missing_ok=True)


@pytest.mark.slow
def test_through_the_harness(tiny_llama, tmp_path, adapter):
    scores, config = evaluations.evaluate(
        "pruned-hf",
        f"pretrained={tiny_llama},ratio=2,peft={adapter()},peft_stage=before",
    )
    merged = prune_model(merged_model(tiny_llama, adapter()), ratio=2)
    merged.save_pretrained(tmp_path / "by-hand")
    checkpoints.byte_tokenizer().save_pretrained(tmp_path / "by-hand")
    expected, _ = evaluations.evaluate("hf", f"pretrained={tmp_path / 'by-hand'}")
    assert scores == expected
    assert config["pruning"]["kept_digest"] == merged.prune_record.digest
