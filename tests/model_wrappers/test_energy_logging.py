"""``pruned-hf,energy=true``: tokens, windows, tasks, cache, processes and the block."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from lm_eval_pruned.energy.meter import EnergyMonitor
from lm_eval_pruned.model_wrappers.batching.fast_path import TokenCounts
from lm_eval_pruned.model_wrappers.energy_windows import EnergyLog
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers import checkpoints, evaluations
from tests.helpers.asking import request
from tests.helpers.layouts import save_family
from tests.helpers.meters import Clock, monitor_of


def log_of(watts=None, *, idle_seconds=0, **meter):
    monitor, clock = monitor_of(watts or {"cpu": 10.0, "ram": 5.0}, **meter)
    return EnergyLog(monitor, idle_seconds, clock.sleep), clock


@pytest.fixture
def lm(tiny_llama):
    """Return a maker of tiny models whose log uses a fake meter; each row takes 1 s."""

    def make(log_and_clock=None, **arguments):
        log, clock = log_and_clock or log_of()
        arguments = {"batch_size": 4, "prefix_sharing": False, **arguments}
        model = PrunedHFLM(str(tiny_llama), ratio=2.0, device="cpu", **arguments)
        model._energy = log
        call = model.model.forward

        def forward(*args, **kwargs):
            clock.sleep(1.0)
            return call(*args, **kwargs)

        model.model.forward = forward
        return model

    return make


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Have a model look as if it ran on a GPU, which it waits for."""

    def placed(model, events):
        monkeypatch.setattr(model, "_accelerators", lambda: {torch.device("cuda", 1)})
        waited = lambda _: events.append("wait")
        monkeypatch.setattr(torch.accelerator, "synchronize", waited)
        return model

    return placed


def scored(context, continuation, task="t", number=0):
    return request("loglikelihood", context, continuation, task=task, number=number)


def generated(prompt, task="t", number=0, **arguments):
    arguments = {"until": [], "max_gen_toks": 4, "do_sample": False, **arguments}
    return request("generate_until", prompt, arguments, task=task, number=number)


def rolling(text):
    return request("loglikelihood_rolling", text)


ONE = [scored("abc", "de")]


def energy_of(model):
    return model.get_model_info()["energy"]


def test_scored_requests_are_counted_in_tokens_without_padding(lm):
    model = lm()
    model.loglikelihood([scored("abc", "de"), scored("a", "bcdefgh")])
    record = energy_of(model)["request_types"]["loglikelihood"]
    # The last token of a continuation is scored but not sent through the model.
    counts = {"requests": 2, "prompt_tokens": 5 + 8, "processed_tokens": 4 + 7}
    assert record.items() >= {**counts, "generated_tokens": 0, "seconds": 1.0}.items()
    assert record["joules"] == {"cpu": 10.0, "gpu": None, "ram": 5.0, "total": 15.0}
    assert record["joules_per_processed_token"] == pytest.approx(15.0 / 11)
    assert record["joules_per_generated_token"] is record["emissions_kg_co2e"] is None
    # The first pass ever is apart.
    assert energy_of(model)["set_up"]["warm_up"]["loglikelihood"]["seconds"] == 1.0
    # A model that is evaluated again starts from nothing, also after one that was cut off.
    for _ in range(2):
        model.begin_evaluation()
        model.loglikelihood(ONE)
    block = energy_of(model)
    assert (block["total"]["requests"], block["set_up"]) == (1, {})
    assert json.loads(json.dumps(block)) == block == energy_of(model)


SHARED = [scored("One preamble. " + c, " no") for c in ("abc", "abd", "xyz")]
LONG = [scored("twenty-one characters" + c, "q") for c in "ab"]
TREE = {"prefix_sharing": True}


@pytest.mark.parametrize(
    ("arguments", "requests", "prompt", "processed"),
    [
        ({}, [scored("abcd", "ef"), scored("uvwx", "yz")], 12, 10),
        # A context shared by answers of one token is processed once.
        ({"logits_cache": True}, [scored("abcd", c) for c in "xyz"], 15, 4),
        # One token of context is put before each text.
        ({}, [rolling("abcdef"), rolling("uvwxyz")], 14, 12),
        ({"slot_refilling": False}, [generated("abcdef"), generated("uvwxyz")], 12, 18),
        (TREE, SHARED, 60, None),
        (TREE, [scored("nothing in common", " yes")], 21, 20),
        # Some of a call's requests exceed what may be shared.
        ({**TREE, "window": 20}, [*SHARED, *LONG], 106, None),
    ],
)
def test_tokens_are_those_that_the_model_was_given(
    lm, arguments, requests, prompt, processed
):
    window = arguments.get("window")
    model = lm(**{k: v for k, v in arguments.items() if k != "window"})
    model._warmed_up = True
    model.config.sliding_window = window
    model.model.generation_config.eos_token_id = None
    positions = []
    model.model.get_input_embeddings().register_forward_pre_hook(
        # Rows are equally long, so that nothing is padded.
        lambda _, inputs: positions.append(inputs[0].numel())
    )
    answers = getattr(model, requests[0].request_type)(requests)
    made = 4 * len(answers) if "slot_refilling" in arguments else 0
    assert model.token_counts == TokenCounts(prompt, made, sum(positions))
    if processed is None:
        assert 0 < sum(positions) < prompt - 20
    else:
        assert sum(positions) == processed


