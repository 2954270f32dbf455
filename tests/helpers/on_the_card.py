"""Loading, pruning and calibrating for a device that is not the CPU; `test_processes` runs it.

The device stays registered for the rest of a process, so these tests have their own:
``python -m pytest tests/helpers/on_the_card.py``.
"""

from __future__ import annotations

import pytest
import torch

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.repair import Moments
from tests.helpers import simulated_card  # noqa: F401 - registers the device
from tests.helpers.checkpoints import auto_class, byte_tokenizer, tiny_config
from tests.helpers.layouts import EAGER, FAMILIES, logits, save_family
from tests.helpers.ways_to_load import write_texts


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
    expected = load_pruned(str(tiny_llama), **arguments)
    noted = lambda self, x: (ran.append(x.device.type), observed(self, x))
    monkeypatch.setattr(Moments, "add", noted)
    if route == "load":
        model = load_pruned(str(tiny_llama), device="card", **arguments)
    else:
        model = load_pruned(str(tiny_llama), device="card")
        prune_model(model, tokenizer=byte_tokenizer(), **arguments)
    assert {*ran} == ({"card"} if asked == "repair" else set())
    assert_same_on_the_card(model, expected, **close)
