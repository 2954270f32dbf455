"""Quantising the pruned weights while they are loaded."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers.checkpoints import save_tiny
from tests.helpers.layouts import logits


def torchao_int8():
    pytest.importorskip("torchao", reason="torchao is not installed (extra 'test')")
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes(**arguments):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return transformers.BitsAndBytesConfig(**arguments)


EIGHT = {"load_in_8bit": True}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
#: What makes the config, and how the harness's command line asks for it.
KINDS = {
    "torchao-int8": (torchao_int8, None),
    "bitsandbytes-8bit": (lambda: bitsandbytes(**EIGHT), EIGHT),
    "bitsandbytes-nf4": (lambda: bitsandbytes(**NF4), NF4),
}
each_kind = pytest.mark.parametrize(("config", "written"), KINDS.values(), ids=KINDS)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder of a checkpoint whose rows are whole blocks of every kind."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16}
    more = {"num_hidden_layers": 12, "dtype": torch.bfloat16, "max_shard_size": "100KB"}
    return str(save_tiny(tmp_path_factory.mktemp("source"), **sizes, **more))


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return export_pruned(source, folder, prune_arguments={"ratio": 2})


@each_kind
def test_equals_quantising_the_exported_checkpoint(source, exported, config, written):
    given = written or {
        "quantization_config": json.loads(json.dumps(config().to_dict()))
    }
    quantised = PrunedHFLM(source, ratio=2, device="cpu", **given).model
    stock = AutoModelForCausalLM.from_pretrained(
        exported.folder, quantization_config=config()
    )
    gate, expected = (m.model.layers[0].mlp.gate_proj for m in (quantised, stock))
    assert type(gate) is type(expected)
    assert type(gate.weight) is type(expected.weight)
    assert gate.out_features == 128
    assert torch.equal(logits(quantised), logits(stock))
    # Neurons are ranked by the weights before they are quantised.
    assert quantised.prune_record.digest == exported.record.digest
    plain = logits(load_pruned(source, ratio=2))
    assert not torch.equal(logits(quantised), plain)


@each_kind
def test_layers_of_different_width_are_quantised(source, config, written):
    some, every, none = (
        load_pruned(source, quantization_config=config(), **asked)
        for asked in ({"ratio": 2, "layers": 1}, {"ratio": 2}, {})
    )
    hidden = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer, like in ((0, none), (1, every)):
            one, other = (m.model.layers[layer].mlp(hidden) for m in (some, like))
            assert torch.equal(one, other)
