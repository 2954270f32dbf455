"""Open plans: the width and the criterion of each layer, out of scores or losses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints import load
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.checkpoints.planning import as_table, plan_rows
from lm_eval_pruned.pruning.arguments import PruneArguments, without_idle
from tests.helpers.checkpoints import byte_tokenizer


TEXTS = ("the quick brown fox jumps over the lazy dog", "a text of its own")


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(file)


def widths_of(model) -> list[int]:
    return [layer.mlp.gate_proj.out_features for layer in model.model.layers]


@pytest.mark.parametrize("arguments", [{}, {"multiple_of": 8}, {"min_width": 60}])
def test_global_keeps_the_highest_standard_scores_of_all_layers(tiny_llama, arguments):
    loaded = load_pruned(str(tiny_llama), ratio=2, allocation="global", **arguments)
    widths = widths_of(loaded)
    assert sum(widths) == 64 * len(widths)
    assert dict(loaded.prune_record.plan.layer_widths) == dict(enumerate(widths))
    if not arguments:
        whole = load_pruned(str(tiny_llama))
        standard = []
        for layer in whole.model.layers:
            gate, up = (
                w.weight.detach().float().numpy()
                for w in (layer.mlp.gate_proj, layer.mlp.up_proj)
            )
            maw = sum(w.max(1) + abs(w.min(1)) for w in (gate, up)).astype(np.float64)
            standard.append((maw - maw.mean()) / maw.std())
        threshold = np.sort(np.concatenate(standard))[-64 * len(widths)]
        assert [int((each >= threshold).sum()) for each in standard] == widths


def test_pruning_in_memory_and_while_loading_keep_the_same(tiny_llama, tmp_path):
    asked = {"prune_percent": 30, "allocation": "global", "criterion": "l2"}
    loaded = load_pruned(str(tiny_llama), **asked).prune_record
    assert prune_model(load_pruned(str(tiny_llama)), **asked).prune_record.digest == (
        loaded.digest
    )
    exported = export_pruned(
        str(tiny_llama), tmp_path / "out", prune_arguments=asked
    ).record
    assert (exported.digest, exported.plan) == (loaded.digest, loaded.plan)
    assert loaded.as_dict()["allocation"] == "global"


@pytest.mark.parametrize("criterion", ["maw", "act"])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_layers_that_a_uniform_cut_leaves_alone_are_weighed_too(
    tiny_llama, tmp_path, text, criterion, multiple_of
):
    folder = tmp_path / "differing"
    load_pruned(str(tiny_llama), widths={1: 43}).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    asked = {"intermediate_size": 64, "criterion": criterion}
    if criterion == "act":
        asked["calibration"] = text
    asked["multiple_of"] = multiple_of
    uniform = widths_of(load_pruned(str(folder), **asked))
    assert uniform == [64, 43, 64]
    loaded = load_pruned(str(folder), allocation="global", **asked)
    # With multiples of 8 alone, no widths add up to 171.
    assert sum(widths_of(loaded)) == (168 if multiple_of == 8 else 171)
    in_memory = prune_model(
        load_pruned(str(folder)),
        tokenizer=byte_tokenizer(),
        allocation="global",
        **asked,
    )
    assert in_memory.prune_record.digest == loaded.prune_record.digest


def test_losses_decide_where_neurons_go(tiny_llama, text):
    asked = {"prune_percent": 40, "calibration": text}
    model = load_pruned(str(tiny_llama), allocation="sensitivity", **asked)
    record = model.prune_record
    uniform = load_pruned(str(tiny_llama), prune_percent=40).prune_record
    assert sum(widths_of(model)) == sum(len(kept) for kept in uniform.kept)
    assert record.parameters_after == uniform.parameters_after
    found = record.as_dict()
    assert found["measured_on"]["file"] == "texts.jsonl"
    assert len(found["measured_on"]["sha256"]) == 64
    assert found["allocation"] == "sensitivity"
    assert "calibration" not in found


def test_in_memory_and_from_the_checkpoint_the_same_is_found(tiny_llama, text):
    asked = {"prune_percent": 40, "calibration": text, "allocation": "sensitivity"}
    for more in ({}, {"criterion": "best", "criteria_tried": "act,random"}):
        loaded = load_pruned(str(tiny_llama), **asked, **more).prune_record
        whole = load_pruned(str(tiny_llama))
        pruned = prune_model(whole, tokenizer=byte_tokenizer(), **asked, **more)
        assert pruned.prune_record.plan == loaded.plan
        assert pruned.prune_record.digest == loaded.digest
        assert pruned.prune_record.as_dict() == loaded.as_dict()


def test_the_best_criterion_of_each_layer_is_recorded_and_used(tiny_llama, text):
    asked = {"prune_percent": 40, "calibration": text}
    model = load_pruned(
        str(tiny_llama), criterion="best", criteria_tried="maw+act+random", **asked
    )
    record = model.prune_record.as_dict()
    assert record["criteria_tried"] == ["maw", "act", "random"]
    assert len(set(widths_of(model))) == 1
    for layer, name in record["layer_criteria"].items():
        given = {"calibration": text} if name == "act" else {}
        alone = load_pruned(str(tiny_llama), prune_percent=40, criterion=name, **given)
        same = alone.prune_record.kept[int(layer)]
        assert torch.equal(model.prune_record.kept[int(layer)], same)


def test_several_sizes_are_measured_once(tiny_llama, text, monkeypatch):
    calls = []
    measure = load.cached_losses
    monkeypatch.setattr(
        load,
        "cached_losses",
        lambda *given, **named: calls.append(1) or measure(*given, **named),
    )
    rows = plan_rows(
        str(tiny_llama),
        "prune_percent",
        [10, 50],
        allocation="sensitivity",
        criterion="best",
        calibration=text,
    )
    assert calls == [1, 1], "once by each criterion"
    assert all(row.layer_widths and row.layer_criteria for row in rows)
    uniform = plan_rows(str(tiny_llama), "prune_percent", [10, 50])
    assert [r.parameters for r in rows] == [r.parameters for r in uniform]
    assert "|widths by layer|criteria by layer|" in as_table(rows)


def test_layers_that_are_left_alone_take_no_part(tiny_llama):
    record = load_pruned(
        str(tiny_llama), ratio=2, allocation="global", skip_layers=0
    ).prune_record
    others = dict(record.plan.layer_widths)
    assert 0 not in others
    assert sum(others.values()) == 64 * len(others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allocation": "fair"}, "allocation=fair is unknown: pass one of uniform, "),
        ({"allocation": "sensitivity"}, "allocation=sensitivity measures losses, so"),
        ({"criterion": "best"}, "criterion=best measures losses, so it needs text"),
        (
            {"criterion": "best", "allocation": "global", "calibration": "a"},
            "criterion=best and allocation=global were given together",
        ),
        ({"criteria_tried": "maw+act"}, r"criteria_tried=maw\+act names criteria"),
        (
            {"criterion": "best", "criteria_tried": "+", "calibration": "a"},
            r"criteria_tried=\+ names no criterion",
        ),
        ({"min_width": 8}, "min_width=8 bounds what an allocation takes"),
        ({"allocation": "global", "min_width": 0}, "min_width=0 is not a whole"),
    ],
)
def test_what_contradicts_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PruneArguments(ratio=2, **arguments)


def test_an_allocation_needs_a_size_and_no_widths():
    with pytest.raises(ValueError, match=r"^allocation=global shares out the neurons"):
        PruneArguments(allocation="global")
    with pytest.raises(ValueError, match=r"^allocation=global and widths=\S+ were"):
        PruneArguments(allocation="global", widths={0: 5})


def test_bounds_that_leave_too_much_are_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"^min_width=65 keeps .* at most 64"):
        load_pruned(str(tiny_llama), ratio=2, allocation="global", min_width=65)


def test_arguments_that_say_nothing_are_left_out():
    given = {"calibration": "a", "min_width": 8, "criteria_tried": "maw", "ratio": 2}
    assert without_idle(given) == {"ratio": 2}
    full = given | {"criterion": "best", "allocation": "sensitivity"}
    assert without_idle(full) == full
    assert without_idle({"allocation": "global", "dtype": "auto"}) == {"dtype": "auto"}
