"""Profiles of tiny models on a clock that tests move: known times, known energy."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, strategies as st

from lm_eval_pruned.checkpoints.load import load_pruned
from lm_eval_pruned.energy.meter import EnergyMonitor
from lm_eval_pruned.profiling import measure, report
from lm_eval_pruned.profiling.options import batches_of, plan_models, read_prompts
from lm_eval_pruned.profiling.summary import change, distribution, estimate
from tests.helpers import checkpoints
from tests.helpers.meters import monitor_of


PREFILL, STEP = 0.5, 0.125
PROMPTS = ["ab", "bcd", "efghij", "kl"]
LETTERS = sum(map(len, PROMPTS))
SMALL = "ratio=1.375"
END = checkpoints.TINY["eos_token_id"]


@pytest.fixture(scope="module")
def run(tiny_llama):
    """Return a function that profiles models which take `PREFILL` + `STEP` per step."""

    def run_(*, meter=None, edit=None, seen=None, interrupt_at=None, **changes):
        watts = {"watts": {"cpu": 10.0, "ram": 2.0}}
        (monitor, clock), passes = monitor_of(**watts | (meter or {})), []
        loaded = measure.load_pruned

        def load(pretrained, **arguments):
            model = loaded(pretrained, **arguments)
            widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
            model.slowness = sum(widths) / len(widths) / 88
            inner = model.forward

            def timed(*args, **kwargs):
                passes.append(widths[0])
                if len(passes) == interrupt_at:
                    raise KeyboardInterrupt
                first = kwargs["input_ids"].shape[1] > 1
                clock.sleep((PREFILL if first else STEP) * model.slowness)
                return inner(*args, **kwargs)

            model.forward = timed
            if edit:
                edit(model, arguments)
            return model

        given = {"ratios": ("1.375",), "max_new_tokens": 5, "repeats": 2, **changes}
        request = measure.ProfileRequest(str(tiny_llama), **given)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(measure, "load_pruned", load)
            for so_far in measure.profile(request, PROMPTS, monitor=monitor):
                if seen is not None:
                    seen.append((len(passes), so_far))
        return so_far

    return run_


@pytest.fixture(scope="module")
def result(run):
    return run()


def cell(result, model="baseline", mode="fixed", size=1):
    key = {"model": model, "mode": mode, "batch_size": size}
    (found,) = (c for c in result["cells"] if c.items() >= key.items())
    return found


def means(found):
    every = {k: v for k, v in found.items() if isinstance(v, dict) and "mean" in v}
    return {name: value["mean"] for name, value in every.items()}


def test_phases_are_told_apart_in_time_and_energy(result):
    found = cell(result)
    whole = PREFILL + 4 * STEP
    assert means(found) == pytest.approx(
        {
            "seconds_to_first_token": PREFILL,
            "seconds_per_output_token": STEP,
            "seconds_end_to_end": whole,
            "prefill_tokens_per_second": LETTERS / (4 * PREFILL),
            "decode_tokens_per_second": 1 / STEP,
            "joules_per_prompt_token": 12 * 4 * PREFILL / LETTERS,
            "joules_per_decode_token": 12 * STEP,
            "joules_per_output_token": 12 * whole / 5,
        }
    )
    assert found["seconds_end_to_end"]["n"] == 4 * 2
    assert found["seconds_end_to_end"]["sd"] == pytest.approx(0)
    assert (found["mean_output_tokens"], found["prompt_tokens"]) == (5, LETTERS)
    assert (found["repeats"], found["prompts"]) == (2, 4)
    for phase, seconds in (("prefill", PREFILL), ("decode", 4 * STEP), ("both", whole)):
        watts = {"cpu": 40, "ram": 8, "total": 48}
        joules = {part: power * seconds for part, power in watts.items()}
        assert found["joules"][phase] == pytest.approx({"gpu": None, **joules})


def test_a_narrower_model_is_faster_by_its_width_and_the_interval_says_so(result):
    deltas = cell(result, SMALL)["deltas"]
    for metric in ("seconds_per_output_token", "joules_per_decode_token"):
        assert deltas[metric]["percent"] == pytest.approx(-50)
        assert deltas[metric]["verdict"] == "lower"
    assert deltas["decode_tokens_per_second"]["percent"] == pytest.approx(100)
    assert deltas["decode_tokens_per_second"]["verdict"] == "higher"
    assert cell(result)["deltas"] == {}


@pytest.mark.slow
def test_a_drift_of_the_machine_hits_all_models_alike(run):
    """Each repeat is slower than the one before; the difference stays what it is."""
    loaded = []

    def slow_down(model, arguments):
        loaded.append(model.config.intermediate_size)
        model.slowness *= 2 ** ((len(loaded) - 1) // 2)

    found = run(repeats=3, edit=slow_down)
    assert loaded == [88, 44, 44, 88, 88, 44]
    assert cell(found)["seconds_per_output_token"]["sd"] > 0.5 * STEP
    slower = cell(found, SMALL)["deltas"]["seconds_per_output_token"]
    for end in ("percent", "low", "high"):
        assert slower[end] == pytest.approx(-50)


@pytest.mark.slow
def test_a_model_that_stops_early_is_shorter_and_not_faster(run):
    """The natural length differs, the time per token does not: the study's "penalty"."""

    def edit(model, arguments):
        model.slowness = 1
        head, ends = model.lm_head.forward, "ratio" not in arguments

        def forward(hidden):
            logits = head(hidden)
            logits[..., END] = logits.amax() + 1 if ends else -torch.inf
            return logits

        model.lm_head.forward = forward

    found = run(edit=edit)
    natural, pruned = (cell(found, name, "natural") for name in ("baseline", SMALL))
    assert natural["mean_output_tokens"] == 1
    assert natural["seconds_per_output_token"] is None
    assert natural["decode_tokens_per_second"] is None
    assert natural["joules_per_decode_token"] is None
    assert pruned["deltas"]["seconds_end_to_end"]["verdict"] == "higher"
    assert pruned["deltas"]["mean_output_tokens"]["percent"] == pytest.approx(400)
    fixed = cell(found, SMALL)
    assert cell(found)["mean_output_tokens"] == fixed["mean_output_tokens"] == 5
    assert fixed["deltas"]["seconds_end_to_end"]["verdict"] == "no difference seen"


