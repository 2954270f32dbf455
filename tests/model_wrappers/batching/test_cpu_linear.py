from __future__ import annotations

import logging
import platform
import time
from types import SimpleNamespace

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from lm_eval_pruned.model_wrappers.batching import cpu_linear
from lm_eval_pruned.model_wrappers.batching.cpu_linear import (
    PackedWeight,
    fast_cpu_linears,
    linear_backend,
    pack_linears,
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


def test_processors_are_read_as_systems_write_them(monkeypatch, tmp_path):
    linux = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t: 2\n"
    (tmp_path / "cpuinfo").write_text(linux)
    monkeypatch.setattr(cpu_linear, "_CPUINFO", tmp_path / "cpuinfo")
    assert cpu_linear.processor() == ("AuthenticAMD", 26)
    monkeypatch.setattr(cpu_linear, "_CPUINFO", tmp_path / "none")
    windows = "AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD"
    monkeypatch.setattr(platform, "processor", lambda: windows)
    assert cpu_linear.processor() == ("AuthenticAMD", 26)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert cpu_linear.processor() == ("", 0)


@pytest.fixture(params=["torch", "onednn"])
def packing(request, monkeypatch):
    """Pack for one of the two libraries, however small the task; count products."""
    library = torch.backends.mkldnn if request.param == "onednn" else torch.backends.mkl
    if not library.is_available():
        pytest.skip("this PyTorch was built without the library")
    monkeypatch.setattr(cpu_linear, "linear_backend", lambda: request.param)
    monkeypatch.setattr(cpu_linear, "_WORTH_PACKING", 0)
    monkeypatch.setattr(cpu_linear, "_TRIED", set())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    cpu_linear._say_once.cache_clear()
    used = []
    call = PackedWeight.__call__

    def counted(pack, x, bias):
        used.append(pack)
        return call(pack, x, bias)

    monkeypatch.setattr(PackedWeight, "__call__", counted)
    yield used
    cpu_linear._say_once.cache_clear()


def packed_run(model, used, run):
    """Return what `run` gives with packed weights, and how many products used one."""
    packs = pack_linears(model, 1)
    used.clear()
    with torch.no_grad(), fast_cpu_linears(model, packs):
        return run(), len(used)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "phi3", "mixtral"])
def test_packed_weights_give_the_same_logits(packing, kind):
    """Biases (qwen2), tied embeddings (gemma2), fused projections (phi3), experts (mixtral)."""
    model = tiny_model(tiny_config(kind))
    tokens = torch.arange(36).reshape(2, 18)
    with torch.no_grad():
        expected = model(tokens).logits
    got, count = packed_run(model, packing, lambda: model(tokens).logits)
    layers = sum(type(module) is torch.nn.Linear for module in model.modules())
    # A router of experts is no linear layer, and experts see fewer rows.
    assert count == layers if kind != "mixtral" else count > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("rows", [16, 17, 31, 64, 65, 257, 1000])
@pytest.mark.parametrize("shape", [(5, 8), (192, 576), (48, 100)])
@pytest.mark.parametrize("bias", [True, False])
def test_one_packed_weight_serves_any_number_of_rows(packing, rows, shape, bias):
    layer = torch.nn.Linear(shape[1], shape[0], bias=bias)
    x = torch.randn(2, rows, shape[1])[:, :: 2 if rows % 2 == 0 else 1]
    with torch.no_grad():
        expected = layer(x)
    got, count = packed_run(layer, packing, lambda: layer(x))
    assert count == 1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 15])
def test_few_rows_take_the_plain_weight(packing, rows):
    """On them MKL's products of the two differ in the last bits; oneDNN's do on one row."""
    layer, x = torch.nn.Linear(8, 4), torch.ones(rows, 8)
    with torch.no_grad(), fast_cpu_linears(layer):
        expected = layer(x)
    got, count = packed_run(layer, packing, lambda: layer(x))
    assert count == (rows > 1 and cpu_linear.linear_backend() == "onednn")
    assert torch.equal(got, expected)


@pytest.fixture
def untried():
    cpu_linear._product_is_right.cache_clear()
    yield
    cpu_linear._product_is_right.cache_clear()


@pytest.mark.parametrize("rows", [2, 3, 16, 100])
@pytest.mark.parametrize("shape", [(5, 8), (192, 576), (33, 17)])
def test_no_way_through_onednn_changes_a_bit(faster, rows, shape):
    """A weight as it lies, one packed, and PyTorch's public way with its copies."""
    weight, x = torch.randn(shape), torch.randn(2, rows, shape[1])
    bias = torch.randn(shape[0])
    public = torch.nn.functional.linear(x.to_mkldnn(), weight, bias).to_dense()
    assert cpu_linear._product_is_right()
    assert torch.equal(cpu_linear._onednn(x, weight, bias), public)
    assert torch.equal(PackedWeight.of(weight, onednn=True)(x, bias), public)


