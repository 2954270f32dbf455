"""Curves of cuts that repair follows, and the widths that an allocation makes of them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lm_eval_pruned import cli, load_pruned, prune_model
from lm_eval_pruned.checkpoints.sensitivity import measure_sensitivity
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.measuring import LENGTH, LoadedModel, text_loss
from tests.helpers.checkpoints import byte_tokenizer, save_tiny
from tests.helpers.layouts import breadth, save_family
from tests.helpers.ways_to_load import request_of, write_texts


REPAIR = "least_squares"
WORDS = [
    "One two three four five six seven eight nine ten. " * 4,
    "A model is cut, and what is left of it is asked again. " * 4,
]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_texts(tmp_path / "text.jsonl", WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a model that knows the text; in layer 1, eight neurons could make up all others."""
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    mlp = model.model.layers[1].mlp
    generator = torch.Generator().manual_seed(0)
    gates, ups, mixing = (
        torch.randn(*shape, generator=generator)
        for shape in ((4, 32), (4, 2, 32), (88, 2))
    )
    of = torch.arange(88) % 4
    for part, rows in (
        (mlp.gate_proj, gates[of]),
        (mlp.up_proj, torch.einsum("nk,nkh->nh", mixing, ups[of])),
    ):
        part.weight.requires_grad_(False).copy_(0.3 * rows)
    ids = [torch.tensor([each]) for each in byte_tokenizer()(WORDS)["input_ids"]]
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        sum(model(each, labels=each).loss for each in ids).backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def curves(folder, text, repair=REPAIR, criteria=("maw",), **asked):
    return measure_sensitivity(
        request_of(folder), text, repair=repair, criteria=criteria, **asked
    )


def test_what_neurons_make_up_for_each_other_costs_nothing_after_repair(folder, text):
    percents = {"prune_percents": (25, 50, 75)}
    plain = curves(folder, text, "none", **percents)
    asked = {"criteria": ("maw", "obs"), **percents}
    repaired = curves(folder, text, **asked)
    assert (plain.repair, repaired.repair) == ("none", REPAIR)
    assert plain.loss == pytest.approx(repaired.loss)
    for curve in repaired.curves:
        rises = repaired.rises(curve)
        unrepaired = plain.rises(plain.curve(curve.layer, "maw"))
        if curve.layer == 1:
            assert max(rises) < 0.02 * max(unrepaired)
        else:
            # Narrower is worse.
            assert [*rises] == sorted({*rises}, reverse=True) and len(rises) == 3
    assert curves(folder, text, "none", **percents) == plain


@torch.no_grad()
def loss_of(model) -> float:
    model.eval()
    ids = byte_tokenizer()(WORDS)["input_ids"]
    tokens = [torch.tensor([each[:LENGTH]]) for each in ids]
    return sum(text_loss(model, each) for each in tokens) / sum(
        each.numel() - 1 for each in tokens
    )


@pytest.mark.parametrize("family", breadth(("llama", "qwen2_moe", "gpt_oss"), "llama"))
def test_half_a_layer_has_the_loss_of_the_model_that_is_repaired_there(
    family, text, tmp_path
):
    save_family(tmp_path / "model", family, 40)
    folder = str(tmp_path / "model")
    found = curves(folder, text, prune_percents=(50,))
    for curve in found.curves:
        asked = {"layers": curve.layer, "repair": REPAIR, "calibration": text}
        model = load_pruned(folder, prune_percent=50, **asked)
        expected = max(loss_of(model), found.loss)
        assert curve.losses == pytest.approx((expected,), rel=1e-5)


def test_an_allocation_takes_from_what_repair_makes_up_for(folder, text, monkeypatch):
    asked = {"prune_percent": 40, "recipe": "best", "calibration": text}
    asked["allocation"] = "sensitivity"
    model = load_pruned(str(folder), **asked)
    record = model.prune_record.as_dict()
    widths = record["layer_widths"]
    assert widths["1"] < min(widths["0"], widths["2"]) and sum(widths.values()) == 159
    assert record["measured_on"]["repair"] == record["repair"] == REPAIR
    assert record["mlps_repaired"] == sum(each < 88 for each in widths.values())
    # Those without repair are neither these curves nor these widths.
    act = {"criterion": "act", "repair": "none", **asked}
    other = load_pruned(str(folder), **act).prune_record
    assert "repair" not in other.as_dict()["measured_on"]
    assert other.digest != model.prune_record.digest
    whole = AutoModelForCausalLM.from_pretrained(folder)
    in_memory = prune_model(whole, tokenizer=byte_tokenizer(), **asked)
    assert in_memory.prune_record.digest == model.prune_record.digest
    # The command measured the same curves.
    monkeypatch.setattr(LoadedModel, "losses", None)
    shares = {"criteria": ("obs",), "prune_percents": (25, 50, 75, 87.5)}
    assert len(curves(folder, text, **shares).curves) == 3


def test_the_command_says_that_layers_are_repaired(folder, text, capsys):
    command = ["sensitivity", "--model_args", f"pretrained={folder}"]
    command += ["--calibration", text, "--criteria", "obs", "--prune_percents", "50"]
    assert cli.main([*command, "--repair", REPAIR]) == 0
    assert "(repair=least_squares)" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert "add repair=least_squares" in capsys.readouterr().err
    assert cli.main([*command, "--repair", "bias"]) == 2
    assert "repair=bias has no curves" in capsys.readouterr().err


def test_models_whose_repaired_cuts_cannot_be_measured(tmp_path, text):
    save_family(tmp_path / "t5", "t5", 40)
    request = request_of(tmp_path / "t5", AutoModelForSeq2SeqLM)
    with pytest.raises(UnsupportedModelError, match="encoder"):
        measure_sensitivity(request, text, repair=REPAIR, criteria=("maw",))
