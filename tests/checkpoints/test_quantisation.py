"""Quantising the pruned weights while they are loaded."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.export import export_pruned
from tests.helpers import checkpoints, evaluations


def torchao_int8():
    pytest.importorskip("torchao", reason="torchao is not installed (extra 'test')")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes(**arguments):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**arguments)


KINDS = {
    "torchao-int8": torchao_int8,
    "bitsandbytes-8bit": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes-nf4": lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4"
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder of a checkpoint whose rows are whole blocks of every kind."""
    return checkpoints.save_tiny(
        tmp_path_factory.mktemp("source"),
        hidden_size=64,
        intermediate_size=256,
        head_dim=16,
        num_hidden_layers=12,
        dtype=torch.bfloat16,
        max_shard_size="100KB",
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 40).view(3, 13)).logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_equals_quantising_the_exported_checkpoint(source, tmp_path, kind):
    quantised = load_pruned(str(source), ratio=2, quantization_config=KINDS[kind]())
    export = export_pruned(str(source), tmp_path / "out", prune_arguments={"ratio": 2})
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=KINDS[kind]()
    )
    gate = quantised.model.layers[0].mlp.gate_proj
    assert type(gate) is type(stock.model.layers[0].mlp.gate_proj)
    assert type(gate.weight) is type(stock.model.layers[0].mlp.gate_proj.weight)
    assert gate.out_features == 128
    assert torch.equal(logits(quantised), logits(stock))
    # Neurons are ranked by the weights before they are quantised.
    assert quantised.prune_record.digest == export.record.digest
    plain = logits(load_pruned(str(source), ratio=2))
    assert not torch.equal(logits(quantised), plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_different_width_are_quantised(source, kind):
    config = KINDS[kind]
    some = load_pruned(str(source), ratio=2, layers=1, quantization_config=config())
    all_layers = load_pruned(str(source), ratio=2, quantization_config=config())
    none = load_pruned(str(source), quantization_config=config())
    hidden = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer, like in ((0, none), (1, all_layers)):
            one, other = (m.model.layers[layer].mlp(hidden) for m in (some, like))
            assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quantization_config": "torchao"},
    ],
)
def test_through_the_harness(source, tmp_path, arguments):
    from lm_eval.models.huggingface import HFLM

    if "quantization_config" in arguments:
        config = torchao_int8().to_dict()
        arguments = {"quantization_config": json.loads(json.dumps(config))}
        expected = torchao_int8()
    else:
        expected = bitsandbytes(**arguments)
    scores, config = evaluations.evaluate(
        "pruned-hf", {"pretrained": str(source), "ratio": 2, **arguments}, limit=2
    )
    export_pruned(str(source), tmp_path / "out", prune_arguments={"ratio": 2})
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=expected
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    by_hand, _ = evaluations.evaluate(
        HFLM(pretrained=stock, tokenizer=tokenizer, batch_size=4), {}, limit=2
    )
    assert scores == by_hand
    assert config["pruning"]["intermediate_size_after"] == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"load_in_8bit": True, "quantization_config": {"quant_method": "torchao"}},
            "load_in_8bit and quantization_config both say how to quantise",
        ),
        (
            {"quantization_config": {"quant_method": "shrink"}},
            "Unknown quantization type, got shrink",
        ),
        ({"quantization_config": {"bits": 8}}, "has no `quant_method` attribute"),
    ],
)
def test_arguments_that_do_not_go_together(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_pruned(str(source), ratio=2, **arguments)


def test_a_quantised_checkpoint_is_refused(source, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=torchao_int8()
    )
    model.config.save_pretrained(tmp_path / "quantised")
    with pytest.raises(ValueError, match=r"quantised already .quant_method=torchao"):
        load_pruned(str(tmp_path / "quantised"), ratio=2)
