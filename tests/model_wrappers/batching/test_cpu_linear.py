from __future__ import annotations

import contextlib

import pytest
import torch

from lm_eval_pruned.model_wrappers.batching import cpu_linear
from lm_eval_pruned.model_wrappers.batching.cpu_linear import (
    fast_cpu_linears,
    linear_backend,
)
from tests.helpers.checkpoints import tiny_config, tiny_model


pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


@pytest.fixture
def calls(monkeypatch):
    """What went through oneDNN, on a machine where that is faster."""
    monkeypatch.setattr(cpu_linear, "linear_backend", lambda: "onednn")
    seen, to_mkldnn = [], torch.Tensor.to_mkldnn
    monkeypatch.setattr(
        torch.Tensor, "to_mkldnn", lambda x: seen.append(x) or to_mkldnn(x)
    )
    return seen


def test_same_logits_and_nothing_left_behind(calls):
    model = tiny_model(tiny_config("qwen2"))  # Has biases.
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        with contextlib.suppress(RuntimeError), fast_cpu_linears(model):
            got = model(tokens).logits
            raise RuntimeError
        assert len(calls) == sum(type(m) is torch.nn.Linear for m in model.modules())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(tokens).logits, expected)
    assert not any("forward" in vars(m) for m in model.modules())


class Special(torch.nn.Linear):
    pass


def replaced():
    layer = torch.nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("layer", "shape", "autocast"),
    [
        (Special(4, 4), (3, 4), False),
        (torch.nn.Linear(4, 4, dtype=torch.float64), (3, 4), False),
        (torch.nn.Linear(4, 4, dtype=torch.bfloat16), (3, 4), False),
        (replaced(), (3, 4), False),
        (torch.nn.Linear(4, 4), (3, 4), True),
        *((torch.nn.Linear(4, 4), shape, False) for shape in ((4,), (1, 4), (1, 1, 4))),
    ],
    ids=["class", "float64", "bfloat16", "forward", "autocast", "row", "1", "11"],
)
def test_what_is_no_float32_product_of_rows_goes_the_ordinary_way(
    calls, layer, shape, autocast
):
    x = torch.ones(shape, dtype=layer.weight.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = layer(x)
        with fast_cpu_linears(layer):
            assert torch.equal(layer(x), expected)
    assert not calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 0, 8)])
@pytest.mark.parametrize("transposed", [True, False])
def test_shapes_and_numbers_are_those_of_a_linear_layer(calls, shape, bias, transposed):
    layer = torch.nn.Linear(8, 5, bias=bias)
    if transposed:
        layer.weight.data = torch.randn(8, 5).T
    x = torch.randn(shape)
    with torch.no_grad():
        expected = layer(x)
        with fast_cpu_linears(layer):
            torch.testing.assert_close(layer(x), expected)
    assert calls


@pytest.mark.parametrize(
    ("processor", "capability", "backend"),
    [
        (("AuthenticAMD", 26), "AVX512", "onednn"),
        (("AuthenticAMD", 26), "AVX512_VNNI", "onednn"),
        (("AuthenticAMD", 26), "AVX2", "torch"),
        (("AuthenticAMD", 25), "AVX512", "onednn"),
        (("AuthenticAMD", 24), "AVX512", "torch"),
        (("GenuineIntel", 6), "AVX512", "torch"),
        (("", 0), "DEFAULT", "torch"),
    ],
)
def test_the_processor_decides(processor, capability, backend, monkeypatch, tmp_path):
    """Two runs on one machine have to give the same numbers."""
    file, (vendor, family) = tmp_path / "cpuinfo", processor
    if vendor:
        file.write_text(
            f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t: 2\n"
        )
    monkeypatch.setattr(cpu_linear, "_CPUINFO", file)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu_linear.processor() == processor
    assert linear_backend.__wrapped__() == backend
