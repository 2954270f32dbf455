"""``peft=ADAPTER``: applied to the pruned model, or merged before pruning."""

from __future__ import annotations

import json

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
from tests.helpers import checkpoints, evaluations


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


@pytest.fixture(params=METHODS)
def config(request):
    return METHODS[request.param]


def logits(model) -> torch.Tensor:
    tokens = torch.arange(1, 40).view(3, 13)
    with torch.no_grad():
        return model(input_ids=tokens).logits


def whole_model(tiny_llama):
    """Return the unpruned model as HFLM hands it to peft: as long as the tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(len(checkpoints.byte_tokenizer()))
    return model


def hf_model(tiny_llama, **arguments):
    return PrunedHFLM(pretrained=str(tiny_llama), device="cpu", **arguments)


def test_after_equals_merging_into_the_sliced_model(tiny_llama, tmp_path, config):
    sliced = load_pruned(str(tiny_llama), ratio=2)
    adapter = save_adapter(tmp_path / "adapter", sliced, config)
    model = hf_model(tiny_llama, ratio=2, peft=adapter)
    assert isinstance(model.model, PeftModel)
    assert model.get_model_info()["pruning"]["intermediate_size_after"] == 64
    base = prune_model(whole_model(tiny_llama), ratio=2)
    applied = PeftModel.from_pretrained(base, adapter)
    assert torch.equal(logits(model.model), logits(applied))
    # Merging rounds differently; in float64 the difference vanishes.
    by_hand = applied.double().merge_and_unload()
    torch.testing.assert_close(logits(model.model.double()), logits(by_hand))
    plain = prune_model(whole_model(tiny_llama), ratio=2).double()
    assert not torch.allclose(logits(by_hand), logits(plain))


def test_before_equals_slicing_the_merged_model(tiny_llama, tmp_path, config):
    adapter = save_adapter(tmp_path / "adapter", load_pruned(str(tiny_llama)), config)
    model = hf_model(tiny_llama, ratio=2, peft=adapter, peft_stage="before")
    assert not isinstance(model.model, PeftModel)
    merged = PeftModel.from_pretrained(
        whole_model(tiny_llama), adapter
    ).merge_and_unload()
    scores, sliced = [], merged
    for layer in sliced.model.layers:
        mlp = layer.mlp
        peaks = [
            weight.max(dim=1).values + weight.min(dim=1).values.abs()
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight)
        ]
        scores.append(sum(peaks))
        kept = scores[-1].topk(64).indices.sort().values
        mlp.gate_proj.weight.data = mlp.gate_proj.weight.data[kept]
        mlp.up_proj.weight.data = mlp.up_proj.weight.data[kept]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, kept]
    for name, tensor in sliced.state_dict().items():
        assert torch.equal(tensor, model.model.state_dict()[name]), name
    assert torch.equal(logits(model.model), logits(sliced))
    # The adapter decides: another kept set than without it.
    plain = load_pruned(str(tiny_llama), ratio=2)
    assert model.model.prune_record.digest != plain.prune_record.digest


def test_before_can_be_calibrated(tiny_llama, tmp_path):
    adapter = save_adapter(
        tmp_path / "adapter", load_pruned(str(tiny_llama)), METHODS["lora"]
    )
    texts = tmp_path / "t.jsonl"
    texts.write_text(json.dumps({"text": "The tide comes in twice a day."}))
    arguments = {"ratio": 2, "criterion": "act", "calibration": str(texts)}
    model = hf_model(tiny_llama, peft=adapter, peft_stage="before", **arguments)
    merged = PeftModel.from_pretrained(
        whole_model(tiny_llama), adapter
    ).merge_and_unload()
    by_hand = prune_model(merged, **arguments, tokenizer=checkpoints.byte_tokenizer())
    assert model.model.prune_record.digest == by_hand.prune_record.digest


@pytest.fixture
def weights_unread(monkeypatch):
    def read(*arguments):
        pytest.fail("weights were read")

    monkeypatch.setattr("lm_eval_pruned.checkpoints.request.LoadRequest.load", read)


@pytest.mark.parametrize(
    ("trained_on", "arguments", "message"),
    [
        (88, {}, r"MLPs of 88 neurons, but .*MLPs of 64 .*or peft_stage=before"),
        (40, {}, r"MLPs of 40 neurons, but .*MLPs of 64 .*or intermediate_size=40"),
        (
            64,
            {"peft_stage": "before"},
            r"MLPs of 64 neurons, but .*88 .*or peft_stage=after",
        ),
        (
            40,
            {"peft_stage": "before"},
            r"MLPs of 40 neurons, but .*88 .*intermediate_size=40",
        ),
        (120, {}, r"MLPs of 120 neurons, but .*64 .*adapter of 64 neurons"),
    ],
)
def test_another_width_is_told_before_weights_are_read(
    tiny_llama, tmp_path, config, weights_unread, trained_on, arguments, message
):
    base = checkpoints.tiny_model(checkpoints.tiny_config(intermediate_size=trained_on))
    adapter = save_adapter(tmp_path / "adapter", base, config)
    with pytest.raises(ValueError, match=f"peft=.*adapter was trained on {message}"):
        hf_model(tiny_llama, ratio=2, peft=adapter, **arguments)


def test_width_of_an_unpruned_model_counts_too(tiny_llama, tmp_path, weights_unread):
    base = checkpoints.tiny_model(checkpoints.tiny_config(intermediate_size=64))
    adapter = save_adapter(tmp_path / "adapter", base, METHODS["lora"])
    with pytest.raises(ValueError, match="64 neurons, but it is applied to MLPs of 88"):
        hf_model(tiny_llama, peft=adapter)


def test_an_adapter_that_leaves_the_mlps_alone_fits_any_width(tiny_llama, tmp_path):
    base = checkpoints.tiny_model(checkpoints.tiny_config())
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    adapter = save_adapter(tmp_path / "adapter", base, config)
    assert isinstance(hf_model(tiny_llama, ratio=2, peft=adapter).model, PeftModel)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peft_stage": "before"}, "peft_stage=before says nothing: pass peft"),
        (
            {"peft": "x", "peft_stage": "during"},
            "peft_stage=during says nothing",
        ),
        (
            {"peft": "nowhere", "peft_stage": "before", "ratio": 9},
            "ratio=9 is above the model's own",
        ),
    ],
)
def test_arguments(tiny_llama, weights_unread, arguments, message):
    with pytest.raises(ValueError, match=message):
        hf_model(tiny_llama, **{"ratio": 2, **arguments})


def test_a_folder_without_an_adapter(tiny_llama, tmp_path, weights_unread):
    with pytest.raises(ValueError, match=f"peft={tmp_path} is no adapter"):
        hf_model(tiny_llama, ratio=2, peft=str(tmp_path))


def test_an_adapter_whose_weights_are_missing_or_damaged(
    tiny_llama, tmp_path, weights_unread
):
    base = checkpoints.tiny_model(checkpoints.tiny_config())
    adapter = save_adapter(tmp_path / "adapter", base, METHODS["lora"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"peft={adapter} is no adapter"):
            hf_model(tiny_llama, ratio=2, peft=adapter)
        file.unlink(missing_ok=True)


def test_quantising_before_the_merge_is_refused(tiny_llama, tmp_path, weights_unread):
    adapter = save_adapter(
        tmp_path / "adapter",
        checkpoints.tiny_model(checkpoints.tiny_config()),
        METHODS["lora"],
    )
    with pytest.raises(
        ValueError, match="load_in_8bit quantises the model while it lo"
    ):
        hf_model(
            tiny_llama, ratio=2, peft=adapter, peft_stage="before", load_in_8bit=True
        )


@pytest.mark.slow
def test_through_the_harness(tiny_llama, tmp_path):
    adapter = save_adapter(
        tmp_path / "adapter", load_pruned(str(tiny_llama)), METHODS["lora"]
    )
    scores, config = evaluations.evaluate(
        "pruned-hf", f"pretrained={tiny_llama},ratio=2,peft={adapter},peft_stage=before"
    )
    merged = PeftModel.from_pretrained(
        whole_model(tiny_llama), adapter
    ).merge_and_unload()
    prune_model(merged, ratio=2).save_pretrained(tmp_path / "by-hand")
    checkpoints.byte_tokenizer().save_pretrained(tmp_path / "by-hand")
    by_hand, _ = evaluations.evaluate("hf", f"pretrained={tmp_path / 'by-hand'}")
    assert scores == by_hand
    assert config["pruning"]["kept_digest"] == merged.prune_record.digest
