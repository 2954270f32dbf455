"""Allocations of models with experts: what counts as a neuron, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.allocation import plan_layers
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.curves import LayerCurve, Sensitivity
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from lm_eval_pruned.pruning.slicing import widths_in_memory
from tests.helpers import checkpoints, layouts
from tests.helpers.checkpoints import byte_tokenizer


WIDTH = 40
#: Every layer holds experts, stacked or one by one, some with a shared one.
ALIKE = ("mixtral", "qwen2_moe", "olmoe", "gpt_oss", "granitemoeshared")
#: The first layer holds one MLP, the others experts.
MIXED = ("qwen3_moe", "deepseek_v3", "llama4_text")


class Made:
    """Evidence that hypothesis makes up."""

    def __init__(self, losses, scores):
        self._losses, self._scores = losses, scores

    def scores(self, criterion):
        return self._scores

    def curves(self, criteria):
        widths = tuple(sorted({WIDTH - math.floor(s / 100 * WIDTH) for s in (25, 50)}))
        curves = tuple(
            LayerCurve(layer, WIDTH, name, None, widths, losses)
            for name in criteria
            for layer, losses in enumerate(self._losses)
        )
        return Sensitivity("m", 3.0, curves, "t.jsonl", "0" * 64, 2, 9)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the widths of a model of each family."""

    def widths(family):
        if family not in known:
            config = checkpoints.tiny_config(family, **layouts.overrides(family, WIDTH))
            known[family] = widths_in_memory(checkpoints.tiny_model(config))
        return known[family]

    known: dict = {}
    return widths


@pytest.mark.parametrize("family", ALIKE)
@settings(max_examples=25, deadline=None)
@given(
    allocation=st.sampled_from(["sensitivity", "global"]),
    percent=st.integers(5, 90),
    multiple=st.sampled_from([1, 4]),
    losses=st.lists(
        st.tuples(st.floats(2, 9), st.floats(2, 9)), min_size=2, max_size=2
    ),
    seed=st.integers(0, 99),
)
def test_experts_of_a_layer_share_a_width_and_the_budget_is_exact(
    found, family, allocation, percent, multiple, losses, seed
):
    widths = found(family)
    torch.manual_seed(seed)
    scores = {mlp.name: torch.rand(mlp.width) for mlp in widths.mlps}
    asked = {"prune_percent": percent, "multiple_of": multiple}
    uniform = widths.plan(PruneArguments(**asked))
    text = {"calibration": "t.jsonl"} if allocation == "sensitivity" else {}
    plan = widths.plan(PruneArguments(**asked, allocation=allocation, **text))
    plan = plan_layers(plan, widths, Made(losses, scores))
    kept, targets = dict(plan.layer_widths), widths.targets(plan)
    alike = widths.targets(uniform)
    assert sum(kept.values()) == uniform.width * len(kept)
    for mlp in widths.mlps:
        if mlp.kind == "expert":
            assert targets[mlp.name] == kept[mlp.block]
        else:
            share = mlp.width * kept[mlp.block] / WIDTH
            assert share - multiple < targets[mlp.name] < share + 1
    shared = [mlp.name for mlp in widths.mlps if mlp.kind == "shared"]
    difference = sum(targets[name] - alike[name] for name in shared)
    assert abs(difference) <= multiple * len(shared)


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("allocation", ["sensitivity", "global"])
def test_layers_of_different_kinds_are_refused_before_anything_is_read(
    found, family, allocation
):
    text = {"calibration": "none.jsonl"} if allocation == "sensitivity" else {}
    plan = found(family).plan(
        PruneArguments(prune_percent=30, allocation=allocation, **text)
    )
    message = (
        rf"has 1 dense MLP in layer 0 and 3 experts.* in layer 1, whose neurons "
        rf"allocation={allocation} cannot weigh against each other: name layers"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        plan_layers(plan, found(family), None)


def test_layers_of_one_kind_are_shared_out_when_they_are_named(found):
    config = layouts.overrides("qwen3_moe", WIDTH) | {"num_hidden_layers": 3}
    model = checkpoints.tiny_model(checkpoints.tiny_config("qwen3_moe", **config))
    pruned = prune_model(model, prune_percent=30, allocation="global", layers="1+2")
    own = widths_in_memory(pruned).layers
    assert own[0] == 3 * WIDTH
    assert own[1] + own[2] == 2 * 28


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "a text of its own"}) + "\n")
    return str(file)


def test_each_layer_of_a_mixed_model_gets_its_best_criterion(tmp_path, text):
    folder = tmp_path / "model"
    layouts.save_family(folder, "qwen3_moe", 24)
    asked = {
        "prune_percent": 40,
        "criterion": "best",
        "criteria_tried": "maw+l2+random",
        "calibration": text,
    }
    model = load_pruned(str(folder), **asked, **layouts.EAGER)
    record = model.prune_record
    uniform = load_pruned(str(folder), prune_percent=40, **layouts.EAGER)
    assert {*record.as_dict()["layer_criteria"]} == {"0", "1"}
    assert widths_in_memory(model).actual == widths_in_memory(uniform).actual
    whole = prune_model(
        load_pruned(str(folder), **layouts.EAGER), tokenizer=byte_tokenizer(), **asked
    )
    assert whole.prune_record.digest == record.digest


@pytest.mark.parametrize("more", [{}, {"allocation": "sensitivity"}])
def test_stacked_experts_cannot_be_observed(tmp_path, text, more, monkeypatch):
    folder = tmp_path / "model"
    layouts.save_family(folder, "mixtral", 24)
    (folder / "model.safetensors").unlink()
    asked = {"prune_percent": 40, "criterion": "best", "calibration": text, **more}
    with pytest.raises(
        UnsupportedModelError, match=r"such as criteria_tried=maw\+l2\.$"
    ):
        load_pruned(str(folder), **asked)
