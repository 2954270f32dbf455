from __future__ import annotations

import contextlib

import pytest
import torch

from lm_eval_pruned.model_wrappers.batching import cpu_linear
from lm_eval_pruned.model_wrappers.batching.cpu_linear import (
    fast_cpu_linears,
    faster_library,
    linear_backend,
)
from tests.helpers.checkpoints import tiny_config, tiny_model


pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)
Linear = torch.nn.Linear


@pytest.fixture
def calls(monkeypatch):
    """What went through oneDNN, on a machine where that is faster."""
    monkeypatch.setattr(cpu_linear, "faster_library", lambda: "onednn")
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
        assert len(calls) == sum(type(m) is Linear for m in model.modules())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(tokens).logits, expected)
    assert not any("forward" in vars(m) for m in model.modules())


class Special(Linear):
    pass


def changed(**attributes):
    layer = Linear(8, 5)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


TRANSPOSED = torch.nn.Parameter(torch.randn(8, 5).T)


@pytest.mark.parametrize(
    ("layer", "shape", "autocast", "goes"),
    [
        *((Linear(8, 5), shape, False, True) for shape in ((3, 8), (2, 3, 8), (2, 0, 8))),
        (Linear(8, 5, bias=False), (3, 8), False, True),
        (changed(weight=TRANSPOSED), (3, 8), False, True),
        # Not float32 products of several rows.
        (Special(8, 5), (3, 8), False, False),
        *((Linear(8, 5, dtype=d), (3, 8), False, False) for d in (torch.float64, torch.bfloat16)),
        (changed(forward=lambda x: x), (3, 8), False, False),
        (Linear(8, 5), (3, 8), True, False),
        *((Linear(8, 5), shape, False, False) for shape in ((8,), (1, 8), (1, 1, 8))),
    ],
)  # fmt: skip
def test_products_are_those_of_a_linear_layer(calls, layer, shape, autocast, goes):
    x = torch.randn(shape, dtype=layer.weight.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = layer(x)
        with fast_cpu_linears(layer):
            got = layer(x)
    assert bool(calls) == goes
    if goes:
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)


def packed():
    """A layer as compressed-tensors holds it until its first forward: it has no weight."""
    layer = Linear(8, 5)
    layer.weight_packed = torch.nn.Parameter(torch.ones(5, 1).int(), False)
    del layer.weight
    return layer


INT8 = torch.nn.Parameter(torch.ones(5, 8, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("layer", [packed(), changed(weight=INT8)])
def test_a_layer_without_a_plain_weight_is_left_alone(calls, layer):
    model = torch.nn.Sequential(layer, Linear(5, 5))
    with fast_cpu_linears(model):
        assert ["forward" in vars(m) for m in model] == [False, True]
    assert linear_backend(model) == "onednn"
    assert linear_backend(model[:1]) == "torch"


def test_a_model_that_unpacks_itself_when_it_runs_is_left_alone(calls):
    """As of compressed-tensors, whose first pass puts functions of its own in place of all forwards."""
    model = torch.nn.Sequential(Linear(8, 5), Linear(5, 5))
    model[0].quantization_scheme = "W8A8"
    with fast_cpu_linears(model):
        assert not any("forward" in vars(m) for m in model)


def test_a_forward_that_is_replaced_meanwhile_stays(calls):
    layer, other = Linear(8, 5), lambda x: x
    with fast_cpu_linears(layer):
        layer.forward = other
    assert layer.forward is other


def test_a_model_that_lies_elsewhere_is_not_touched_on_a_host_with_such_a_processor(
    calls,
):
    model = tiny_model(tiny_config("llama")).to("meta")
    with fast_cpu_linears(model):
        assert not any("forward" in vars(m) for m in model.modules())
    assert linear_backend(model) == "torch"


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
        file.write_text(f"vendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t: 2\n")
    monkeypatch.setattr(cpu_linear, "_CPUINFO", file)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu_linear.processor() == processor
    assert faster_library.__wrapped__() == backend
