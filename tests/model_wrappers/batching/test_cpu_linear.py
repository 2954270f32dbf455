from __future__ import annotations

import time

import pytest
import torch

from lm_eval_pruned.model_wrappers.batching import cpu_linear
from lm_eval_pruned.model_wrappers.batching.cpu_linear import (
    fast_cpu_linears,
    linear_backend,
)
from tests.helpers.checkpoints import tiny_config, tiny_model


@pytest.fixture
def faster(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(cpu_linear, "linear_backend", lambda: "onednn")


@pytest.fixture
def calls(monkeypatch):
    seen = []
    to_mkldnn = torch.Tensor.to_mkldnn

    def counted(x):
        seen.append(x)
        return to_mkldnn(x)

    monkeypatch.setattr(torch.Tensor, "to_mkldnn", counted)
    return seen


def test_same_logits_and_nothing_left_behind(faster, calls):
    model = tiny_model(tiny_config("qwen2"))  # Has biases.
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        with fast_cpu_linears(model):
            got = model(tokens).logits
        assert len(calls) == sum(type(m) is torch.nn.Linear for m in model.modules())
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(tokens).logits, expected)
    assert not any("forward" in vars(m) for m in model.modules())


def test_restored_after_an_error(faster):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="stop"), fast_cpu_linears(model):
        raise RuntimeError("stop")
    assert "forward" not in vars(model)


class Special(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    "layer",
    [
        Special(4, 4),
        torch.nn.Linear(4, 4, dtype=torch.float64),
        torch.nn.Linear(4, 4, dtype=torch.bfloat16),
    ],
)
def test_other_layers_are_left_alone(faster, calls, layer):
    x = torch.ones(3, 4, dtype=layer.weight.dtype)
    with torch.no_grad(), fast_cpu_linears(layer):
        layer(x)
    assert not calls


def test_a_replaced_forward_is_left_alone(faster):
    layer = torch.nn.Linear(4, 4)
    layer.forward = lambda x: x
    with fast_cpu_linears(layer):
        assert layer(5) == 5
    assert layer(5) == 5


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 1, 4)])
def test_a_single_row_goes_the_ordinary_way(faster, calls, shape):
    layer = torch.nn.Linear(4, 4)
    with torch.no_grad(), fast_cpu_linears(layer):
        assert layer(torch.ones(shape)).shape == shape
    assert not calls


def test_autocast_goes_the_ordinary_way(faster, calls):
    layer = torch.nn.Linear(4, 4)
    with (
        torch.no_grad(),
        fast_cpu_linears(layer),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        assert layer(torch.ones(3, 4)).dtype == torch.bfloat16
    assert not calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 0, 8)])
def test_shapes_are_those_of_a_linear_layer(faster, calls, shape, bias):
    layer = torch.nn.Linear(8, 5, bias=bias)
    x = torch.randn(shape)
    with torch.no_grad():
        expected = layer(x)
        with fast_cpu_linears(layer):
            got = layer(x)
    assert calls
    torch.testing.assert_close(got, expected)


def test_a_transposed_weight_is_read_as_it_lies(faster, calls):
    layer = torch.nn.Linear(8, 5)
    layer.weight.data = torch.randn(8, 5).T
    x = torch.randn(4, 8)
    with torch.no_grad(), fast_cpu_linears(layer):
        got = layer(x)
    assert calls
    torch.testing.assert_close(got, x @ layer.weight.T + layer.bias)


@pytest.mark.parametrize(
    ("processor", "capability", "backend"),
    [
        (("AuthenticAMD", 26), "AVX512", "onednn"),
        (("AuthenticAMD", 26), "AVX512_VNNI", "onednn"),
        (("AuthenticAMD", 26), "AVX2", "torch"),
        (("AuthenticAMD", 25), "AVX512", "onednn"),
        (("AuthenticAMD", 25), "AVX2", "torch"),
        (("AuthenticAMD", 24), "AVX512", "torch"),
        (("GenuineIntel", 6), "AVX512", "torch"),
        (("", 0), "DEFAULT", "torch"),
    ],
)
def test_the_processor_decides_and_no_clock(
    processor, capability, backend, monkeypatch
):
    """Two runs on one machine have to give the same numbers."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")

    def read(*_):
        raise AssertionError("a clock was read")

    for clock in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(time, clock, read)
    monkeypatch.setattr(cpu_linear, "processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert linear_backend.__wrapped__() == backend


def test_a_processor_is_read_as_linux_writes_it(monkeypatch, tmp_path):
    linux = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t: 2\n"
    (tmp_path / "cpuinfo").write_text(linux)
    monkeypatch.setattr(cpu_linear, "_CPUINFO", tmp_path / "cpuinfo")
    assert cpu_linear.processor() == ("AuthenticAMD", 26)
    monkeypatch.setattr(cpu_linear, "_CPUINFO", tmp_path / "none")
    assert cpu_linear.processor() == ("", 0)
