"""``pruned-hf,energy=true``: tokens, windows, tasks, cache, processes and the block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from lm_eval_pruned.energy.monitor import EnergyMonitor, meters_the_machine
from lm_eval_pruned.model_wrappers.batching.answer_paths import TokenCounts
from lm_eval_pruned.model_wrappers.batching.generation import count_generated
from lm_eval_pruned.model_wrappers.energy_windows import (
    SCHEMA_VERSION,
    EnergyLog,
    Usage,
)
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers import checkpoints, evaluations
from tests.helpers.layouts import save_family
from tests.helpers.meters import Clock, FakeMeter


def log_of(watts=None, *, idle_seconds=0, **meter):
    clock = Clock()
    monitor = EnergyMonitor(
        FakeMeter(clock, watts or {"cpu": 10.0, "ram": 5.0}, **meter), clock
    )
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


def scored(context, continuation, task="t", number=0):
    return Instance("loglikelihood", {}, (context, continuation), 0, (task, number, 1))


def generated(prompt, task="t", number=0, **arguments):
    arguments = {"until": [], "max_gen_toks": 4, "do_sample": False, **arguments}
    return Instance("generate_until", {}, (prompt, arguments), 0, (task, number, 1))


def rolling(text, task="t", number=0):
    return Instance("loglikelihood_rolling", {}, (text,), 0, (task, number, 1))


def test_scored_requests_are_counted_in_tokens_without_padding(lm):
    model = lm()
    model.loglikelihood([scored("abc", "de"), scored("a", "bcdefgh")])
    block = model.get_model_info()["energy"]["request_types"]["loglikelihood"]
    assert block["requests"] == 2
    assert block["prompt_tokens"] == 5 + 8
    # The last token of a continuation is scored but not sent through the model.
    assert block["processed_tokens"] == 4 + 7
    assert block["generated_tokens"] == 0
    assert block["joules_per_generated_token"] is None
    assert block["seconds"] == 1.0
    assert block["joules"] == {"cpu": 10.0, "gpu": None, "ram": 5.0, "total": 15.0}
    assert block["kwh"] == pytest.approx(15.0 / 3.6e6)
    assert block["mean_watts"] == 15.0
    assert block["joules_per_processed_token"] == pytest.approx(15.0 / 11)


def test_a_context_shared_by_one_token_answers_is_processed_once(lm):
    model = lm(logits_cache=True)
    model.loglikelihood([scored("abcd", "x"), scored("abcd", "y"), scored("abcd", "z")])
    assert model.token_counts == TokenCounts(prompt=15, processed=4)


def test_an_encoders_tokens_are_processed_too(tmp_path):
    save_family(tmp_path, "t5", 16)
    model = PrunedHFLM(
        str(tmp_path), device="cpu", batch_size=2, max_length=64, backend="seq2seq"
    )
    model._energy, _ = log_of()
    model._warmed_up = True
    positions = 0

    def watch(module, arguments, options):
        nonlocal positions
        ids = arguments[0] if arguments else options["input_ids"]
        positions += 0 if ids is None else ids.numel()

    for stack in (model.model.get_encoder(), model.model.get_decoder()):
        stack.register_forward_pre_hook(watch, with_kwargs=True)
    # Of equal length, so that nothing is padded; a text twice, which is computed twice.
    pairs = [("abcdef", "gh"), ("uvwxyz", "ij"), ("uvwxyz", "ij")]
    model.loglikelihood([scored(*pair) for pair in pairs])
    assert model.token_counts.processed == positions > 0
    path = model.get_model_info()["answer_paths"]["loglikelihood"]
    assert path["tokens_computed"] == {"plain": positions}


def test_rolling_requests_are_measured(lm):
    model = lm()
    model.loglikelihood_rolling([rolling("abcdef"), rolling("xy")])
    block = model.get_model_info()["energy"]["request_types"]["loglikelihood_rolling"]
    assert block["requests"] == 2
    # One token of context is put before each text.
    assert block["prompt_tokens"] == 7 + 3
    assert block["processed_tokens"] == 6 + 2


def test_an_evaluation_has_its_own_requests(lm):
    model = lm()
    model.loglikelihood([scored("abcdef", "gh"), scored("xy", "z")])
    model.loglikelihood_rolling([rolling("abcdef")])
    model.begin_evaluation()
    model.loglikelihood([scored("abcd", "ef")])
    info = model.get_model_info()
    assert list(info["energy"]["request_types"]) == ["loglikelihood"]
    assert info["energy"]["request_types"]["loglikelihood"]["requests"] == 1
    assert info["energy"]["total"]["prompt_tokens"] == 6
    assert info["answer_paths"]["loglikelihood"]["requests"] == {"plain": 1}


def test_generated_tokens_stop_at_the_end_of_text(lm, monkeypatch):
    model = lm(slot_refilling=False)
    end = checkpoints.TINY["eos_token_id"]
    pad = checkpoints.TINY["pad_token_id"]

    def generate(input_ids, **_):
        new = torch.tensor([[1, 2, 3, 4], [5, end, pad, pad]])
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(model.model, "generate", generate)
    model.generate_until([generated("abcdef"), generated("xy")])
    assert model.token_counts == TokenCounts(prompt=8, generated=6, processed=8 + 6 - 2)
    block = model.get_model_info()["energy"]["request_types"]["generate_until"]
    assert block["requests"] == 2


def test_generation_counts_what_the_model_was_given(lm):
    model = lm(slot_refilling=False)
    positions = 0
    forward = model.model.model.forward

    def watched(*args, **kwargs):
        nonlocal positions
        ids = kwargs["input_ids"]
        positions += int(kwargs["attention_mask"][:, -ids.shape[1] :].sum())
        return forward(*args, **kwargs)

    model._warmed_up = True
    model.model.model.forward = watched
    model.model.generation_config.eos_token_id = None
    model.generate_until([generated("abcdef"), generated("xy")])
    assert model.token_counts.generated == 8
    assert model.token_counts.processed == positions


@given(
    st.lists(
        st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=4
    ),
    st.lists(st.integers(0, 4), max_size=2, unique=True),
)
def test_count_generated_agrees_with_counting_by_hand(rows, ends):
    by_hand = 0
    for row in rows:
        for token in row:
            by_hand += 1
            if token in ends:
                break
    assert count_generated(torch.tensor(rows), ends) == by_hand


def test_tokens_of_shared_prefixes_and_of_the_plain_path(lm, monkeypatch):
    model = lm(prefix_sharing=True)
    # The positions that the model was given; none of the rows is padded.
    positions = 0

    def watch(_, inputs):
        nonlocal positions
        positions += inputs[0].numel()

    model.model.get_input_embeddings().register_forward_pre_hook(watch)
    model._warmed_up = True
    assert model._can_take(model._sharing)
    shared = [scored("One preamble. " + c, " no") for c in ("abc", "abd", "xyz")]
    alone = [scored("nothing in common", " yes")]
    for requests in (shared, alone):
        before, positions = replace(model.token_counts), 0
        model.loglikelihood(requests)
        counts = model.token_counts - before
        assert counts.prompt == sum(len("".join(r.args)) for r in requests)
        assert counts.processed == positions
    # Some of a call's requests exceed what may be shared.
    model.config.sliding_window = 20
    before, positions = replace(model.token_counts), 0
    model.loglikelihood(
        shared + [scored("twenty-one characters" + c, "q") for c in "ab"]
    )
    counts = model.token_counts - before
    assert counts.prompt == 3 * 20 + 2 * 23
    assert counts.processed == positions
    assert 2 * 22 < counts.processed < counts.prompt - 20


def test_tasks_are_windows_of_their_own_and_answers_keep_their_places(lm):
    requests = [
        scored("abcd", "x", "one", 0),
        scored("The sky", " is blue", "two", 0),
        scored("efgh", "y", "one", 1),
        scored("ijklm", "z", "three", 0),
    ]
    plain = lm().loglikelihood(requests)
    model = lm(energy=True, energy_per_task=True)
    assert model.loglikelihood(requests) == [
        (pytest.approx(score, abs=1e-4), greedy) for score, greedy in plain
    ]
    block = model.get_model_info()["energy"]
    tasks = block["tasks"]
    assert [tasks[t]["loglikelihood"]["requests"] for t in ("one", "two", "three")] == [
        2,
        1,
        1,
    ]
    whole = block["request_types"]["loglikelihood"]
    for key in ("seconds", "prompt_tokens", "processed_tokens", "kwh"):
        parts = sum(task["loglikelihood"][key] for task in tasks.values())
        assert parts == pytest.approx(whole[key])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_type", "requests", "arguments", "searches"),
    [
        ("loglikelihood", [scored("a" * n, "b") for n in (9, 7, 5, 3)], {}, 2),
        (
            "loglikelihood",
            [scored("abcd", "ef", "t"), scored("ab", "c", "u")],
            {"energy": True, "energy_per_task": True},
            2,
        ),
        ("loglikelihood_rolling", [rolling("abcdef"), rolling("xy")], {}, 1),
        # Greedy requests run in slots; the one that HFLM gets makes it search.
        (
            "generate_until",
            [
                *(generated(text, max_gen_toks=130) for text in ("abc", "defg")),
                generated("xy", do_sample=True, temperature=0.5),
            ],
            {},
            1,
        ),
    ],
)
def test_the_search_for_a_batch_size_is_a_window_of_its_own(
    lm, request_type, requests, arguments, searches
):
    blocks = []
    # With two batches, as HFLM searches before each.
    size = 2 if searches == 2 and "energy" not in arguments else 4
    auto = f"auto:{searches}" if size == 2 else "auto"
    for batch_size in (size, auto):
        torch.manual_seed(0)
        model = lm(
            batch_size=batch_size, max_batch_size=size, max_length=256, **arguments
        )
        getattr(model, request_type)(requests)
        blocks.append(model.get_model_info()["energy"])
    fixed, found = blocks
    assert found["request_types"] == fixed["request_types"]
    assert found["total"] == fixed["total"]
    assert found.get("tasks") == fixed.get("tasks")
    assert "batch_size_search" not in fixed["set_up"]
    # HFLM sends five passes through the model in each search.
    search = found["set_up"]["batch_size_search"][request_type]
    assert search["seconds"] == 5.0 * searches
    assert search["joules"]["total"] == 15.0 * 5.0 * searches


def test_the_first_pass_ever_is_a_window_of_its_own(lm):
    model = lm()
    for _ in range(2):
        model.loglikelihood([scored("abc", "de")])
    model.generate_until([generated("abc", max_gen_toks=1)])
    block = model.get_model_info()["energy"]
    assert set(block["set_up"]) == {"warm_up"}
    assert set(block["set_up"]["warm_up"]) == {"loglikelihood"}
    assert block["set_up"]["warm_up"]["loglikelihood"]["joules"]["total"] == 15.0
    assert block["request_types"]["loglikelihood"]["seconds"] == 2.0
    assert block["total"]["joules"]["total"] == 15.0 * 3


def test_a_search_that_fails_is_not_told_of_the_next_requests(lm, monkeypatch):
    model = lm(batch_size="auto", max_batch_size=1, max_length=64)
    with monkeypatch.context() as patch:
        patch.setattr(model, "_model_call", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.loglikelihood([scored("abc", "de")])
    model.loglikelihood([scored("abc", "de")])
    block = model.get_model_info()["energy"]
    (search,) = block["set_up"]["batch_size_search"].values()
    assert search["seconds"] == 5.0
    assert block["total"]["seconds"] == 1.0


def test_idle_energy_is_measured_first_and_net_energy_may_be_negative(lm):
    log, clock = log_of({"cpu": [(0.0, 50.0), (4.0, 20.0)]}, idle_seconds=4)
    model = lm((log, clock))
    model.loglikelihood([scored("abc", "de")])
    model.loglikelihood([scored("abc", "de")])
    block = model.get_model_info()["energy"]
    assert block["idle"]["seconds"] == 4.0
    assert block["idle"]["mean_watts"] == 50.0
    record = block["request_types"]["loglikelihood"]
    assert record["joules"]["cpu"] == 40.0
    assert record["idle_joules"]["cpu"] == 100.0
    assert record["net_joules"] == {
        "cpu": -60.0,
        "gpu": None,
        "ram": None,
        "total": -60.0,
    }


@pytest.mark.parametrize(
    ("watts", "on_gpu", "status"),
    [
        ({"cpu": 10.0, "ram": 5.0}, False, "ok"),
        ({"cpu": 10.0, "ram": 5.0}, True, "partial"),
        ({"cpu": 10.0, "ram": 5.0, "gpu": 0.0}, False, "partial"),
        ({"cpu": 10.0, "ram": 5.0, "gpu": 50.0}, True, "ok"),
    ],
)
def test_without_the_energy_of_the_gpu_there_is_none_per_token(
    lm, monkeypatch, watts, on_gpu, status
):
    log, clock = log_of(watts, idle_seconds=2)
    model = lm((log, clock), energy=True, energy_per_task=True)
    if on_gpu:
        device = torch.device("cuda")
        monkeypatch.setattr(model, "_accelerators", lambda: {device})
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: None)
    model.loglikelihood([scored("abc", "de")])
    model.generate_until([generated("abc")])
    block = model.get_model_info()["energy"]
    assert block["status"] == status
    records = [
        *block["request_types"].values(),
        *(record for task in block["tasks"].values() for record in task.values()),
        block["total"],
        block["idle"],
    ]
    for record in records:
        assert record["joules"]["cpu"] > 0
        assert (record["joules"]["total"] is None) == (status != "ok")
        assert (record["mean_watts"] is None) == (status != "ok")
    for record in records[:-1]:
        known = record["joules_per_processed_token"] is not None
        assert known == (status == "ok")
        assert (record["net_joules"]["total"] is None) == (status != "ok")
    if status != "ok":
        assert any("gpu" in note and "no total" in note for note in block["notes"])
        assert (
            block["request_types"]["generate_until"]["joules_per_generated_token"]
            is None
        )


def test_devices_are_waited_for_where_a_meter_is_read_beside_other_work(
    lm, monkeypatch
):
    model = lm(batch_size="auto", max_batch_size=1, max_length=64)
    events = []
    monkeypatch.setattr(model, "_accelerators", lambda: {torch.device("cuda", 1)})
    monkeypatch.setattr(
        torch.accelerator, "synchronize", lambda device: events.append(str(device))
    )
    for name in ("begin_window", "end_window"):
        method = getattr(model._energy.monitor, name)
        monkeypatch.setattr(
            model._energy.monitor,
            name,
            lambda *args, method=method, **kwargs: (
                events.append("meter"),
                method(*args, **kwargs),
            )[1],
        )
    model.loglikelihood([scored("abc", "de")])
    # Warm-up, then the search within the window of the requests.
    wait = "cuda:1"
    assert events == [*(wait, "meter") * 2, "meter", *(wait, "meter") * 2, "meter"]


@pytest.mark.parametrize("fail_at", ["start", 1, 3, "stop"])
def test_answers_survive_a_meter_that_fails(lm, fail_at):
    requests = [scored("abc", "de")]
    expected = lm().loglikelihood(requests)
    model = lm(log_of(fail_at=fail_at))
    assert model.loglikelihood(requests) == expected
    assert model.loglikelihood(requests) == expected
    block = model.get_model_info()["energy"]
    assert block["status"] in {"not measured", "partial"}
    assert any("the meter" in note for note in block["notes"])
    assert block["request_types"]["loglikelihood"]["requests"] == 2
    json.dumps(block)


def test_a_model_that_raises_leaves_no_window_open(lm, monkeypatch):
    model = lm()
    with monkeypatch.context() as patch:
        patch.setattr(model.model, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.loglikelihood([scored("abc", "de")])
    model.loglikelihood([scored("abc", "de")])
    assert model.get_model_info()["energy"]["total"]["requests"] == 1


def test_cached_answers_cost_nothing_and_are_counted(lm, tmp_path):
    requests = [scored("abc", "de"), scored("abc", "fg")]
    first = CachingLM(lm(), str(tmp_path / "cache.db"))
    answers = first.loglikelihood(requests)
    assert first.get_model_info()["energy"]["cached_answers"] == 0
    first.dbdict.close()

    second = CachingLM(lm(), str(tmp_path / "cache.db"))
    assert [tuple(a) for a in second.loglikelihood([*requests, scored("q", "r")])] == [
        *answers,
        second.lm.loglikelihood([scored("q", "r")])[0],
    ]
    block = second.get_model_info()["energy"]
    assert block["cached_answers"] == 2
    assert block["request_types"]["loglikelihood"]["requests"] == 2

    third = CachingLM(lm(), str(tmp_path / "cache.db"))
    third.loglikelihood(requests)
    block = third.get_model_info()["energy"]
    assert block["cached_answers"] == 2
    assert block["request_types"] == {}
    assert block["total"]["requests"] == 0
    assert block["total"]["joules"]["total"] is None


def test_the_block_is_json_and_the_same_when_asked_twice(lm):
    model = lm()
    model.loglikelihood([scored("abc", "de")])
    model.loglikelihood([scored("abc", "de")])
    block = model.get_model_info()["energy"]
    assert block["total"]["requests"] == 2
    assert json.loads(json.dumps(block)) == block
    assert model.get_model_info()["energy"] == block


def test_a_model_that_is_evaluated_again_starts_from_nothing(lm, tmp_path):
    model = lm(log_of(idle_seconds=2))
    cache = CachingLM(model, str(tmp_path / "cache.db"))
    cache.loglikelihood([scored("abc", "de")])
    first = cache.get_model_info()["energy"]
    cache.generate_until([generated("abc")])
    second = cache.get_model_info()["energy"]
    assert set(first["request_types"]) == {"loglikelihood"}
    assert set(second["request_types"]) == {"generate_until"}
    assert second["total"]["requests"] == 1
    assert second["idle"] == first["idle"]
    cache.loglikelihood([scored("abc", "de")])
    third = cache.get_model_info()["energy"]
    assert third["request_types"] == {}
    assert third["cached_answers"] == 1


@pytest.mark.parametrize("announced", [True, False])
def test_every_evaluation_counts_the_answers_it_was_handed(lm, announced):
    """They are handed over before the requests that are left to compute, as in a sweep."""
    model = lm()
    counted = []
    for _ in range(3):
        if announced:
            model.begin_evaluation()
        model.count_kept_answers(5)
        model.loglikelihood([scored("abc", "de")])
        counted.append(model.get_model_info()["energy"]["cached_answers"])
    assert counted == [5, 5, 5]


def test_machines_add_up_and_processes_are_not_metered_twice():
    log, clock = log_of()
    processes = []
    for metered, tokens, duration in [(True, 3, 2.0), (False, 4, 0.0), (True, 5, 4.0)]:
        reading = None
        if metered:
            log.monitor.begin_window("w")
            clock.sleep(duration)
            reading = log.monitor.end_window("w")
        usage = Usage(1, TokenCounts(prompt=tokens), reading)
        processes.append(
            {("request_types", "loglikelihood"): usage, ("cached_answers",): Usage(1)}
        )
    processes.append({("cached_answers",): Usage(2)})
    log.add(processes)
    block = log.finish()
    record = block["request_types"]["loglikelihood"]
    assert record["prompt_tokens"] == 12
    assert record["joules"]["total"] == 15.0 * 6.0
    assert record["seconds"] == 4.0
    assert block["machines"] == 2
    assert block["cached_answers"] == 5


def test_the_idle_power_of_all_machines_is_subtracted():
    machines = [
        # 100 W and 50 W at idle; 500 W and 250 W at work, for 10 s.
        log_of({"cpu": [(0.0, 100.0), (4.0, 500.0)]}, idle_seconds=4),
        log_of({"cpu": [(0.0, 50.0), (4.0, 250.0)]}, idle_seconds=4),
    ]
    # A second process of the first machine, which another one meters.
    logs = [*machines, (EnergyLog(None, 4, lambda _: None), None)]
    lm = SimpleNamespace(token_counts=TokenCounts())
    for _ in range(2):
        shares = []
        for (log, clock), seconds in zip(logs, (10.0, 10.0, 0.0), strict=True):
            log.measure_idle()
            key = "request_types", "loglikelihood"
            with log.window(*key, lm=lm, requests=1, left_open=True):
                with log.window("set_up", "batch_size_search", key[1]):
                    if clock is not None:
                        clock.sleep(2.0)
                if clock is not None:
                    clock.sleep(seconds)
            shares.append(log.take())
        machines[0][0].add(shares)
    block = machines[0][0].finish()
    assert block["machines"] == 2
    assert block["idle"]["seconds"] == 4.0
    assert block["idle"]["joules"]["total"] == 4 * (100 + 50)
    assert block["idle"]["mean_watts"] == 150.0
    for record in (block["request_types"]["loglikelihood"], block["total"]):
        assert record["joules"]["total"] == 2 * (5000 + 2500)
        assert record["idle_joules"]["total"] == 2 * (1000 + 500)
        assert record["net_joules"]["total"] == 2 * (4000 + 2000)
    search = block["set_up"]["batch_size_search"]["loglikelihood"]
    assert search["seconds"] == 2 * 2.0
    assert search["joules"]["total"] == 2 * (1000 + 500)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"SLURM_LOCALID": "3"}, False),
        ({"LOCAL_RANK": "0", "SLURM_LOCALID": "3"}, True),
    ],
)
def test_one_process_of_a_launcher_meters_its_machine(
    monkeypatch, environment, expected
):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert meters_the_machine() is expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"energy_country": "FRA"}, "energy_country=FRA.*energy=true"),
        ({"energy_idle_seconds": 3}, "energy_idle_seconds=3.*energy=true"),
        ({"energy": True, "energy_country": "France"}, "energy_country=France"),
        ({"energy": True, "energy_idle_seconds": -1}, "energy_idle_seconds=-1"),
        ({"energy": True, "energy_idle_seconds": "long"}, "energy_idle_seconds=long"),
    ],
)
def test_arguments_are_checked_before_the_model_loads(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrunedHFLM("there is no such model", **arguments)


def test_nothing_is_imported_or_started_when_it_is_off(tiny_llama):
    code = (
        "import sys, threading\n"
        "from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM\n"
        f"lm = PrunedHFLM({str(tiny_llama)!r}, device='cpu')\n"
        "assert 'energy' not in lm.get_model_info()\n"
        "names = [n for n in sys.modules if n.split('.')[0] == 'codecarbon']\n"
        "assert not names, names\n"
        "assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer)]\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.slow
def test_processes_meet_at_the_barrier(tmp_path):
    """Two real processes over gloo: counts of both, energy of one."""
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
            "--module",
            "tests.helpers.barrier_of_two_processes",
            str(tmp_path / "block.json"),
        ],
        check=True,
        cwd=checkpoints.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    block = json.loads((tmp_path / "block.json").read_text())
    record = block["request_types"]["loglikelihood"]
    assert block["machines"] == 1
    assert record["requests"] == 1 + 2
    assert record["prompt_tokens"] == 10 + 20
    assert record["joules"]["total"] == 7.0 * 3.0
    assert record["seconds"] == 3.0


@pytest.mark.slow
def test_the_stock_command_writes_the_block(tiny_llama, tmp_path):
    """The real codecarbon, the real command, no network."""
    command = Path(sys.executable).with_name("lm_eval")
    model_args = (
        f"pretrained={tiny_llama},ratio=2.0,energy=true,energy_per_task=true,"
        "energy_idle_seconds=0.3,energy_country=ESP,max_length=512,prefix_sharing=false,slot_refilling=false"
    )
    subprocess.run(
        [
            command,
            "--model=pruned-hf",
            f"--model_args={model_args}",
            "--tasks=pruned_demo",
            "--device=cpu",
            "--batch_size=auto",
            "--max_batch_size=2",
            "--limit=3",
            f"--output_path={tmp_path / 'out'}",
        ],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (results,) = (tmp_path / "out").glob("**/results_*.json")
    block = json.loads(results.read_text())["config"]["energy"]
    assert block["status"] == "ok"
    assert block["schema_version"] == SCHEMA_VERSION
    assert block["country"] == "ESP"
    assert set(block["request_types"]) == {"loglikelihood", "generate_until"}
    for record in (*block["request_types"].values(), block["total"], block["idle"]):
        joules = record["joules"]
        parts = [joules[name] for name in ("cpu", "gpu", "ram") if joules[name]]
        assert joules["total"] == pytest.approx(sum(parts), rel=1e-6)
        assert record["mean_watts"] == pytest.approx(
            joules["total"] / record["seconds"]
        )
        assert record["emissions_kg_co2e"] == pytest.approx(
            record["kwh"] * record["carbon_intensity_g_co2e_per_kwh"] / 1000
        )
    for name, record in block["request_types"].items():
        parts = [
            types[name]["joules"]["total"]
            for types in block["tasks"].values()
            if name in types
        ]
        slack = block["resolution_seconds"] * record["mean_watts"] * 2 * len(parts)
        assert sum(parts) == pytest.approx(record["joules"]["total"], abs=slack)
    # Every type of request was preceded by a search, which no record above holds.
    assert set(block["set_up"]["batch_size_search"]) == set(block["request_types"])
    for search in block["set_up"]["batch_size_search"].values():
        assert search["joules"]["total"] > 0
    for name, source in block["sources"].items():
        assert (block["total"]["joules"][name] is None) == (source["kind"] == "none")


_SITE = """
import os, socket

