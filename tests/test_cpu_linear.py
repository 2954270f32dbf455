from __future__ import annotations

import pytest
import torch

from lm_eval_pruned.model_wrappers import cpu_linear
from lm_eval_pruned.model_wrappers.cpu_linear import fast_cpu_linears, onednn_is_faster

from .checkpoints import tiny_config, tiny_model


@pytest.fixture
def faster(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda threads: True)


@pytest.fixture
def calls(monkeypatch):
    seen = []
    onednn = cpu_linear._onednn

    def counted(*arguments):
        seen.append(arguments)
        return onednn(*arguments)

    monkeypatch.setattr(cpu_linear, "_onednn", counted)
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


def test_autocast_goes_the_ordinary_way(faster, calls):
    layer = torch.nn.Linear(4, 4)
    with (
        torch.no_grad(),
        fast_cpu_linears(layer),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        assert layer(torch.ones(3, 4)).dtype == torch.bfloat16
    assert not calls


def test_without_the_operator(monkeypatch):
    def missing(*_):
        raise AttributeError("no such operator")

    monkeypatch.setattr(cpu_linear, "_onednn", missing)
    onednn_is_faster.cache_clear()
    assert not onednn_is_faster(1)
    onednn_is_faster.cache_clear()
