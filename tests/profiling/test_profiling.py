"""Profiles of tiny models on a clock that tests move: known times, known energy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, strategies as st

from lm_eval_pruned.checkpoints.load import load_pruned
from lm_eval_pruned.cli import main
from lm_eval_pruned.energy.monitor import EnergyMonitor
from lm_eval_pruned.profiling import measure, report as profile_report
from lm_eval_pruned.profiling.measure import Profiler, generate, profile
from lm_eval_pruned.profiling.options import ProfileRequest, plan_models
from lm_eval_pruned.profiling.prompts import demo_prompts, make_batches, read_prompts
from lm_eval_pruned.profiling.summary import (
    SCHEMA_VERSION,
    change,
    distribution,
    estimate,
)
from tests.helpers import checkpoints
from tests.helpers.meters import Clock, FakeMeter


PREFILL, STEP = 0.5, 0.125
PROMPTS = ["ab", "bcd", "efghij", "kl"]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def loader(clock):
    """Return a loader whose models take `PREFILL` + `STEP` per step, times their width."""

    def load(pretrained, **arguments):
        model = load_pruned(pretrained, **arguments)
        forward = model.forward
        own = [layer.mlp.down_proj.in_features for layer in model.model.layers]
        model.share = sum(own) / len(own) / 88

        def timed(*args, **kwargs):
            ids = kwargs["input_ids"]
            clock.sleep((PREFILL if ids.shape[1] > 1 else STEP) * model.share)
            return forward(*args, **kwargs)

        model.forward = timed
        return model

    return load


@pytest.fixture
def run(tiny_llama, clock, loader):
    def run_(
        watts=10.0, meter=None, prompts=PROMPTS, load=loader, on_repeat=None, **changes
    ):
        request = ProfileRequest(
            str(tiny_llama),
            **{
                "ratios": ("1.375",),
                "max_new_tokens": 5,
                "repeats": 2,
                "batch_sizes": (1,),
                **changes,
            },
        )
        meter = meter or FakeMeter(clock, {"cpu": watts, "ram": 2.0})
        monitor = EnergyMonitor(meter, clock)
        return profile(
            request,
            prompts,
            monitor=monitor,
            clock=clock,
            load=load,
            on_repeat=on_repeat,
        )

    return run_


def cell(result, model="baseline", mode="fixed", batch_size=1):
    (found,) = [
        c
        for c in result["cells"]
        if (c["model"], c["mode"], c["batch_size"]) == (model, mode, batch_size)
    ]
    return found


def test_prefill_and_decode_are_told_apart(run):
    found = cell(run())
    assert found["seconds_to_first_token"]["mean"] == pytest.approx(PREFILL)
    assert found["seconds_per_output_token"]["mean"] == pytest.approx(STEP)
    assert found["seconds_end_to_end"]["mean"] == pytest.approx(PREFILL + 4 * STEP)
    assert found["seconds_end_to_end"]["n"] == 4 * 2
    assert found["seconds_end_to_end"]["sd"] == pytest.approx(0)
    assert found["mean_output_tokens"] == 5
    assert found["prompt_tokens"] == sum(map(len, PROMPTS))
    assert found["prefill_tokens_per_second"]["mean"] == pytest.approx(
        found["prompt_tokens"] / (4 * PREFILL)
    )
    assert found["decode_tokens_per_second"]["mean"] == pytest.approx(1 / STEP)


@pytest.mark.slow
def test_energy_of_the_phases_is_power_times_their_time(run):
    found = cell(run(watts=10.0))
    assert found["joules"]["prefill"]["cpu"] == pytest.approx(10 * 4 * PREFILL)
    assert found["joules"]["decode"]["cpu"] == pytest.approx(10 * 4 * 4 * STEP)
    assert found["joules"]["both"]["ram"] == pytest.approx(2 * 4 * (PREFILL + 4 * STEP))
    assert found["joules"]["both"]["gpu"] is None
    assert found["joules_per_prompt_token"]["mean"] == pytest.approx(
        12 * 4 * PREFILL / found["prompt_tokens"]
    )
    assert found["joules_per_decode_token"]["mean"] == pytest.approx(12 * STEP)
    assert found["joules_per_output_token"]["mean"] == pytest.approx(
        12 * (PREFILL + 4 * STEP) / 5
    )


@pytest.mark.slow
def test_a_narrower_model_is_faster_by_its_width_and_the_interval_says_so(run):
    found = cell(run(), "ratio=1.375")
    for metric in ("seconds_per_output_token", "joules_per_decode_token"):
        assert found["deltas"][metric]["percent"] == pytest.approx(-50)
        assert found["deltas"][metric]["verdict"] == "lower"
    assert found["deltas"]["decode_tokens_per_second"]["percent"] == pytest.approx(100)
    assert found["deltas"]["decode_tokens_per_second"]["verdict"] == "higher"
    assert cell(run())["deltas"] == {}


@pytest.mark.slow
def test_a_drift_of_the_machine_hits_all_models_alike(run, clock, loader):
    """Each repeat is slower than the one before; the difference stays what it is."""
    loaded = []

    def load(*args, **kwargs):
        model = loader(*args, **kwargs)
        loaded.append(model)
        return model

    def slow_down(_):
        for model in loaded:
            inner = model.forward

            def slower(*args, inner=inner, **kwargs):
                before = clock.now
                output = inner(*args, **kwargs)
                clock.sleep(clock.now - before)
                return output

            model.forward = slower

    result = run(load=load, repeats=3, on_repeat=slow_down)
    assert cell(result)["seconds_per_output_token"]["sd"] > 0.5 * STEP
    slower = cell(result, "ratio=1.375")["deltas"]["seconds_per_output_token"]
    assert slower["percent"] == pytest.approx(-50)
    assert slower["low"] == pytest.approx(-50)
    assert slower["high"] == pytest.approx(-50)


@pytest.mark.slow
def test_a_model_that_stops_early_is_shorter_and_not_faster(run, loader, monkeypatch):
    """The natural length differs, the time per token does not: the study's "penalty"."""
    end = checkpoints.TINY["eos_token_id"]

    def load(*args, **kwargs):
        model = loader(*args, **kwargs)
        model.share = 1
        if "ratio" not in kwargs:
            head = model.lm_head.forward

            def ends_at_once(hidden):
                logits = head(hidden)
                logits[..., end] = logits.amax() + 1
                return logits

            model.lm_head.forward = ends_at_once
        else:
            head_ = model.lm_head.forward

            def never_ends(hidden):
                logits = head_(hidden)
                logits[..., end] = -torch.inf
                return logits

            model.lm_head.forward = never_ends
        return model

    result = run(load=load)
    natural, pruned = (
        cell(result, name, "natural") for name in ("baseline", "ratio=1.375")
    )
    assert natural["mean_output_tokens"] == 1
    assert natural["seconds_per_output_token"] is None
    assert natural["joules_per_decode_token"] is None
    assert pruned["mean_output_tokens"] == 5
    assert pruned["deltas"]["seconds_end_to_end"]["verdict"] == "higher"
    assert pruned["deltas"]["mean_output_tokens"]["percent"] == pytest.approx(400)
    fixed = cell(result, "ratio=1.375", "fixed")
    assert cell(result)["mean_output_tokens"] == fixed["mean_output_tokens"] == 5
    assert fixed["deltas"]["seconds_end_to_end"]["verdict"] == "no difference seen"
    text = profile_report.as_markdown(result)
    assert "|baseline|1.0|" in text
    assert "|ratio=1.375|5.0|" in text