def test_padding_is_no_work_and_changes_no_text(run, tiny_llama):
    rates = means(cell(run(batch_sizes=(4,)), size=4))
    assert rates["prefill_tokens_per_second"] == pytest.approx(LETTERS / PREFILL)
    assert rates["decode_tokens_per_second"] == pytest.approx(4 / STEP)
    model = load_pruned(str(tiny_llama))
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    sizes = {"ratios": ("1.375",), "batch_sizes": (1, 4)}
    request = measure.ProfileRequest(str(tiny_llama), **sizes)
    batches, _ = batches_of(request, PROMPTS)
    (batch,) = batches[4]
    together = model.generate(**batch, **how)
    for row, (prompt, alone) in enumerate(zip(PROMPTS, batches[1], strict=True)):
        expected = model.generate(**alone, **how)[0, len(prompt) :]
        assert torch.equal(together[row, 6:], expected)


@pytest.mark.slow
def test_an_interrupt_comes_after_a_result_for_each_finished_repeat(run):
    repeats: list = []
    run(repeats=3, seen=repeats)
    assert [found["interrupted"] for _, found in repeats] == [True, True, False]
    finished: list = []
    with pytest.raises(KeyboardInterrupt):
        run(repeats=4, seen=finished, interrupt_at=repeats[1][0] + 1)
    assert [cell(found, SMALL)["repeats"] for _, found in finished] == [1, 2]
    assert cell(found := finished[1][1])["repeats"] == 2
    assert cell(found, SMALL)["deltas"]["seconds_end_to_end"]["low"] is not None


