"""Open plans: the width and the criterion of each layer, out of scores or losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.allocation import plan_layers
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.curves import LayerCurve, Sensitivity
from lm_eval_pruned.pruning.slicing import widths_in_memory
from tests.helpers import by_hand, checkpoints, layouts
from tests.helpers.checkpoints import byte_tokenizer
from tests.helpers.ways_to_load import Source, write_texts


WIDTH = 40


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return {"calibration": write_texts(tmp_path / "texts.jsonl")}


def widths_of(model) -> list[int]:
    return [*widths_in_memory(model).layers.values()]


def test_global_keeps_the_highest_standard_scores_of_all_layers(tiny_llama):
    loaded = load_pruned(str(tiny_llama), ratio=2, allocation="global")
    widths = widths_of(loaded)
    assert sum(widths) == 64 * len(widths)
    assert dict(loaded.prune_record.plan.layer_widths) == dict(enumerate(widths))
    standard = []
    for layer in load_pruned(str(tiny_llama)).model.layers:
        rows = (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
        maw = by_hand.FORMULAS["maw"](*(w.detach().double().numpy() for w in rows))
        standard.append((maw - maw.mean()) / maw.std())
    threshold = np.sort(np.concatenate(standard))[-64 * len(widths)]
    assert [int((each >= threshold).sum()) for each in standard] == widths


@pytest.mark.parametrize(("criterion", "multiple_of"), [("maw", 1), ("act", 8)])
def test_layers_that_a_uniform_cut_leaves_alone_are_weighed_too(
    tiny_llama, tmp_path, text, criterion, multiple_of
):
    load_pruned(str(tiny_llama), widths={1: 43}).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    asked = {"intermediate_size": 64, "criterion": criterion}
    asked |= {"multiple_of": multiple_of} | (text if criterion == "act" else {})
    source = Source(tmp_path)
    assert widths_of(source.load(**asked)) == [64, 43, 64]
    asked["allocation"] = "global"
    loaded = source.load(**asked)
    # With multiples of 8 alone, no widths add up to 171.
    assert sum(widths_of(loaded)) == (168 if multiple_of == 8 else 171)
    in_memory = prune_model(source.load(), tokenizer=byte_tokenizer(), **asked)
    assert in_memory.prune_record.digest == loaded.prune_record.digest


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_best_criterion_of_each_layer_is_recorded_and_used(family, tmp_path, text):
    layouts.save_family(tmp_path / "source", family, 24)
    source = Source(tmp_path / "source")
    tried = ["maw", "l2", "random"] + ["act"] * (family == "llama")
    asked = {"criterion": "best", "criteria_tried": "+".join(tried), **text}
    model = source.load(prune_percent=40, **asked)
    widths, found = widths_in_memory(model), model.prune_record.as_dict()
    assert found["criteria_tried"] == tried
    assert found["measured_on"]["file"] == "texts.jsonl"
    assert found["layer_criteria"].keys() == {*map(str, widths.layers)}
    alone = {}
    for name in tried:
        given = text if name == "act" else {}
        pruned = source.load(prune_percent=40, criterion=name, **given)
        alone[name] = pruned.prune_record.kept
    for number, mlp in enumerate(widths.mlps):
        name = found["layer_criteria"][str(mlp.block)]
        assert torch.equal(model.prune_record.kept[number], alone[name][number])


class MadeUp:
    """Scores of neurons and losses of cut layers that hypothesis makes up."""

    def __init__(self, losses, scores):
        self._losses, self._scores = losses, scores

    def scores(self, criterion):
        return self._scores

    def curves(self, criteria, repair="none"):
        widths = tuple(sorted({WIDTH - math.floor(s / 100 * WIDTH) for s in (25, 50)}))
        curves = tuple(
            LayerCurve(layer, WIDTH, name, None, widths, losses)
            for name in criteria
            for layer, losses in enumerate(self._losses)
        )
        return Sensitivity("m", 3.0, curves, "t.jsonl", "0" * 64, 2, 9)


FAMILIES = ("mixtral", "qwen2_moe", "olmoe", "gpt_oss", "granitemoeshared")
losses_of_a_layer = st.tuples(st.floats(2, 9), st.floats(2, 9))


@pytest.fixture(scope="module", params=FAMILIES)
def widths(request):
    sizes = layouts.overrides(request.param, WIDTH)
    config = checkpoints.tiny_config(request.param, **sizes)
    return widths_in_memory(checkpoints.tiny_model(config))


@given(
    allocation=st.sampled_from(["sensitivity", "global"]),
    percent=st.integers(5, 90),
    multiple=st.sampled_from([1, 4]),
    losses=st.lists(losses_of_a_layer, min_size=2, max_size=2),
    seed=st.integers(0, 99),
)
def test_experts_of_a_layer_share_a_width_and_the_budget_is_exact(
    widths, allocation, percent, multiple, losses, seed
):
    torch.manual_seed(seed)
    scores = {mlp.name: torch.rand(mlp.width) for mlp in widths.mlps}
    asked = {"prune_percent": percent, "multiple_of": multiple}
    uniform = widths.plan(PruneArguments(**asked))
    given = {"calibration": "t.jsonl"} if allocation == "sensitivity" else {}
    plan = widths.plan(PruneArguments(**asked, allocation=allocation, **given))
    plan = plan_layers(plan, widths, MadeUp(losses, scores))
    kept, targets = dict(plan.layer_widths), widths.targets(plan)
    assert sum(kept.values()) == uniform.width * len(kept)
    alike, difference = widths.targets(uniform), 0
    shared = [mlp for mlp in widths.mlps if mlp.kind != "expert"]
    for mlp in shared:
        share = mlp.width * kept[mlp.block] / WIDTH
        assert share - multiple < targets[mlp.name] < share + 1
        difference += targets[mlp.name] - alike[mlp.name]
    assert abs(difference) <= multiple * len(shared)
    experts = [mlp for mlp in widths.mlps if mlp.kind == "expert"]
    assert all(targets[mlp.name] == kept[mlp.block] for mlp in experts)


@pytest.mark.parametrize("layers", [{"layers": "1+2"}, {"skip_layers": 0}])
def test_layers_that_are_left_alone_take_no_part(layers):
    """So the first, which is dense, need not be weighed against the experts of the others."""
    config = layouts.overrides("qwen3_moe", WIDTH) | {"num_hidden_layers": 3}
    model = checkpoints.tiny_model(checkpoints.tiny_config("qwen3_moe", **config))
    pruned = prune_model(model, prune_percent=30, allocation="global", **layers)
    first, *others = widths_of(pruned)
    assert (first, sum(others)) == (3 * WIDTH, 2 * 28)
    assert 0 not in dict(pruned.prune_record.plan.layer_widths)