def test_padding_is_no_work(run):
    found = cell(run(batch_sizes=(4,)), batch_size=4)
    assert found["prompts"] == 4
    assert found["prompt_tokens"] == sum(map(len, PROMPTS))
    assert found["prefill_tokens_per_second"]["mean"] == pytest.approx(
        sum(map(len, PROMPTS)) / PREFILL
    )
    assert found["decode_tokens_per_second"]["mean"] == pytest.approx(4 / STEP)


def test_left_padding_does_not_change_what_is_generated(tiny_llama):
    model = load_pruned(str(tiny_llama))
    tokenizer = checkpoints.byte_tokenizer()
    (batch,) = make_batches(tokenizer, PROMPTS, 4, "cpu")
    assert batch.ids.shape == (4, 6)
    assert batch.mask[0].tolist() == [0, 0, 0, 0, 1, 1]
    together = model.generate(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )
    for row, prompt in enumerate(PROMPTS):
        (alone,) = make_batches(tokenizer, [prompt], 1, "cpu")
        expected = model.generate(
            input_ids=alone.ids,
            attention_mask=alone.mask,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
        )
        assert torch.equal(together[row, 6:], expected[0, len(prompt) :])


def test_the_fixed_length_is_kept_although_the_text_ends(tiny_llama):
    model = load_pruned(str(tiny_llama))
    model.generation_config.eos_token_id = list(range(200))
    (batch,) = make_batches(checkpoints.byte_tokenizer(), ["abc"], 1, "cpu")
    timing = generate(model, batch, 7, fixed=True, pad_token=258)
    assert timing["steps"] == timing["output_tokens"] == 7


