"""Loading, pruning and calibrating for a device that is not the CPU; `test_processes` runs it.

The device stays registered for the rest of a process, so these tests have their own:
``python -m pytest tests/helpers/on_the_card.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm_eval_pruned import cli, load_pruned, prune_model
from lm_eval_pruned.checkpoints import export
from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning import lending, measuring, repair
from lm_eval_pruned.pruning.moments import Moments
from tests.helpers import simulated_card
from tests.helpers.checkpoints import (
    auto_class,
    byte_tokenizer,
    edit_weights,
    save_tiny,
    tiny_config,
)
from tests.helpers.layouts import EAGER, FAMILIES, logits, save_family
from tests.helpers.ways_to_load import (
    WEIGHTS,
    norms_in_float32,
    request_of,
    write_texts,
)


#: One of each way to store gate, up and down.
LAYOUTS = ("llama", "phi3", "mixtral", "granitemoeshared", "gpt_oss", "llama4_text")


def assert_same_on_the_card(model, expected, **close):
    names = dict(expected.named_parameters())
    assert {p.device.type for p in model.parameters()} == {"card"}
    assert {b.device.type for b in model.buffers()} <= {"card"}
    for name, parameter in model.named_parameters():
        close = close or {"rtol": 0, "atol": 0}
        torch.testing.assert_close(parameter.cpu(), names[name], **close)
    if hasattr(expected, "prune_record"):
        assert model.prune_record.digest == expected.prune_record.digest


@pytest.mark.parametrize(
    ("family", "criterion"),
    [
        *((family, "maw") for family in FAMILIES),
        *(
            (family, criterion)
            for family in LAYOUTS
            for criterion in ("max_abs", "l2", "vow", "random")
        ),
    ],
)
def test_on_load_and_in_memory_the_card_gives_the_same_model(
    family, criterion, tmp_path
):
    save_family(tmp_path, family, 64)
    asked = {"intermediate_size": 48 if criterion == "maw" else 40}
    asked |= {"criterion": criterion, "auto_class": auto_class(tiny_config(family))}
    model = load_pruned(str(tmp_path), device="card", **EAGER, **asked)
    expected = load_pruned(str(tmp_path), **EAGER, **asked)
    assert_same_on_the_card(model, expected)
    if not model.config.is_encoder_decoder:
        tokens = torch.arange(40, 62, device="cpu").view(2, 11).to("card")
        with torch.no_grad():
            found = model(tokens, use_cache=False).logits.cpu()
        assert torch.allclose(found, logits(expected), atol=1e-4)
    # In memory.
    placed = {"device_map": {"": "card"}, **EAGER}
    model = asked.pop("auto_class").from_pretrained(tmp_path, **placed)
    assert_same_on_the_card(prune_model(model, **asked), expected)


@pytest.mark.parametrize("asked", ["maw_act", "act", "repair"])
@pytest.mark.parametrize("route", ["device", "device_map", "prune"])
def test_text_runs_where_the_model_is(asked, route, tiny_llama, tmp_path, monkeypatch):
    text = write_texts(tmp_path / "text.jsonl", ("one two three " * 20, "four"))
    arguments = {"ratio": 1, "criterion": asked, "calibration": text}
    close, ran, observed = {}, [], Moments.add
    if asked == "repair":
        del arguments["criterion"]
        arguments["recipe"], close = "best", {"rtol": 1e-3, "atol": 1e-4}
        arguments["allocation"] = "sensitivity"
    expected = load_pruned(str(tiny_llama), **arguments)
    noted = lambda self, x: (ran.append(x.device.type), observed(self, x))
    monkeypatch.setattr(Moments, "add", noted)
    find = measuring.curvature
    noted_too = lambda model, *more: (ran.append(model.device.type), find(model, *more))
    monkeypatch.setattr(measuring, "curvature", lambda *given: noted_too(*given)[1])
    if route != "prune":
        # What another load measured on the card would be used again.
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        model = load_pruned(str(tiny_llama), **{route: "card"}, **arguments)
    else:
        model = load_pruned(str(tiny_llama), device="card")
        prune_model(model, tokenizer=byte_tokenizer(), **arguments)
    assert {*ran} == ({"card"} if asked == "repair" else set())
    assert_same_on_the_card(model, expected, **close)
    told = model.prune_record.as_dict()
    texts = [told[name] for name in ("calibration", "measured_on") if name in told]
    assert len(texts) == (2 if asked == "repair" else 1)
    assert {each["device"] for each in texts} == {"card:0"}
    assert "calibrated on card:0" in model.prune_record.as_table()
    assert "calibrated on cpu" in expected.prune_record.as_table()


def test_a_card_without_float64_leaves_that_work_to_the_cpu(
    tiny_llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(simulated_card, "without_float64", True)
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(1, dtype=torch.float64, device="card")
    # So that solving in float32 will not do.
    monkeypatch.setattr(repair, "_RESIDUAL", 0)
    lending._has_float64.cache_clear()
    text = write_texts(tmp_path / "text.jsonl", ("one two three " * 20, "four"))
    asked = {"ratio": 1, "recipe": "uneven", "calibration": text}
    try:
        model = load_pruned(str(tiny_llama), device="card", **asked)
    finally:
        lending._has_float64.cache_clear()
    expected = load_pruned(str(tiny_llama), **asked)
    assert_same_on_the_card(model, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("asked", [{"recipe": "best"}, {"criterion": "act"}])
def test_text_on_the_card_leaves_tensors_of_another_dtype_as_they_are_stored(
    asked, tmp_path
):
    """Norms in float32 beside weights in bfloat16, in which the text runs.

    The card rounds activations in another order, so that what is made of them may differ.
    """
    text = write_texts(tmp_path / "text.jsonl", ("one two three " * 20, "four"))
    folder = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    edit_weights(folder, norms_in_float32)
    asked = {"prune_percent": 40, "calibration": text, "dtype": "float32", **asked}
    model = load_pruned(str(folder), device="card", **asked)
    stored, found = load_file(folder / WEIGHTS), dict(model.named_parameters())
    outside = {name for name in stored if ".mlp." not in name}
    assert sum(stored[name].dtype == torch.float32 for name in outside) == 7
    for name in outside:
        assert torch.equal(found[name].cpu(), stored[name].float()), name


@pytest.mark.parametrize("repair", ["none", "least_squares"])
def test_curves_are_measured_on_the_card(repair, tiny_llama, tmp_path, capsys):
    text = write_texts(tmp_path / "text.jsonl")
    command = ["sensitivity", "--model_args", f"pretrained={tiny_llama}"]
    command += ["--calibration", text, "--criterion", "act", "--repair", repair]
    found = []
    for device in ("cpu", "card"):
        folder = str(tmp_path / f"of {device}")
        assert cli.main([*command, "--device", device, "--output_path", folder]) == 0
        assert f"The curves were measured on {device}" in capsys.readouterr().err
        found.append(json.loads(Path(folder, "sensitivity.json").read_text()))
    assert [each["device"] for each in found] == ["cpu", "card:0"]
    for one, other in zip(*(each["curves"] for each in found), strict=True):
        assert one["rises"] == pytest.approx(other["rises"], rel=1e-3)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_prune_measures_and_calibrates_on_the_card_and_saves_from_the_cpu(
    dtype, tiny_llama, tmp_path, monkeypatch, capsys
):
    measured, ran, saved = [], [], []
    # What an earlier test observed would be read from there.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def noted(where, function, device):
        def with_note(*arguments, **named):
            where.append(device(*arguments).type)
            return function(*arguments, **named)

        return with_note

    of_model = lambda model, *_: model.device
    for where, name, function in (
        (measured, "quality_of", export.quality_of),
        (measured, "probed", lambda *_: None),
        (saved, "save_loaded", export.save_loaded),
    ):
        monkeypatch.setattr(export, name, noted(where, function, of_model))
    observes = noted(ran, Moments.add, lambda _, x: x.device)
    monkeypatch.setattr(Moments, "add", observes)
    text = write_texts(tmp_path / "text.jsonl", ("one two three " * 20, "four"))
    command = ["prune", "--prune_percent", "40", "--check", "--calibration", text]
    command += ["--recipe", "best", "--device", "card"]
    command += ["--output_path", str(tmp_path / "out"), "--model_args"]
    wanted = {"dtype": dtype} if dtype else {}
    pairs = [f"{n}={v}" for n, v in {"pretrained": tiny_llama, **wanted}.items()]
    assert cli.main([*command, *pairs]) == 0
    assert measured == ["card"] * 6
    assert {*ran} == {"card"}
    assert saved == ["cpu"]
    assert "calibrated on card:0" in capsys.readouterr().out
    asked = {"prune_percent": 40, "recipe": "best", "calibration": text}
    expected = load_pruned(str(tiny_llama), device="card", **wanted, **asked)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.dtype == (torch.bfloat16 if dtype else torch.float32)
    assert_same_on_the_card(expected, written)


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({"device_map": "card"}, "card"),
        ({"device_map": {"model": "card", "lm_head": "cpu"}}, "card"),
        ({"device_map": {"": 0}}, "card"),
        ({"device_map": "auto"}, "card"),
        ({"tp_plan": "auto"}, "card"),
        ({"device_map": {"model": "disk"}}, "cpu"),
        ({}, "cpu"),
    ],
)
def test_text_runs_on_the_first_device_that_is_named(asked, kind, tiny_llama):
    assert request_of(tiny_llama, arguments=asked).device().type == kind


@pytest.mark.parametrize(
    "placed",
    [
        {"parallelize": True},
        {"parallelize": True, "device_map": {"model": "card", "lm_head": "cpu"}},
        {"tp_plan": "auto"},
        {},
        {"device_map": "auto"},
    ],
)
@pytest.mark.parametrize("chosen", [{"recipe": "best"}, {"criterion": "act"}])
def test_lm_eval_calibrates_on_the_card_wherever_the_model_is_to_go(
    placed, chosen, tiny_llama, tmp_path, monkeypatch
):
    class Placed(Exception):
        pass

    def stop(_, model):
        raise Placed(model.prune_record.as_table())

    monkeypatch.setattr(Checkpoint, "place", stop)
    # The harness knows this card by no name.
    monkeypatch.setattr(PrunedHFLM, "device", torch.device("card", 0))
    text = write_texts(tmp_path / "text.jsonl", ("one two three " * 20, "four"))
    cut = {"prune_percent": 40, "calibration": text, **chosen}
    with pytest.raises(Placed, match="calibrated on card:0"):
        PrunedHFLM(str(tiny_llama), **placed, **cut)


def test_a_model_that_does_not_fit_on_the_card_stays_and_says_so(
    tiny_llama, tmp_path, monkeypatch, caplog
):
    def full(_):
        raise torch.OutOfMemoryError

    # What another test measured on the card would be used again.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = write_texts(tmp_path / "text.jsonl")
    asked = {"ratio": 1, "criterion": "act", "calibration": text}
    expected, request = load_pruned(str(tiny_llama), **asked), Checkpoint.place
    put = simulated_card._put

    def with_room(*given):
        # What is pruned fits.
        monkeypatch.setattr(simulated_card, "_put", put)
        return request(*given)

    monkeypatch.setattr(Checkpoint, "place", with_room)
    monkeypatch.setattr(Checkpoint, "device", lambda _: torch.device("card", 0))
    monkeypatch.setattr(simulated_card, "_put", full)
    model = load_pruned(str(tiny_llama), device="card", **asked)
    assert_same_on_the_card(model, expected)
    assert "does not fit on card:0, so its text runs on cpu" in caplog.text
    assert "device" not in model.prune_record.as_dict()["calibration"]