@pytest.mark.parametrize(
    ("replaced", "reason"),
    [("operator", "has no attribute"), ("right", "a product of its is wrong")],
)
def test_without_the_private_operator_the_public_one_answers_and_it_is_said_once(
    faster, untried, replaced, reason, monkeypatch, caplog
):
    if replaced == "right":
        monkeypatch.setattr(PackedWeight, "is_right", lambda pack: False)
    else:
        monkeypatch.setattr(torch, "ops", SimpleNamespace())
    layer, x = torch.nn.Linear(8, 5), torch.randn(3, 8)
    with (
        caplog.at_level(logging.WARNING, "lm_eval.models.cpu_linear"),
        torch.no_grad(),
        fast_cpu_linears(layer),
    ):
        got = layer(x), layer(x)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    for each in got:
        torch.testing.assert_close(each, expected)
    assert [record.message.count(reason) for record in caplog.records] == [1]


def test_weights_that_changed_are_packed_anew(packing):
    """Between two tasks nothing of the old weights stays."""
    layer, x = torch.nn.Linear(8, 4), torch.randn(20, 8)
    before, _ = packed_run(layer, packing, lambda: layer(x))
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.mul_(2)
    after, count = packed_run(layer, packing, lambda: layer(x))
    assert count == 1
    torch.testing.assert_close(after, before * 2)


def test_a_weight_that_was_swapped_is_not_answered_from_the_old_one(packing):
    layer, x = torch.nn.Linear(8, 4), torch.randn(20, 8)
    packs = pack_linears(layer, 1)
    layer.weight = torch.nn.Parameter(torch.zeros(4, 8))
    with torch.no_grad(), fast_cpu_linears(layer, packs):
        torch.testing.assert_close(layer(x), layer.bias.expand(20, 4))


class Quantised(torch.Tensor):
    """A tensor that calls itself float32 and is something else."""


def with_weight(weight):
    layer = torch.nn.Linear(4, 4, bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def with_hook():
    layer = torch.nn.Linear(4, 4)
    add_hook_to_module(layer, ModelHook())
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        Special(4, 4),
        torch.nn.Linear(4, 4, dtype=torch.bfloat16),
        torch.nn.Linear(4, 4, device="meta"),
        with_weight(torch.ones(4, 4).as_subclass(Quantised)),
        with_hook(),
    ],
    ids=["subclass", "bfloat16", "offloaded", "quantised", "hooked by accelerate"],
)
def test_other_layers_are_not_packed(packing, layer):
    assert pack_linears(layer, 1) == {}
    assert pack_linears(torch.nn.Sequential(layer, torch.nn.Linear(4, 4)), 1)


def test_adapters_are_computed_around_packed_layers(packing):
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
    model = peft.get_peft_model(tiny_model(tiny_config()), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(tokens).logits
    got, count = packed_run(model, packing, lambda: model(tokens).logits)
    assert count > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_mkl_packs_for_one_thread_alone(packing, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    packed = bool(pack_linears(torch.nn.Linear(4, 4), 1))
    assert packed == (cpu_linear.linear_backend() == "onednn")


def test_small_tasks_are_not_worth_it(packing, monkeypatch):
    monkeypatch.setattr(cpu_linear, "_WORTH_PACKING", 100)
    assert pack_linears(torch.nn.Linear(4, 4), 99) == {}
    assert pack_linears(torch.nn.Linear(4, 4), 100)


@pytest.mark.parametrize(
    ("replaced", "reason"),
    [
        ("available", "more than a third of the memory"),
        ("right", "a product of theirs is wrong"),
        ("operator", "has no attribute"),
    ],
)
def test_what_cannot_be_packed_runs_plainly_and_is_said_once(
    packing, replaced, reason, monkeypatch, caplog
):
    if replaced == "available":
        memory = SimpleNamespace(available=100)
        monkeypatch.setattr(cpu_linear.psutil, "virtual_memory", lambda: memory)
    elif replaced == "right":
        monkeypatch.setattr(PackedWeight, "is_right", lambda pack: False)
    else:
        monkeypatch.setattr(torch, "ops", SimpleNamespace())
    layer = torch.nn.Linear(8, 4)
    with caplog.at_level(logging.WARNING, "lm_eval.models.cpu_linear"):
        assert pack_linears(layer, 1) == {}
        assert pack_linears(layer, 1) == {}
    assert [record.message.count(reason) for record in caplog.records] == [1]


def test_a_wrong_product_is_noticed(packing):
    pack = PackedWeight.of(torch.randn(8, 32), cpu_linear.linear_backend() == "onednn")
    assert pack.is_right()
    other = PackedWeight(torch.randn(8, 32), pack.packed, pack.onednn)
    assert not other.is_right()