@pytest.mark.slow
def test_models_are_interleaved_and_warm_ups_are_counted(run, monkeypatch):
    order = []
    inner = Profiler.measure

    def watched(self, repeat, spec, size):
        order.append((repeat, spec["name"], size))
        return inner(self, repeat, spec, size)

    monkeypatch.setattr(Profiler, "measure", watched)
    result = run(batch_sizes=(1, 2))
    small = "ratio=1.375"
    assert order == [
        (0, "baseline", 1),
        (0, small, 1),
        (0, "baseline", 2),
        (0, small, 2),
        (1, small, 1),
        (1, "baseline", 1),
        (1, small, 2),
        (1, "baseline", 2),
    ]
    assert result["models_held"] == "together"
    assert result["warm_up_batches"] == 2 * 2 * 2
    assert cell(result)["repeats"] == 2


@pytest.mark.slow
def test_models_too_large_to_hold_together_are_loaded_in_turns(
    run, loader, monkeypatch
):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 0)
    names = []

    def load(*args, **kwargs):
        names.append(kwargs.get("ratio", "baseline"))
        return loader(*args, **kwargs)

    result = run(load=load)
    assert result["models_held"] == "one at a time"
    assert names == ["baseline", "1.375", "baseline"]
    assert result["warm_up_batches"] == 3 * 2
    assert {c["repeats"] for c in result["cells"]} == {2}


def test_an_engine_is_held_alone_times_itself_and_hides_its_memory(run, loader):
    closed = []

    def timed(batch, tokens, *, fixed, clock):
        total = 0.25 + 0.5 * (tokens - 1)
        clock.sleep(total)
        told = dict.fromkeys(("output_tokens", "steps"), tokens)
        told |= {"rows": 1, "prompt_tokens": int(batch.mask.sum())}
        return {**told, "first": 0.25, "total": total}

    def load(*args, **kwargs):
        model = loader(*args, **kwargs)
        # What `lm_eval_pruned.profiling.engine.EngineModel` has.
        model.close = lambda: closed.append(model.config.intermediate_size)
        model.timed_generation = timed
        return model

    result = run(load=load)
    assert result["models_held"] == "one at a time"
    assert closed == [88, 44, 88]
    found = cell(result)
    assert found["seconds_to_first_token"]["mean"] == 0.25
    assert found["seconds_per_output_token"]["mean"] == 0.5
    assert found["peak_host_bytes"] is found["peak_device_bytes"] is None


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_finished(run, monkeypatch):
    inner = Profiler.measure
    finished = []

    def stop_at_the_sixth(self, *args):
        if len(finished) == 5:
            raise KeyboardInterrupt
        finished.append(inner(self, *args))
        return finished[-1]

    monkeypatch.setattr(Profiler, "measure", stop_at_the_sixth)
    result = run(repeats=4)
    assert result["interrupted"]
    # The order turns: baseline, small; small, baseline; baseline.
    assert cell(result)["repeats"] == 3
    assert cell(result, "ratio=1.375")["repeats"] == 2
    assert "Interrupted" in profile_report.as_markdown(result)
    assert (
        cell(result, "ratio=1.375")["deltas"]["seconds_end_to_end"]["low"] is not None
    )