def test_an_encoders_tokens_are_processed_too(tmp_path):
    save_family(tmp_path, "t5", 16)
    given = {"batch_size": 2, "max_length": 64, "backend": "seq2seq"}
    model = PrunedHFLM(str(tmp_path), device="cpu", **given)
    model._energy, _ = log_of()
    # Of equal length, so that nothing is padded; a text twice, which is computed twice.
    pairs = [("abcdef", "gh"), ("uvwxyz", "ij"), ("uvwxyz", "ij")]
    model.loglikelihood([scored(*pair) for pair in pairs])
    assert model.token_counts.processed == 3 * (6 + 2)


def test_generated_tokens_stop_at_the_end_of_text(lm, monkeypatch):
    model = lm(slot_refilling=False)
    end, pad = (checkpoints.TINY[f"{name}_token_id"] for name in ("eos", "pad"))

    def generate(input_ids, **_):
        new = torch.tensor([[1, 2, 3, 4], [5, end, pad, pad]])
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(model.model, "generate", generate)
    model.generate_until([generated("abcdef"), generated("xy")])
    assert model.token_counts == TokenCounts(prompt=8, generated=6, processed=8 + 6 - 2)


SAMPLED = generated("xy", do_sample=True, temperature=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("requests", "batch_size", "arguments", "searches"),
    [
        # Two batches, as HFLM searches before each.
        ([scored("a" * n, "b") for n in (9, 7, 5, 3)], "auto:2", {}, 2),
        ([rolling("abcdef"), rolling("xy")], "auto", {}, 1),
        # Greedy requests run in slots; the one that HFLM gets makes it search.
        ([generated("abc", max_gen_toks=130), SAMPLED], "auto", {}, 1),
    ],
)
def test_the_search_for_a_batch_size_is_a_window_of_its_own(
    lm, requests, batch_size, arguments, searches
):
    blocks, size = [], 2 if batch_size == "auto:2" else 4
    name = requests[0].request_type
    for each in (size, batch_size):
        torch.manual_seed(0)
        model = lm(batch_size=each, max_batch_size=size, max_length=256, **arguments)
        getattr(model, name)(requests)
        blocks.append(energy_of(model))
    fixed, found = blocks
    for section in ("request_types", "total"):
        assert found[section] == fixed[section]
    assert "batch_size_search" not in fixed["set_up"]
    # HFLM sends five passes through the model in each search.
    search = found["set_up"]["batch_size_search"][name]
    assert search["seconds"] == 5.0 * searches
    assert search["joules"]["total"] == 15.0 * 5.0 * searches


def test_idle_energy_is_measured_first_and_once_and_negative_net_energy_is_warned_of(
    lm, caplog
):
    model = lm(log_of({"cpu": [(0.0, 50.0), (4.0, 20.0)]}, idle_seconds=4))
    for _ in range(2):
        model.loglikelihood(ONE)
        model.loglikelihood(ONE)
        block = energy_of(model)
        assert (block["idle"]["seconds"], block["idle"]["mean_watts"]) == (4.0, 50.0)
        record = block["request_types"]["loglikelihood"]
        assert record["joules"]["cpu"] == 40.0
        assert record["idle_joules"]["cpu"] == 100.0
        assert record["net_joules"]["cpu"] == record["net_joules"]["total"] == -60.0
        assert block["status"] == "partial"
        (note,) = block["notes"]
        assert note.startswith("net energy is negative (-60 J)")
        assert note in caplog.text


@pytest.mark.parametrize(
    ("watts", "status"),
    [({"cpu": 10.0}, "partial"), ({"cpu": 10.0, "gpu": 50.0}, "ok")],
)
def test_without_the_energy_of_the_gpu_there_is_none_per_token(
    lm, on_a_gpu, watts, status
):
    model = on_a_gpu(lm(log_of(watts, idle_seconds=2)), [])
    model.loglikelihood(ONE)
    block = energy_of(model)
    assert block["status"] == status
    for record in (block["request_types"]["loglikelihood"], block["total"]):
        assert record["joules"]["cpu"] > 0
        totals = {record[key]["total"] for key in ("joules", "net_joules")}
        for found in (*totals, record["joules_per_processed_token"]):
            assert (found is None) == (status != "ok")
    assert any("gpu" in note for note in block["notes"]) == (status != "ok")


