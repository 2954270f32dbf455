"""Open plans: the width and the criterion of each layer, out of scores or losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints import load
from lm_eval_pruned.checkpoints.planning import as_table, plan_rows
from lm_eval_pruned.pruning.allocation import plan_layers
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.curves import LayerCurve, Sensitivity
from lm_eval_pruned.pruning.slicing import widths_in_memory
from tests.helpers import by_hand, checkpoints, layouts
from tests.helpers.checkpoints import byte_tokenizer
from tests.helpers.ways_to_load import Source, assert_one_model, write_texts


WIDTH = 40


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_texts(tmp_path / "texts.jsonl")


def widths_of(model) -> list[int]:
    return [*widths_in_memory(model).layers.values()]


@pytest.mark.parametrize("asked", [{}, {"multiple_of": 8}, {"min_width": 60}])
def test_global_keeps_the_highest_standard_scores_of_all_layers(tiny_llama, asked):
    loaded = load_pruned(str(tiny_llama), ratio=2, allocation="global", **asked)
    widths = widths_of(loaded)
    assert sum(widths) == 64 * len(widths)
    assert dict(loaded.prune_record.plan.layer_widths) == dict(enumerate(widths))
    if not asked:
        standard = []
        for layer in load_pruned(str(tiny_llama)).model.layers:
            rows = (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
            maw = by_hand.FORMULAS["maw"](*(w.detach().double().numpy() for w in rows))
            standard.append((maw - maw.mean()) / maw.std())
        threshold = np.sort(np.concatenate(standard))[-64 * len(widths)]
        assert [int((each >= threshold).sum()) for each in standard] == widths


@pytest.mark.parametrize("criterion", ["maw", "act"])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_layers_that_a_uniform_cut_leaves_alone_are_weighed_too(
    tiny_llama, tmp_path, text, criterion, multiple_of
):
    folder = tmp_path / "differing"
    load_pruned(str(tiny_llama), widths={1: 43}).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    asked = {"intermediate_size": 64, "criterion": criterion}
    asked |= {"calibration": text} if criterion == "act" else {}
    asked["multiple_of"] = multiple_of
    source = Source(folder)
    assert widths_of(source.load(**asked)) == [64, 43, 64]
    asked["allocation"] = "global"
    loaded = source.load(**asked)
    # With multiples of 8 alone, no widths add up to 171.
    assert sum(widths_of(loaded)) == (168 if multiple_of == 8 else 171)
    more = {"tokenizer": byte_tokenizer(), **asked}
    in_memory = prune_model(source.load(), **more)
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
    assert found["allocation"] == "sensitivity" and "calibration" not in found


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_best_criterion_of_each_layer_is_recorded_and_used(family, tmp_path, text):
    layouts.save_family(tmp_path / "source", family, 24)
    source = Source(tmp_path / "source")
    tried = ["maw", "l2", "random"] + ["act"] * (family == "llama")
    more = {"criterion": "best", "criteria_tried": "+".join(tried)}
    asked = {"prune_percent": 40, "calibration": text, **more}
    model = source.load(**asked)
    record, layers = model.prune_record, [*widths_in_memory(model).layers]
    found = record.as_dict()
    assert found["criteria_tried"] == tried
    assert widths_of(model) == widths_of(source.load(prune_percent=40))
    assert found["layer_criteria"].keys() == {str(layer) for layer in layers}
    alone = {}
    for name in tried:
        given = {"calibration": text} if name == "act" else {}
        pruned = source.load(prune_percent=40, criterion=name, **given)
        alone[name] = pruned.prune_record.kept
    for number, mlp in enumerate(widths_in_memory(model).mlps):
        name = found["layer_criteria"][str(mlp.block)]
        assert torch.equal(record.kept[number], alone[name][number])
    state, ways = model.state_dict(), ("in memory", "exported")
    assert_one_model(source, asked, state, tmp_path, ways)


def test_several_sizes_are_measured_once(tiny_llama, text, monkeypatch):
    calls, measure = [], load.cached_losses
    monkeypatch.setattr(
        load,
        "cached_losses",
        lambda *given, **named: calls.append(1) or measure(*given, **named),
    )
    sizes = (str(tiny_llama), "prune_percent", [10, 50])
    asked = {"allocation": "sensitivity", "criterion": "best", "calibration": text}
    rows = plan_rows(*sizes, **asked)
    assert calls == [1, 1], "once by each criterion"
    assert all(row.layer_widths and row.layer_criteria for row in rows)
    uniform = plan_rows(*sizes)
    assert [r.parameters for r in rows] == [r.parameters for r in uniform]
    assert "|widths by layer|criteria by layer|" in as_table(rows)


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
def found():
    """Return the widths of a model of each family."""

    def widths(family):
        if family not in known:
            config = checkpoints.tiny_config(family, **layouts.overrides(family, WIDTH))
            known[family] = widths_in_memory(checkpoints.tiny_model(config))
        return known[family]

    known: dict = {}
    return widths


losses_of_a_layer = st.tuples(st.floats(2, 9), st.floats(2, 9))


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "olmoe", "gpt_oss", "granitemoeshared"]
)
@given(
    allocation=st.sampled_from(["sensitivity", "global"]),
    percent=st.integers(5, 90),
    multiple=st.sampled_from([1, 4]),
    losses=st.lists(losses_of_a_layer, min_size=2, max_size=2),
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
    assert sum(kept.values()) == uniform.width * len(kept)
    for mlp in widths.mlps:
        if mlp.kind == "expert":
            assert targets[mlp.name] == kept[mlp.block]
        else:
            share = mlp.width * kept[mlp.block] / WIDTH
            assert share - multiple < targets[mlp.name] < share + 1
    alike = widths.targets(uniform)
    shared = [mlp.name for mlp in widths.mlps if mlp.kind == "shared"]
    difference = sum(targets[name] - alike[name] for name in shared)
    assert abs(difference) <= multiple * len(shared)


@pytest.mark.parametrize("layers", [{"layers": "1+2"}, {"skip_layers": 0}])
def test_layers_that_are_left_alone_take_no_part(layers):
    """So the first, which is dense, need not be weighed against the experts of the others."""
    config = layouts.overrides("qwen3_moe", WIDTH) | {"num_hidden_layers": 3}
    model = checkpoints.tiny_model(checkpoints.tiny_config("qwen3_moe", **config))
    pruned = prune_model(model, prune_percent=30, allocation="global", **layers)
    first, *others = widths_of(pruned)
    assert (first, sum(others)) == (3 * WIDTH, 2 * 28)
    assert 0 not in dict(pruned.prune_record.plan.layer_widths)