def test_an_interrupt_before_anything_was_finished_is_passed_on(run, monkeypatch):
    def stop(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Profiler, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run()


@pytest.mark.slow
@pytest.mark.parametrize("fail_at", ["start", 3, "stop"])
def test_a_meter_that_fails_leaves_the_times(run, clock, fail_at):
    result = run(meter=FakeMeter(clock, {"cpu": 1.0}, fail_at=fail_at))
    found = cell(result)
    assert found["seconds_to_first_token"]["mean"] == pytest.approx(PREFILL)
    assert result["energy"]["notes"]
    if fail_at != "stop":
        assert found["joules_per_output_token"] is None
        assert "n/m" in profile_report.as_markdown(result)


@pytest.mark.slow
def test_without_the_energy_of_the_gpu_there_is_none_per_token(run, clock):
    # The meter knows a GPU, and its counter stays at 0.
    result = run(meter=FakeMeter(clock, {"cpu": 10.0, "gpu": 0.0}))
    found = cell(result)
    assert found["joules"]["both"]["cpu"] > 0
    assert found["joules"]["both"]["total"] is None
    assert found["joules_per_output_token"] is None
    assert any(
        "gpu" in note and "no total" in note for note in result["energy"]["notes"]
    )


def test_a_model_on_a_gpu_requires_its_energy(run, monkeypatch):
    required = []

    def start(self):
        required.append(set(self.required))
        raise KeyboardInterrupt

    monkeypatch.setattr(EnergyMonitor, "start", start)
    for device in ("cpu", "meta"):
        with pytest.raises(KeyboardInterrupt):
            run(device=device)
    assert required == [set(), {"gpu"}]


def test_negative_decode_energy_is_noted(run, clock):
    # The prefill window draws far more power than the generation after it.
    warm_up = 2 * (PREFILL + 4 * STEP)
    meter = FakeMeter(clock, {"cpu": [(0.0, 1000.0), (warm_up + 4 * PREFILL, 1.0)]})
    result = run(meter=meter, ratios=("2.75",), repeats=1)
    assert cell(result)["joules"]["decode"]["total"] < 0
    assert any("less energy than its prefill" in n for n in result["energy"]["notes"])


def test_widths_are_planned_and_equal_ones_measured_once(tmp_path, caplog):
    folder = checkpoints.save_tiny(tmp_path, intermediate_size=128)
    request = ProfileRequest(
        str(folder), ratios=("4.0", "3.1", "2.0"), multiple_of=(1, 64)
    )
    with caplog.at_level("INFO", "lm_eval.pruned.profiling"):
        models = plan_models(request)
    assert [(m["name"], m["intermediate_size"]) for m in models] == [
        ("baseline", 128),
        ("ratio=3.1", 100),
        ("ratio=3.1 multiple_of=64", 64),
    ]
    assert "ratio=2.0 has the width of ratio=3.1 multiple_of=64, 64" in caplog.text


def widths_file(folder, widths):
    folder.mkdir(exist_ok=True)
    file = folder / "widths.json"
    file.write_text(json.dumps(widths))
    return str(file)


@pytest.mark.slow
def test_models_of_files_of_widths_stand_beside_the_sizes(run, tmp_path):
    file = widths_file(tmp_path, [80, None, 20])
    result = run(widths=(file,))
    own = result["models"][2]
    assert [m["name"] for m in result["models"]] == [
        "baseline",
        "ratio=1.375",
        "widths=widths.json",
    ]
    assert own["asked"] == {"widths": file, "multiple_of": 1}
    assert own["layer_widths"] == "0:80,1:88,2:20"
    assert own["intermediate_size"] == pytest.approx(188 / 3, abs=1e-4)
    assert own["parameters"] == result["models"][0]["parameters"] - 3 * 32 * (8 + 68)
    loaded = load_pruned(result["request"]["pretrained"], widths=file)
    assert own["model_bytes"] == loaded.get_memory_footprint()
    assert "seconds_end_to_end" in cell(result, own["name"])["deltas"]
    text = profile_report.as_markdown(result)
    assert "|model MiB|widths by layer|" in text
    assert "|0:80,1:88,2:20|" in text
    drawn = profile_report.draw(result, "latency", "svg").decode()
    assert "batch size 1, fixed length, widths by layer" in drawn


@pytest.mark.slow
def test_files_of_widths_alone_are_a_profile(run, tmp_path):
    result = run(ratios=(), widths=(widths_file(tmp_path, {"0": 40}),))
    assert [m["layer_widths"] for m in result["models"]] == ["", "0:40,1-2:88"]


def test_files_of_widths_are_told_apart_and_equal_ones_measured_once(
    tiny_llama, tmp_path, caplog
):
    first, second, uniform = (
        widths_file(tmp_path / name, widths)
        for name, widths in (
            ("a", [50, 40, 42]),
            ("b", [42, 40, 50]),
            ("c", [44, 44, 44]),
        )
    )
    request = ProfileRequest(
        str(tiny_llama),
        ratios=("1.375",),
        widths=(first, second, uniform, first),
        multiple_of=(1, 40),
    )
    with caplog.at_level("INFO", "lm_eval.pruned.profiling"):
        models = plan_models(request)
    # All of them have a mean of 44 neurons.
    assert [(m["name"], m["layer_widths"]) for m in models[1:]] == [
        ("ratio=1.375", ""),
        ("ratio=1.375 multiple_of=40", ""),
        (f"widths={first}", "0:50,1:40,2:42"),
        (f"widths={second}", "0:42,1:40,2:50"),
    ]
    assert f"widths={uniform} has the width of ratio=1.375, 44" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": ()}, "pass ratios, prune_percents or widths"),
        ({"widths": ("none.json",)}, "widths=none.json cannot be read"),
        ({"ratios": ("9",)}, "ratio=9"),
        ({"ratios": ("x",)}, "ratio=x"),
        ({"multiple_of": (0,)}, "multiple_of=0"),
        ({"batch_sizes": (0,)}, "batch_sizes=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"max_new_tokens": 1}, "max_new_tokens=1"),
        ({"max_new_tokens": 5000}, "max_new_tokens=5000"),
    ],
)
def test_requests_out_of_range_are_refused(run, changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_prompts_come_from_text_and_from_json_lines(tmp_path):
    text = tmp_path / "p.txt"
    text.write_text("one\n\ntwo\n")
    assert read_prompts(text) == ["one", "two"]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "one"}\n\n{"prompt": "t\\nwo", "id": 3}\n')
    assert read_prompts(lines) == ["one", "t\nwo"]
    assert len(demo_prompts()) > 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "a"),
        ("p.txt", "\n \n"),
        ("p.jsonl", '{"prompt": 3}'),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}'),
        ("p.jsonl", "[1]"),
    ],
)
def test_prompts_that_are_none_are_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{name} does not hold prompts: pass"):
        read_prompts(path)


