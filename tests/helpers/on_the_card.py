"""Loading, pruning and calibrating for a device that is not the CPU; `test_processes` runs it.

The device stays registered for the rest of a process, so these tests have their own:
``python -m pytest tests/helpers/on_the_card.py``.
"""

from __future__ import annotations

import pytest
import torch

from lm_eval_pruned import cli, load_pruned, prune_model
from lm_eval_pruned.checkpoints.load import load_request
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.pruning.curves import read_sensitivity
from lm_eval_pruned.pruning.repair import Moments
from tests.helpers import simulated_card
from tests.helpers.checkpoints import auto_class, byte_tokenizer, tiny_config
from tests.helpers.layouts import EAGER, FAMILIES, logits, save_family
from tests.helpers.ways_to_load import request_of, write_texts


#: One of each way to store gate, up and down.
LAYOUTS = ("llama", "phi3", "mixtral", "granitemoeshared", "gpt_oss", "llama4_text")


def assert_same_on_the_card(model, expected, **close):
    names = dict(expected.named_parameters())
    assert {p.device.type for p in model.parameters()} == {"card"}
    assert {b.device.type for b in model.buffers()} <= {"card"}
    for name, parameter in model.named_parameters():
        close = close or {"rtol": 0, "atol": 0}
        torch.testing.assert_close(parameter.cpu(), names[name], **close)
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
@pytest.mark.parametrize("route", ["load", "prune"])
def test_text_runs_where_the_model_is(asked, route, tiny_llama, tmp_path, monkeypatch):
    text = write_texts(tmp_path / "text.jsonl", ("one two three " * 20, "four"))
    arguments = {"ratio": 1, "criterion": asked, "calibration": text}
    close, ran, observed = {}, [], Moments.add
    if asked == "repair":
        del arguments["criterion"]
        arguments["recipe"], close = "best", {"rtol": 1e-3, "atol": 1e-4}
        arguments["allocation"] = "sensitivity"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    expected = load_pruned(str(tiny_llama), **arguments)
    noted = lambda self, x: (ran.append(x.device.type), observed(self, x))
    monkeypatch.setattr(Moments, "add", noted)
    # Curves of the CPU are kept, and not measured again.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    if route == "load":
        model = load_pruned(str(tiny_llama), device="card", **arguments)
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


@pytest.mark.parametrize("repair", ["none", "least_squares"])
def test_curves_are_measured_on_the_card(
    repair, tiny_llama, tmp_path, monkeypatch, capsys
):
    text = write_texts(tmp_path / "text.jsonl")
    command = ["sensitivity", "--model_args", f"pretrained={tiny_llama}"]
    command += ["--calibration", text, "--criteria", "act", "--repair", repair]
    found = []
    for device in ("cpu", "card"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / device))
        folder = str(tmp_path / f"of {device}")
        assert cli.main([*command, "--device", device, "--output_path", folder]) == 0
        assert f"The curves were measured on {device}" in capsys.readouterr().err
        found.append(read_sensitivity(f"{folder}/sensitivity.json"))
    assert [each.device for each in found] == ["cpu", "card:0"]
    for one, other in zip(*(each.curves for each in found), strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)


def test_what_looks_at_the_unpruned_model_finds_it_on_the_card(tiny_llama):
    request = request_of(
        tiny_llama, prune_percent=40, arguments={"device_map": {"": "card"}}
    )
    seen = []
    load_request(request, look=lambda loaded: seen.append(loaded.model.device.type))
    assert seen == ["card"]


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


def test_a_model_that_does_not_fit_on_the_card_stays_and_says_so(
    tiny_llama, tmp_path, monkeypatch, caplog
):
    def full(_):
        raise torch.OutOfMemoryError

    text = write_texts(tmp_path / "text.jsonl")
    asked = {"ratio": 1, "criterion": "act", "calibration": text}
    expected, request = load_pruned(str(tiny_llama), **asked), LoadRequest.placed
    put = simulated_card._put

    def with_room(*given):
        # What is pruned fits.
        monkeypatch.setattr(simulated_card, "_put", put)
        return request(*given)

    monkeypatch.setattr(LoadRequest, "placed", with_room)
    monkeypatch.setattr(LoadRequest, "device", lambda _: torch.device("card", 0))
    monkeypatch.setattr(simulated_card, "_put", full)
    model = load_pruned(str(tiny_llama), device="card", **asked)
    assert_same_on_the_card(model, expected)
    assert "does not fit on card:0, so its text runs on cpu" in caplog.text
    assert "device" not in model.prune_record.as_dict()["calibration"]
