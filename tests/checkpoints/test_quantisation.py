"""Quantising the pruned weights while they are loaded."""

from __future__ import annotations

import pytest
import torch
import transformers

from lm_eval_pruned import load_pruned
from tests.helpers.checkpoints import save_tiny


def torchao_int8():
    pytest.importorskip("torchao", reason="torchao is not installed (extra 'test')")
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes(**arguments):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return transformers.BitsAndBytesConfig(**arguments)


KINDS = {
    "torchao-int8": torchao_int8,
    "bitsandbytes-8bit": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes-nf4": lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4"
    ),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder of a checkpoint whose rows are whole blocks of every kind."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 16}
    more = {"num_hidden_layers": 12, "dtype": torch.bfloat16, "max_shard_size": "100KB"}
    return str(save_tiny(tmp_path_factory.mktemp("source"), **sizes, **more))


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_layers_of_different_width_are_quantised(source, config):
    some, every, none = (
        load_pruned(source, quantization_config=config(), **asked)
        for asked in ({"ratio": 2, "layers": 1}, {"ratio": 2}, {})
    )
    hidden = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer, like in ((0, none), (1, every)):
            one, other = (m.model.layers[layer].mlp(hidden) for m in (some, like))
            assert torch.equal(one, other)