positive = st.floats(1e-3, 1e3)


@given(st.lists(positive, min_size=2, max_size=8), positive)
def test_a_constant_factor_is_found_without_doubt(values, factor):
    found = change([factor * value for value in values], values)
    assert found["percent"] == pytest.approx(100 * (factor - 1), abs=1e-6, rel=1e-6)


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=8))
def test_the_verdict_is_what_the_interval_says(pairs):
    found = change(*zip(*pairs, strict=True))
    assert found["low"] <= found["percent"] + 1e-9
    assert found["percent"] - 1e-9 <= found["high"]
    inside = found["low"] <= 0 <= found["high"]
    assert inside == (found["verdict"] == "no difference seen")


def test_the_interval_is_students():
    found = estimate([1.0, 2.0, 3.0, 4.0])
    half = 3.182446305284264 * math.sqrt(5 / 3) / 2
    assert found["mean"] == 2.5
    assert found["low"] == pytest.approx(2.5 - half)
    assert found["high"] == pytest.approx(2.5 + half)
    assert estimate([3.0])["low"] is None
    assert change([3.0], [2.0])["verdict"] == "one repeat, no interval"
    assert change([3.0, 0.0], [2.0, 1.0]) is None


@given(st.lists(positive, min_size=1, max_size=30))
def test_percentiles_are_ordered(values):
    found = distribution(values)
    assert min(values) <= found["p50"] <= found["p90"] <= found["p99"] <= max(values)
    assert (found["sd"] is None) == (len(values) == 1)


