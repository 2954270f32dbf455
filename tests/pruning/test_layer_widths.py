"""Widths that differ from layer to layer: the file, the plan, and what is cut."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction

import pytest
import torch

from lm_eval_pruned import PrunePlan, load_pruned, prune_model
from lm_eval_pruned.pruning.argument_values import read_widths
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.criteria import kept_set, score_neurons
from lm_eval_pruned.pruning.measuring import LoadedModel, ScoreTable
from lm_eval_pruned.pruning.slicing import carry_out
from lm_eval_pruned.pruning.widths import widths_in_memory
from tests.helpers import checkpoints, layouts
from tests.helpers.comparing import assert_same_model


KEPT = {0: 20, 2: 7}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"0": 20, "2": 7}'),
        ("a.json", '\ufeff {"2": "7", " 0 ": 20}'),
        ("a.json", "[20, null, 7]"),
        ("a.csv", "layer,width\n0,20\n2,7\n"),
        ("a.csv", "loss, width, layer\r\n0.5, 7, 2\r\n\r\n1, 20, 0\r\n"),
        ("no-suffix", "layer,width\n2,7\n0,20"),
    ],
)
def test_forms_of_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_widths(str(tmp_path / name)) == KEPT
    assert read_widths(tmp_path / name) == KEPT


@pytest.mark.parametrize("given", [KEPT, [20, None, 7], {"0": 20, "2": 7}])
def test_from_python_what_a_file_holds(given):
    assert read_widths(given) == KEPT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it names no layer"),
        ("{}", "it names no layer"),
        ("[null]", "it names no layer"),
        ('{"0": 20', "Expecting"),
        ('{"block_configs": [{}]}', "'block_configs'"),
        ('{"0": 2.5}', "'2.5'"),
        ('{"0": true}', "'True'"),
        ('{"0": {"width": 1}}', "'width': 1"),
        ("layer,size\n0,1\n", "'width'"),
        ("layer,width\n1,\n", "''"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^widths=a\.json cannot .*{message}.*\.$"):
        read_widths(str(tmp_path / "a.json"))


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"^widths=none\.json cannot be read .*pass a"):
        read_widths(str(tmp_path / "none.json"))


def test_a_plan_keeps_the_layers_that_are_not_named():
    plan = PrunePlan.from_arguments(16, 48, available_layers=range(4), widths=KEPT)
    assert plan.layer_widths == ((0, 20), (1, 48), (2, 7), (3, 48))
    assert plan.asked == {"widths": "0:20,2:7"}
    assert (plan.width, plan.mean_width) == (31, Fraction(123, 4))
    assert plan.ratio == 123 / 64
    assert plan.prunes


def test_a_plan_of_the_widths_there_are_is_the_baseline():
    plan = PrunePlan.from_arguments(16, 48, available_layers=[0], widths={0: 48})
    assert plan.layer_widths is None
    assert not plan.prunes


def test_multiples_round_the_layers_that_are_cut():
    asked = {"widths": KEPT, "multiple_of": 5}
    plan = PrunePlan.from_arguments(16, 48, available_layers=range(3), **asked)
    assert plan.layer_widths == ((0, 20), (1, 48), (2, 5))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"widths": {4: 1}},
            "names layer 4, but the GLU-MLPs of this model are in the",
        ),
        ({"widths": {0: 0}}, "gives layer 0 0 neurons, but it has 48: write a width"),
        ({"widths": {0: 49}}, "gives layer 0 49 neurons, but it has 48: write a width"),
        ({"widths": KEPT, "multiple_of": 8}, "multiple_of=8 is larger than .* width 7"),
        ({"widths": KEPT, "layers": 0}, "layers=0 and widths=0:20,2:7 were given"),
        ({"widths": KEPT, "skip_layers": 1}, "skip_layers=1 and widths=0:20,2:7 were"),
        ({"widths": KEPT, "ratio": 1}, "ratio=1 and widths=.* were given together"),
        ({"widths": 3}, "widths=3 cannot be read"),
    ],
)
def test_widths_that_do_not_fit(asked, message):
    with pytest.raises(ValueError, match=message):
        PrunePlan.from_arguments(16, 48, available_layers=range(4), **asked)


@pytest.mark.parametrize("how", ["loading", "in memory"])
def test_every_layer_keeps_its_own_best(tmp_path, how):
    folder = checkpoints.save_tiny(tmp_path, "llama", num_hidden_layers=4)
    full = load_pruned(str(folder))
    asked = {"widths": {0: 20, 2: 7}}
    if how == "loading":
        model = load_pruned(str(folder), **asked)
    else:
        model = prune_model(load_pruned(str(folder)), **asked)
    before = full.config.intermediate_size
    for layer, own in enumerate(full.model.layers):
        gate, up = own.mlp.gate_proj.weight, own.mlp.up_proj.weight
        width = KEPT.get(layer, before)
        kept = kept_set(score_neurons(gate, up, "maw"), width)
        assert torch.equal(model.prune_record.kept[layer], kept)
        narrow = model.model.layers[layer].mlp
        assert torch.equal(narrow.gate_proj.weight, gate[kept])
        assert torch.equal(narrow.down_proj.weight, own.mlp.down_proj.weight[:, kept])
    record = model.prune_record.as_dict()
    assert record["layer_widths"] == {
        str(layer): KEPT.get(layer, before) for layer in range(4)
    }
    assert record["asked"] == {"widths": "0:20,2:7"}
    assert record["parameters_after"] == model.num_parameters()
    assert f"widths by layer 0:20,1:{before},2:7" in model.prune_record.as_table()
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("how", ["loading", "in memory"])
def test_criteria_by_layer(tmp_path, how, monkeypatch):
    folder = checkpoints.save_tiny(tmp_path, "llama", num_hidden_layers=3)
    full = load_pruned(str(folder))
    own = PruneArguments(prune_percent=50)
    criteria = ((0, "l2"), (2, "random"))
    if how == "loading":
        of = PrunePlan.of

        def planned(*given):
            return dataclasses.replace(of(*given), layer_criteria=criteria)

        monkeypatch.setattr(PrunePlan, "of", planned)
        model = load_pruned(str(folder), prune_percent=50)
    else:
        model = load_pruned(str(folder))
        widths, known = widths_in_memory(model), ScoreTable()
        plan = dataclasses.replace(widths.plan(own), layer_criteria=criteria)
        carry_out(LoadedModel(model, None, known, None, None, 0), plan, widths)
    for layer, name in enumerate(["l2", "maw", "random"]):
        mlp = full.model.layers[layer].mlp
        scores = score_neurons(
            mlp.gate_proj.weight, mlp.up_proj.weight, name, layer=layer
        )
        kept = model.prune_record.kept[layer]
        assert torch.equal(kept, kept_set(scores, len(kept)))
    record = model.prune_record.as_dict()
    assert record["layer_criteria"] == {"0": "l2", "2": "random"}
    assert record["seed"] == 0
    assert "criteria by layer 0:l2,2:random" in model.prune_record.as_table()


def test_a_layer_with_experts_has_the_width_of_its_experts(tmp_path):
    """What else is in the layer follows in proportion."""
    model = layouts.save_family(tmp_path, "deepseek_v3", 40)
    widths = widths_in_memory(model)
    layers = widths.layers
    experts = {mlp.block for mlp in widths.mlps if mlp.kind == "expert"}
    assert len(experts) < len(layers)
    asked = {layer: before // 2 for layer, before in layers.items()}
    narrow = load_pruned(str(tmp_path), widths=asked)
    assert_same_model(narrow, prune_model(load_pruned(str(tmp_path)), widths=asked))
    for mlp in widths_in_memory(narrow).mlps:
        before = widths.actual[mlp.name]
        if mlp.block in experts and mlp.kind == "expert":
            assert mlp.width == asked[mlp.block]
        share = Fraction(asked[mlp.block], layers[mlp.block])
        assert mlp.width == -(-before * share // 1)


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "llama4_text", "granitemoeshared", "qwen2_moe"]
)
@pytest.mark.parametrize("size", [{"intermediate_size": 21}, {"ratio": 0.5}])
def test_a_size_narrows_each_mlp_that_is_wider_than_in_a_model_of_that_size(
    tmp_path, family, size
):
    """A target is one of the experts; that of a shared or dense MLP is in proportion."""
    more = {"num_hidden_layers": 4}
    if family == "deepseek_v3":
        more |= {"first_k_dense_replace": 2, "intermediate_size": 75}
    if family == "llama4_text":
        more |= {"moe_layers": [2, 3], "interleave_moe_layer_step": 1}
    folder = tmp_path / "model"
    layouts.save_family(folder, family, 35, **more)
    uniform = widths_in_memory(load_pruned(str(folder), **size)).actual
    asked = {1: 60 if family in ("deepseek_v3", "llama4_text") else 30, 3: 30}
    first = load_pruned(str(folder), widths=asked)
    own = widths_in_memory(first).actual
    first.save_pretrained(tmp_path / "saved")
    again = load_pruned(str(tmp_path / "saved"), **size)
    expected = {name: min(own[name], uniform[name]) for name in own}
    assert widths_in_memory(again).actual == expected
    assert_same_model(again, prune_model(first, **size))