@pytest.mark.slow
def test_without_a_total_there_are_times_and_no_energy_per_token(run):
    # The meter knows a GPU, and its counter stays at 0.
    found = run(meter={"watts": {"cpu": 10.0, "gpu": 0.0}})
    assert means(cell(found))["seconds_to_first_token"] == pytest.approx(PREFILL)
    assert cell(found)["joules_per_output_token"] is None
    assert any("no total" in each for each in found["energy"]["notes"])
    assert "n/m" in report.as_markdown(found)


def test_a_model_on_a_gpu_requires_its_energy(run, monkeypatch):
    required = []

    def start(monitor):
        required.append(set(monitor.required))
        raise KeyboardInterrupt

    monkeypatch.setattr(EnergyMonitor, "start", start)
    for device in ("cpu", "meta"):
        with pytest.raises(KeyboardInterrupt):
            run(device=device)
    assert required == [set(), {"gpu"}]


def widths_file(folder, widths):
    folder.mkdir()
    file = folder / "widths.json"
    file.write_text(json.dumps(widths))
    return str(file)


def test_equal_widths_are_measured_once_and_files_are_told_apart(tiny_llama, tmp_path):
    widths = {"a": [50, 40, 42], "b": [42, 40, 50], "c": [44, 44, 44]}
    first, second, alike = (widths_file(tmp_path / k, v) for k, v in widths.items())
    files = (first, second, alike, first)
    sizes = {"ratios": ("2.75", "1.375"), "widths": files, "multiple_of": (1, 40)}
    models = plan_models(measure.ProfileRequest(str(tiny_llama), **sizes))
    assert [(m["name"], m["intermediate_size"], m["layer_widths"]) for m in models] == [
        ("baseline", 88, ""),
        ("ratio=2.75 multiple_of=40", 80, ""),
        (SMALL, 44, ""),
        (f"{SMALL} multiple_of=40", 40, ""),
        (f"widths={first}", 44, "0:50,1:40,2:42"),
        (f"widths={second}", 44, "0:42,1:40,2:50"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "one\n\ntwo\n", ["one", "two"]),
        ("p.jsonl", '{"prompt": "one"}\n\n{"prompt": "t\\nwo"}\n', ["one", "t\nwo"]),
        ("p.txt", "\n \n", None),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', None),
    ],
)
def test_prompts_come_from_text_and_from_json_lines(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content)
    if expected is None:
        with pytest.raises(ValueError, match=f"{name} does not hold prompts"):
            read_prompts(path)
    else:
        assert read_prompts(path) == expected


positive = st.floats(1e-3, 1e3)


@given(st.lists(st.tuples(positive, positive), min_size=2, max_size=8), positive)
def test_changes_are_ratios_and_verdicts_are_what_the_interval_says(pairs, factor):
    found = change(*zip(*pairs, strict=True))
    assert found["low"] <= found["percent"] + 1e-9
    assert found["percent"] - 1e-9 <= found["high"]
    inside = found["low"] <= 0 <= found["high"]
    assert inside == (found["verdict"] == "no difference seen")
    values = [value for value, _ in pairs]
    found = change([factor * value for value in values], values)
    assert found["percent"] == pytest.approx(100 * (factor - 1), abs=1e-6, rel=1e-6)


def test_the_interval_is_students():
    found = estimate([1.0, 2.0, 3.0, 4.0])
    half = 3.182446305284264 * math.sqrt(5 / 3) / 2
    assert found == pytest.approx(
        {"n": 4, "mean": 2.5, "low": 2.5 - half, "high": 2.5 + half}
    )
    assert estimate([3.0])["low"] is distribution([3.0])["sd"] is None
    spread = distribution([*range(101)])
    assert [spread[name] for name in ("p50", "p90", "p99")] == [50, 90, 99]
    assert change([3.0], [2.0])["verdict"] == "one repeat, no interval"
    assert change([3.0, 0.0], [2.0, 1.0]) is None
