"""What can only be checked on a CUDA device: clocks, memory, NVML, and the fast paths' answers.

``sh benchmarks/gpu_check.sh`` measures the rest.
"""

from __future__ import annotations

import math
import time

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from lm_eval_pruned.checkpoints.load import load_pruned
from lm_eval_pruned.energy.meter import CodecarbonMeter, EnergyMonitor
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.profiling.measure import generate, profile
from lm_eval_pruned.profiling.options import ProfileRequest, batches_of
from tests.helpers import checkpoints, layouts
from tests.helpers.answering import GENERATED, SCORED, assert_close


pytestmark = pytest.mark.gpu

#: Wide enough for the device to lag behind the host that feeds it.
WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return checkpoints.save_tiny(tmp_path_factory.mktemp("wide"), **WIDE)


def test_the_clock_waits_for_the_device(wide):
    model = load_pruned(str(wide), device="cuda")
    sizes = {"ratios": ("1.0",), "batch_sizes": (32,), "device": "cuda"}
    batches, _ = batches_of(ProfileRequest(str(wide), **sizes), ["a" * 256] * 32)
    (batch,) = batches[32]
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
    monitor = EnergyMonitor(CodecarbonMeter())
    *_, result = profile(request, ["one two", "three"], monitor=monitor)
    fixed = {c["model"]: c for c in result["cells"] if c["mode"] == "fixed"}
    peaks = {name: cell["peak_device_bytes"] for name, cell in fixed.items()}
    for model in result["models"]:
        assert peaks[model["name"]] > model["model_bytes"]
    assert peaks["ratio=1.0"] < peaks["baseline"]
    assert fixed["baseline"]["joules"]["both"]["gpu"] > 0
    assert result["energy"]["sources"]["gpu"]["kind"] == "measured"
    assert result["environment"]["device_name"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("criterion", ["maw", "l2"])
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "gpt_oss"])
def test_loading_takes_no_more_than_the_pruned_model_and_one_layer(
    family, criterion, tmp_path
):
    # Weights of more than a block, so that blocks take turns.
    sizes = {**WIDE, "num_hidden_layers": 2, **layouts.overrides(family, 12288)}
    config = checkpoints.tiny_config(family, **sizes)
    checkpoints.tiny_model(config).half().save_pretrained(tmp_path)
    arguments = {"prune_percent": 25, "criterion": criterion}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_pruned(str(tmp_path), device="cuda", **arguments)
    peak = torch.cuda.max_memory_allocated() - before
    pruned = sum(p.nbytes for p in model.parameters())
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


LETTERS = "abcdefghijklmnopqrstuvwxyz"
#: Four for each context, behind one preamble.
QUESTIONS = [
    (
        "Q: 1 + 1? A: 2. " * 8 + LETTERS[i % 26] * (i % 7 + 3),
        f" {LETTERS[-j]} {LETTERS[j + i % 9]}{j}",
    )
    for i in range(32)
    for j in range(1, 5)
]


def prompts(count, most):
    settings = {"until": [], "max_gen_toks": most, "do_sample": False}
    return [("abc" * (i + 1), settings) for i in range(count)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fast_paths_are_taken_and_answer_in_float32_as_hf(usual, attention, dtype):
    same = {"device": "cuda", "dtype": dtype, "attn_implementation": attention}
    hf, ours = (cls(str(usual), batch_size=8, **same) for cls in (HFLM, PrefixHFLM))
    asked = prompts(24, 24)
    scores, texts = SCORED.ask(ours, QUESTIONS), GENERATED.ask(ours, asked)
    paths = ours.get_model_info()["answer_paths"]
    assert paths["loglikelihood"]["requests"] == {"shared": 128}
    assert paths["generate_until"]["requests"] == {"slots": 24}
    assert all(math.isfinite(value) for value, _ in scores)
    if dtype == "float32":
        assert texts == GENERATED.ask(hf, asked)
        assert_close(scores, SCORED.ask(hf, QUESTIONS), 1e-3)


def test_energy_is_that_of_nvml(wide):
    import pynvml

    pynvml.nvmlInit()
    numbers = range(pynvml.nvmlDeviceGetCount())
    handles = [*map(pynvml.nvmlDeviceGetHandleByIndex, numbers)]

    def joules():
        return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles)) / 1000

    try:
        joules()
    except pynvml.NVMLError as error:
        pytest.skip(f"the device has no energy counter: {error}")
    work = torch.randn(4096, 4096, device="cuda")
    monitor = EnergyMonitor(CodecarbonMeter())
    monitor.start()
    if "energy counter" not in monitor.describe().sources["gpu"].description:
        pytest.skip("codecarbon watches fewer devices than NVML lists")
    before = joules()
    monitor.begin_window("work")
    end = time.perf_counter() + 5
    while time.perf_counter() < end:
        work = torch.nn.functional.normalize(work @ work)
        torch.cuda.synchronize()
    reading = monitor.end_window("work")
    expected = joules() - before
    monitor.stop()
    # The counter is renewed about ten times a second.
    assert reading.joules.gpu == pytest.approx(expected, rel=0.05)
