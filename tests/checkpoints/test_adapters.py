"""``peft=ADAPTER``: applied to the pruned model, or merged before pruning."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers import by_hand
from tests.helpers.checkpoints import byte_tokenizer, tiny_config, tiny_model
from tests.helpers.layouts import logits
from tests.helpers.ways_to_load import assert_state, forbid_reading, write_texts


MLP = ["gate_proj", "up_proj", "down_proj"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=[*MLP, "q_proj"])
RANKS = {"rank_pattern": {"down_proj": 2}, "use_rslora": True}
METHODS = {
    "lora": LORA,
    "lora-rank-pattern": LoraConfig(r=4, target_modules=MLP, **RANKS),
    "dora": LoraConfig(r=4, target_modules=MLP, use_dora=True),
    "ia3": IA3Config(target_modules=[*MLP, "k_proj"], feedforward_modules=MLP[1:]),
    "loha": LoHaConfig(r=4, alpha=8, target_modules=MLP),
}
every_method = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
BEFORE = {"peft_stage": "before"}


@pytest.fixture
def adapter(tmp_path):
    """Write an adapter for MLPs of a width, every tensor of it drawn; return its folder."""

    def written(config=LORA, width=88):
        base = tiny_model(tiny_config(intermediate_size=width))
        adapted = get_peft_model(base, config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    drawn = torch.randn_like(parameter) * 0.3
                    parameter.copy_(drawn + ("ia3" in name))
        adapted.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    return written


def whole_model(tiny_llama):
    """Return the unpruned model as HFLM hands it to peft: as long as the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(len(byte_tokenizer()))
    return model


def hf_model(tiny_llama, **arguments):
    return PrunedHFLM(pretrained=str(tiny_llama), device="cpu", **arguments).model


@every_method
def test_after_equals_merging_into_the_sliced_model(tiny_llama, adapter, config):
    folder = adapter(config, 64)
    model = hf_model(tiny_llama, ratio=2, peft=folder)
    assert isinstance(model, PeftModel)
    plain = prune_model(whole_model(tiny_llama), ratio=2)
    expected = logits(plain.double())
    applied = PeftModel.from_pretrained(plain.float(), folder)
    assert torch.equal(logits(model), logits(applied))
    # Merging rounds differently; in float64 the difference vanishes.
    merged = logits(applied.double().merge_and_unload())
    torch.testing.assert_close(logits(model.double()), merged)
    assert not torch.allclose(merged, expected)


@every_method
@pytest.mark.parametrize("criterion", ["maw", "act"])
def test_before_equals_slicing_the_merged_model(
    tiny_llama, tmp_path, adapter, config, criterion
):
    asked, folder = {"ratio": 2, "criterion": criterion}, adapter(config)
    if criterion == "act":
        asked["calibration"] = write_texts(tmp_path / "texts.jsonl")
    model = hf_model(tiny_llama, peft=folder, **BEFORE, **asked)
    merged = PeftModel.from_pretrained(whole_model(tiny_llama), folder)
    merged = merged.merge_and_unload()
    if criterion == "act":
        sliced = prune_model(merged, **asked, tokenizer=byte_tokenizer())
    else:
        sliced = by_hand.narrow(merged, by_hand.best(64))
    assert_state(model, sliced.state_dict())
    assert torch.equal(logits(model), logits(sliced))
    # The adapter decides: another kept set than without it.
    plain = load_pruned(str(tiny_llama), **asked)
    assert model.prune_record.digest != plain.prune_record.digest


def test_an_adapter_that_leaves_the_mlps_alone_fits_any_width(tiny_llama, adapter):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = hf_model(tiny_llama, ratio=2, peft=adapter(config))
    assert isinstance(model, PeftModel)


@every_method
@pytest.mark.parametrize(
    ("trained_on", "arguments", "word"),
    [
        (64, BEFORE, "64 neurons, but .*MLPs of 88 .*or peft_stage=after"),
        (40, BEFORE, "40 neurons, but .*MLPs of 88 .*intermediate_size=40"),
        (64, {"ratio": None}, "64 neurons, but .*MLPs of 88"),
        (88, {**BEFORE, "load_in_8bit": True}, "load_in_8bit quantises"),
        (88, {**BEFORE, "peft": None}, "peft_stage=before says when"),
        (88, {"peft_stage": "during"}, "peft_stage=during says when"),
        (88, {**BEFORE, "peft": "nowhere", "ratio": 9}, "ratio=9 is above"),
        (88, {"peft": "."}, r"peft=\. is not an adapter"),
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


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_an_adapter_whose_weights_are_damaged(
    tiny_llama, tmp_path, adapter, monkeypatch, damage
):
    folder, file = adapter(), tmp_path / "adapter" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(content[:100])
    forbid_reading(monkeypatch)
    with pytest.raises(ValueError, match=f"peft={folder} is not an adapter"):
        hf_model(tiny_llama, ratio=2, peft=folder)
