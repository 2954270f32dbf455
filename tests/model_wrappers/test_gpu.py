"""What can only be checked on a CUDA device: clocks, memory, NVML, and the fast paths' answers.

``sh benchmarks/gpu_check.sh`` measures the rest.
"""

from __future__ import annotations

import importlib
import math
import time

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from lm_eval_pruned.checkpoints.load import load_pruned
from lm_eval_pruned.energy.meter import CodecarbonMeter
from lm_eval_pruned.energy.monitor import EnergyMonitor
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.profiling.measure import generate, profile
from lm_eval_pruned.profiling.options import ProfileRequest
from lm_eval_pruned.profiling.prompts import make_batches
from tests.helpers import checkpoints, layouts
from tests.helpers.answering import assert_close
from tests.model_wrappers.test_energy_logging import generated, scored


pytestmark = pytest.mark.gpu

#: Wide enough for the device to lag behind the host that feeds it.
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return checkpoints.save_tiny(tmp_path_factory.mktemp("wide"), **WIDE)


def test_the_clock_waits_for_the_device(wide):
    model = load_pruned(str(wide), device="cuda")
    (batch,) = make_batches(checkpoints.byte_tokenizer(), ["a" * 256] * 32, 32, "cuda")
    generate(model, batch, 4, fixed=True, pad_token=258)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    timing = generate(model, batch, 4, fixed=True, pad_token=258)
    end.record()
    torch.cuda.synchronize()
    on_device = begin.elapsed_time(end) / 1000
    assert 0 < timing["first"] < timing["total"]
    assert timing["total"] == pytest.approx(on_device, rel=0.1)


def test_a_narrower_model_takes_less_memory_on_the_device(wide):
    request = ProfileRequest(
        str(wide), ratios=("1.0",), device="cuda", max_new_tokens=4, repeats=1
    )
    result = profile(
        request, ["one two", "three"], monitor=EnergyMonitor(CodecarbonMeter())
    )
    baseline, pruned = (
        next(c for c in result["cells"] if (c["model"], c["mode"]) == (name, "fixed"))
        for name in ("baseline", "ratio=1.0")
    )
    sizes = {model["name"]: model["model_bytes"] for model in result["models"]}
    assert baseline["peak_device_bytes"] > sizes["baseline"]
    assert pruned["peak_device_bytes"] > sizes["ratio=1.0"]
    assert pruned["peak_device_bytes"] < baseline["peak_device_bytes"]
    assert baseline["joules"]["both"]["gpu"] > 0
    assert result["energy"]["sources"]["gpu"]["kind"] == "measured"
    assert result["environment"]["device_name"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("criterion", ["maw", "l2"])
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "gpt_oss"])
def test_loading_takes_no_more_than_the_pruned_model_and_one_layer(
    family, criterion, tmp_path
):
    # Weights of more than a block, so that blocks take turns.
    config = checkpoints.tiny_config(
        family, **{**WIDE, "num_hidden_layers": 2, **layouts.overrides(family, 12288)}
    )
    checkpoints.tiny_model(config).half().save_pretrained(tmp_path)
    arguments = {"prune_percent": 25, "criterion": criterion}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_pruned(str(tmp_path), device="cuda", **arguments)
    peak = torch.cuda.max_memory_allocated() - before
    pruned = sum(p.numel() * p.element_size() for p in model.parameters())
    layer = sum(p.nbytes for n, p in model.named_parameters() if ".layers.0." in n)
    assert pruned <= peak <= pruned + layer
    on_cpu = load_pruned(str(tmp_path), **arguments)
    assert model.prune_record.digest == on_cpu.prune_record.digest
    for name, weight in on_cpu.state_dict().items():
        assert torch.equal(model.state_dict()[name].cpu(), weight), name


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Weights as transformers draws them: logits spread as those of trained models do."""
    folder = tmp_path_factory.mktemp("usual")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(checkpoints.tiny_config(**WIDE))
    model.save_pretrained(folder)
    checkpoints.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rounding():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(checkpoints.ROOT / "benchmarks"))
        yield importlib.import_module("rounding")


def questions():
    """Return 128 requests, four for each context, behind one preamble."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        scored(
            "Q: 1 + 1? A: 2. " * 8 + letters[i % 26] * (i % 7 + 3),
            f" {letters[-j]} {letters[j + i % 9]}{j}",
            number=4 * i + j,
        )
        for i in range(32)
        for j in range(1, 5)
    ]


PROMPTS = [generated("abc" * (i + 1), max_gen_toks=24, number=i) for i in range(24)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fast_paths_are_taken_and_answer_in_float32_as_hf(usual, attention, dtype):
    same = {"device": "cuda", "dtype": dtype, "attn_implementation": attention}
    hf, ours = (cls(str(usual), batch_size=8, **same) for cls in (HFLM, PrefixHFLM))
    scores, texts = ours.loglikelihood(questions()), ours.generate_until(PROMPTS)
    paths = ours.get_model_info()["answer_paths"]
    assert paths["loglikelihood"]["requests"] == {"shared": 128}
    assert paths["generate_until"]["requests"] == {"slots": 24}
    assert all(math.isfinite(value) for value, _ in scores)
    if dtype == "float32":
        assert texts == hf.generate_until(PROMPTS)
        assert_close(scores, hf.loglikelihood(questions()), 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("percent", [None, 40])
def test_16_bit_types_lie_no_further_from_float32_than_hf(
    usual, rounding, dtype, percent
):
    model = load_pruned(str(usual), prune_percent=percent, dtype=dtype, device="cuda")
    found = rounding.distances(model, checkpoints.byte_tokenizer(), questions())
    _, batched, shared = found.values()
    assert shared <= rounding.LIMIT * batched


def test_energy_is_that_of_nvml(wide):
    import pynvml

    pynvml.nvmlInit()
    handles = [
        pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())
    ]
    try:
        for handle in handles:
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        pytest.skip(f"the device has no energy counter: {error}")

    def millijoules():
        return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles))

    work = torch.randn(4096, 4096, device="cuda")
    monitor = EnergyMonitor(CodecarbonMeter())
    monitor.start()
    if "energy counter" not in monitor.describe().sources["gpu"].description:
        pytest.skip("codecarbon watches fewer devices than NVML lists")
    before = millijoules()
    monitor.begin_window("work")
    end = time.perf_counter() + 5
    while time.perf_counter() < end:
        work = torch.nn.functional.normalize(work @ work)
        torch.cuda.synchronize()
    reading = monitor.end_window("work")
    expected = (millijoules() - before) / 1000
    monitor.stop()
    # The counter is renewed about ten times a second.
    assert reading.joules.gpu == pytest.approx(expected, rel=0.05)


def test_an_evaluation_reports_the_energy_of_the_gpu(wide):
    model = PrunedHFLM(str(wide), ratio=2.0, device="cuda", batch_size=8, energy=True)
    model.loglikelihood([scored("a" * 200, "bc", number=i) for i in range(256)])
    model.generate_until(
        [generated("abc", max_gen_toks=64, number=i) for i in range(8)]
    )
    block = model.get_model_info()["energy"]
    assert block["status"] == "ok"
    assert block["sources"]["gpu"]["kind"] == "measured"
    for record in block["request_types"].values():
        assert record["joules"]["gpu"] > 0