@pytest.mark.slow
def test_files_are_written_and_readable(run, tmp_path):
    result = run(batch_sizes=(1, 2))
    paths = profile_report.write(result, tmp_path)
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()}
    record = json.loads((tmp_path / "profile.json").read_text())
    assert record["schema_version"] == SCHEMA_VERSION
    assert [c["model"] for c in record["cells"]][:2] == ["baseline", "ratio=1.375"]
    assert record["models"][0]["model_bytes"] > record["models"][1]["model_bytes"] > 0
    for name in ("latency", "throughput", "energy"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ElementTree.fromstring((tmp_path / f"{name}.svg").read_text())  # noqa: S314
    again = profile_report.draw(result, "latency", "svg")
    assert again == (tmp_path / "latency.svg").read_bytes()


@pytest.mark.slow
def test_a_plot_without_energy_says_so(run, clock):
    result = run(meter=FakeMeter(clock, {"cpu": 1.0}, fail_at="start"))
    assert cell(result)["joules_per_output_token"] is None
    assert profile_report.draw(result, "energy", "png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_args", "ratio=2.0"], "pass --ratios instead"),
        (["--model_args", "widths=a.json"], "pass --widths instead"),
        (["--model_args", "device=cuda"], "pass --device instead"),
        (["--model_args", "pretrained={}", "--limit", "0"], "limit=0"),
        (["--model_args", "pretrained={}", "--prompts", "no.txt"], "no.txt"),
        (["--model_args", "pretrained={}", "--max_new_tokens", "999"], "999"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    tiny_llama, tmp_path, capsys, arguments, message
):
    arguments = [a.format(tiny_llama) for a in arguments]
    command = ["profile", "--ratios", "2.0", "--output_path", str(tmp_path / "out")]
    assert main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_command_measures_with_the_real_meter(tiny_llama, tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("The sky is\nOne two three\n")
    code = main(
        [
            "profile",
            f"--model_args=pretrained={tiny_llama},dtype=float32",
            "--ratios=1.5",
            f"--widths={widths_file(tmp_path, [60, 50, 40])}",
            f"--prompts={prompts}",
            "--max_new_tokens=4",
            "--repeats=1",
            "--device=cpu",
            f"--output_path={tmp_path / 'out'}",
        ]
    )
    assert code == 0
    record = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert record["energy"]["sources"]["ram"]["kind"] in {"modelled", "constant"}
    names = ["baseline", "ratio=1.5", "widths=widths.json"]
    assert [found["name"] for found in record["models"]] == names
    for found in record["cells"]:
        assert found["joules"]["both"]["total"] > 0
        assert found["seconds_to_first_token"]["mean"] > 0
    assert capsys.readouterr().out.startswith("# Profile of")


@pytest.mark.slow
def test_the_default_model_is_profiled(real_model, tmp_path):
    arguments = ["--limit=1", "--max_new_tokens=2", "--repeats=1", "--device=cpu"]
    output = f"--output_path={tmp_path / 'out'}"
    assert main(["profile", "--ratios=1.6", *arguments, output]) == 0
    record = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert [m["intermediate_size"] for m in record["models"]] == [1536, 922]


def test_help_imports_no_torch():
    code = (
        "import sys\n"
        "from lm_eval_pruned.cli import main\n"
        "try:\n main(['profile', '--help'])\nexcept SystemExit:\n pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