def refuse(*args, **kwargs):
    with open(os.environ["NETWORK_ATTEMPTS"], "a") as file:
        print(args, file=file)
    raise OSError("the network is off limits in this test")

connect = socket.socket.connect
socket.socket.connect = lambda self, address: (
    connect(self, address) if self.family == socket.AF_UNIX else refuse(address)
)
socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse
"""


@pytest.mark.slow
def test_an_evaluation_with_energy_never_uses_the_network(tiny_llama, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_SITE)
    attempts = tmp_path / "attempts"
    guarded = {
        "PYTHONPATH": str(tmp_path / "site"),
        "NETWORK_ATTEMPTS": str(attempts),
    }
    ask = "import socket; socket.create_connection(('localhost', 9))"
    done = evaluations.run([sys.executable, "-c", ask], tmp_path, **guarded)
    assert "off limits" in done.stderr
    attempts.unlink()

    model_args = f"pretrained={tiny_llama},ratio=2.0,energy=true,energy_country=ESP"
    arguments = evaluations.command("pruned-hf", model_args, tmp_path / "out")
    done = evaluations.run(arguments, tmp_path, **guarded)
    assert done.returncode == 0, done.stderr
    assert not attempts.exists(), attempts.read_text()
    _, config = evaluations.read(tmp_path / "out")
    assert config["energy"]["status"] == "ok"


@pytest.mark.slow
def test_two_processes_of_one_machine_are_metered_once(tiny_llama, tmp_path):
    model_args = f"pretrained={tiny_llama},ratio=2.0,energy=true"
    arguments = evaluations.command("pruned-hf", model_args, tmp_path / "two", limit=5)
    done = evaluations.run(
        [*evaluations.TWO_PROCESSES, "-m", *arguments],
        tmp_path,
        ACCELERATE_USE_CPU="true",
    )
    assert done.returncode == 0, done.stderr
    _, two = evaluations.read(tmp_path / "two")
    _, one = evaluations.evaluate("pruned-hf", model_args, limit=5)
    assert two["energy"]["status"] == "ok"
    assert two["energy"]["machines"] == 1
    record, whole = (each["energy"]["total"] for each in (two, one))
    for key in ("requests", "prompt_tokens", "processed_tokens"):
        # The harness gives all processes equally many, repeating some.
        assert whole[key] <= record[key] < 1.5 * whole[key]
    # Two meters would add up to twice the power.
    watts = [each["joules"]["ram"] / each["seconds"] for each in (record, whole)]
    assert watts[0] < 1.5 * watts[1]