def test_devices_are_waited_for_where_a_meter_is_read_beside_other_work(
    lm, on_a_gpu, monkeypatch
):
    events: list[str] = []
    model = on_a_gpu(lm(batch_size="auto", max_batch_size=1, max_length=64), events)
    meter = model._energy.monitor._meter
    read = meter.read
    monkeypatch.setattr(meter, "read", lambda: (events.append("meter"), read())[1])
    model.loglikelihood(ONE)
    # Warm-up, then the search within the window of the requests.
    assert events == [*("wait", "meter") * 2, "meter", *("wait", "meter") * 2, "meter"]


@pytest.mark.parametrize("fail_at", ["start", 3, "stop"])
def test_answers_survive_a_meter_that_fails(lm, fail_at):
    model = lm(log_of(fail_at=fail_at))
    assert model.loglikelihood(ONE) == lm().loglikelihood(ONE)
    block = energy_of(model)
    assert block["status"] == ("not measured" if fail_at == "start" else "partial")
    assert any("the meter" in note for note in block["notes"])
    assert block["total"]["requests"] == 1


def test_a_window_ends_when_the_last_process_has_finished(lm, monkeypatch):
    log, clock = log_of()
    model = lm((log, clock), energy=True)
    monkeypatch.setattr(type(model), "world_size", 2)
    monkeypatch.setattr(model, "barrier", lambda: clock.sleep(2.0))
    model.loglikelihood(ONE)
    record = energy_of(model)["request_types"]["loglikelihood"]
    assert (record["seconds"], record["joules"]["total"]) == (3.0, 45.0)


def test_machines_add_up_and_processes_are_not_metered_twice():
    logs = [
        # 100 W and 50 W at idle; 500 W and 250 W at work, for 10 s.
        log_of({"cpu": [(0.0, 100.0), (4.0, 500.0)]}, idle_seconds=4),
        log_of({"cpu": [(0.0, 50.0), (4.0, 250.0)]}, idle_seconds=4),
        # A second process of the first machine, which another one meters.
        (EnergyLog(EnergyMonitor(None), 4, lambda _: None), Clock()),
    ]
    (first, _), kind = logs[0], "loglikelihood"
    for _ in range(2):
        for log, clock in logs:
            lm = SimpleNamespace(token_counts=TokenCounts())
            log.measure_idle()
            with log.window("request_types", kind, lm=lm, requests=1):
                with log.window("set_up", "batch_size_search", kind):
                    clock.sleep(2.0)
                clock.sleep(10.0)
                lm.token_counts.prompt += 3
        first.add([log.take() for log, _ in logs])
    block = first.finish()
    assert block["machines"] == 2
    assert (block["idle"]["seconds"], block["idle"]["mean_watts"]) == (4.0, 150.0)
    for record in (block["request_types"][kind], block["total"]):
        assert (record["requests"], record["prompt_tokens"]) == (6, 2 * 3 * 3)
        assert record["seconds"] == 2 * 10.0
        assert record["joules"]["total"] == 2 * (5000 + 2500)
        assert record["idle_joules"]["total"] == 2 * (1000 + 500)
        assert record["net_joules"]["total"] == 2 * (4000 + 2000)
    search = block["set_up"]["batch_size_search"][kind]
    assert (search["seconds"], search["joules"]["total"]) == (2 * 2.0, 2 * (1000 + 500))


@pytest.mark.slow
def test_two_processes_of_one_machine_are_metered_once(tiny_llama, tmp_path):
    model_args = f"pretrained={tiny_llama},ratio=2.0,energy=true"
    arguments = evaluations.command("pruned-hf", model_args, tmp_path / "two", limit=5)
    command = [*evaluations.TWO_PROCESSES, "-m", *arguments]
    evaluations.run(command, tmp_path, check=True, ACCELERATE_USE_CPU="true")
    two = evaluations.results(tmp_path / "two")["config"]
    _, one = evaluations.evaluate("pruned-hf", model_args, limit=5)
    assert (two["energy"]["status"], two["energy"]["machines"]) == ("ok", 1)
    record, whole = (each["energy"]["total"] for each in (two, one))
    for key in ("requests", "prompt_tokens", "processed_tokens"):
        # The harness gives all processes equally many, repeating some.
        assert whole[key] <= record[key] < 1.5 * whole[key]
    # Two meters would add up to twice the power.
    watts = [each["joules"]["ram"] / each["seconds"] for each in (record, whole)]
    assert watts[0] < 1.5 * watts[1]
