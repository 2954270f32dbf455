"""docs/layers.md: whole layers left out."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from lm_eval.api.registry import get_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned
from tests.contract.commands import pruned
from tests.contract.test_layers import WIDTH, refusal, widths_of
from tests.helpers.checkpoints import edit_weights, save_tiny
from tests.helpers.ways_to_load import write_texts


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=6)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (2, [0, 1, 2, 5]),
        ("1+3-4", [0, 2, 5]),
        ("[3]", [0, 1, 2, 4, 5]),
        ("3-3", [0, 1, 2, 4, 5]),
        ([3, 4], [0, 1, 2, 5]),
    ],
)
def test_which_layers_go(asked, kept, deep):
    model, whole = load_pruned(str(deep), drop_layers=asked), load_pruned(str(deep))
    layers = [whole.model.layers[number] for number in kept]
    for ours, theirs in zip(model.model.layers, layers, strict=True):
        assert torch.equal(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [
        *range(len(kept))
    ]
    record = model.prune_record.as_dict()
    assert record["layers_before"] == 6
    assert {"layers_dropped", "layers_kept"} <= record.keys()


def test_the_layers_of_least_block_influence_go(deep, tmp_path):
    """A layer that hands on what it is given has none; of two such layers the later one goes."""
    idle = shutil.copytree(deep, tmp_path / "idle")
    names = [
        f"model.layers.{layer}.{n}.weight"
        for layer in (2, 4)
        for n in ("self_attn.o_proj", "mlp.down_proj")
    ]
    edit_weights(idle, lambda tensors: [tensors[name].zero_() for name in names])
    text = write_texts(tmp_path / "texts.jsonl")
    asked = {"drop_layers": 1, "drop_by": "block_influence", "calibration": text}
    record = load_pruned(str(idle), **asked).prune_record.as_dict()
    assert record["layers_dropped"] == "4"
    influence = record["block_influence"]
    assert influence["4"] == influence["2"] == pytest.approx(0, abs=1e-6)


def test_the_exported_checkpoint_opens_in_stock_transformers(deep, tmp_path):
    words = ["--model_args", f"pretrained={deep}", "--drop_layers", "1+3"]
    assert pruned("prune", *words, "--output_path", tmp_path / "out").code == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = load_pruned(str(deep), drop_layers="1+3")
    assert stock.config.num_hidden_layers == 4
    for name, tensor in model.state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor)


def test_the_digest_covers_the_layers(deep):
    digests = {
        load_pruned(str(deep), drop_layers=layers, ratio=1).prune_record.digest
        for layers in ("1", "[1]", "[2]")
    }
    assert len(digests) == 3


def test_plan_prints_the_ratio_of_equal_parameters(deep):
    words = ["plan", "--model_args", f"pretrained={deep}", "--drop_layers", 2, 4]
    assert "ratio of equal parameters" in pruned(*words).out
    rows = json.loads(pruned(*words, "--format", "json").out)
    for row in rows:
        narrow = load_pruned(str(deep), ratio=row["equal_ratio"])
        # To within a neuron of each layer.
        assert abs(narrow.num_parameters() - row["parameters"]) <= 6 * 3 * 32


def test_with_a_size_the_layers_that_stay_are_narrowed_by_their_old_numbers(deep):
    model = load_pruned(str(deep), drop_layers="1", ratio=1, layers="0+5")
    assert widths_of(model) == [32, WIDTH, WIDTH, WIDTH, 32]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"widths": {0: 20}}, "widths"),
        ({"ratio": 1, "allocation": "sensitivity"}, "allocation"),
    ],
)
def test_what_does_not_go_together_with_drop_layers(asked, words, deep):
    sentence = refusal(deep, drop_layers=1, **asked)
    assert words in sentence
    assert "drop_layers" in sentence


@pytest.mark.parametrize(
    ("family", "options", "asked"),
    [
        ("gemma3n_text", {"num_kv_shared_layers": 0}, 1),
        ("t5", {"d_ff": 88, "d_model": 32, "feed_forward_proj": "gated-gelu"}, 1),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "1+3"),
    ],
)
def test_models_whose_layers_cannot_be_dropped(family, options, asked, tmp_path):
    from tests.helpers.checkpoints import auto_class, tiny_config

    config = tiny_config(family, **{"num_hidden_layers": 4, **options})
    config.save_pretrained(tmp_path / "bare")
    more = {"auto_class": auto_class(config), "drop_layers": asked}
    assert "drop_layers" in refusal(tmp_path / "bare", **more)


@pytest.fixture(scope="module")
def adapters(deep, tmp_path_factory):
    """Return a function that writes an adapter of a model with these layers left out."""

    def adapters(**cut):
        folder = tmp_path_factory.mktemp("adapter")
        lora = LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
        get_peft_model(load_pruned(str(deep), **cut), lora).save_pretrained(folder)
        return str(folder)

    return adapters


def test_an_adapter_with_weights_for_dropped_layers_is_refused_unless_merged_before(
    deep, adapters, tmp_path
):
    whole, cut = adapters(), {"drop_layers": "1+3", "device": "cpu"}
    load = get_model("pruned-hf")
    bare = shutil.copytree(deep, tmp_path / "bare")
    (bare / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="4 of 6 layers that drop_layers leaves"):
        load(str(bare), peft=whole, **cut)
    load(str(deep), peft=adapters(drop_layers="1+3"), **cut)
    model = load(str(deep), peft=whole, peft_stage="before", **cut).model
    merged = PeftModel.from_pretrained(load_pruned(str(deep)), whole).merge_and_unload()
    last, expected = (each.model.layers[-1].mlp.up_proj for each in (model, merged))
    assert torch.equal(last.weight, expected.weight)
