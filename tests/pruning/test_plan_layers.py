"""Open plans: the width of each layer, out of what cutting it costs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.allocation import plan_layers
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.curves import LayerCurve, Sensitivity
from lm_eval_pruned.pruning.slicing import widths_in_memory
from tests.helpers import checkpoints, layouts
from tests.helpers.checkpoints import byte_tokenizer
from tests.helpers.ways_to_load import Source, write_texts


WIDTH = 40


@pytest.fixture
def text(tmp_path):
    return {"calibration": write_texts(tmp_path / "texts.jsonl")}


def widths_of(model) -> list[int]:
    return [*widths_in_memory(model).layers.values()]


@pytest.mark.parametrize("multiple_of", [1, 8])
def test_layers_that_a_uniform_cut_leaves_alone_are_weighed_too(
    tiny_llama, tmp_path, text, multiple_of
):
    load_pruned(str(tiny_llama), widths={1: 43}).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    asked = {"intermediate_size": 64, "multiple_of": multiple_of}
    source = Source(tmp_path)
    assert widths_of(source.load(**asked)) == [64, 43, 64]
    asked |= {"allocation": "sensitivity", **text}
    loaded = source.load(**asked)
    # With multiples of 8 alone, no widths add up to 171.
    assert sum(widths_of(loaded)) == (168 if multiple_of == 8 else 171)
    in_memory = prune_model(source.load(), tokenizer=byte_tokenizer(), **asked)
    assert in_memory.prune_record.digest == loaded.prune_record.digest


class MadeUp:
    """Costs of cut layers that hypothesis makes up."""

    def __init__(self, rises):
        self._rises = rises

    def curves(self):
        widths = tuple(sorted({WIDTH - math.floor(s / 100 * WIDTH) for s in (25, 50)}))
        curves = tuple(
            LayerCurve(layer, WIDTH, widths, rises)
            for layer, rises in enumerate(self._rises)
        )
        cut, text = ("maw", "none"), ("t.jsonl", "0" * 64, 2, 9)
        return Sensitivity("m", 3.0, curves, *cut, *text)


FAMILIES = ("mixtral", "qwen2_moe", "olmoe", "gpt_oss", "granitemoeshared")
rises_of_a_layer = st.tuples(st.floats(0, 9), st.floats(0, 9))


@pytest.fixture(scope="module", params=FAMILIES)
def widths(request):
    sizes = layouts.overrides(request.param, WIDTH)
    config = checkpoints.tiny_config(request.param, **sizes)
    return widths_in_memory(checkpoints.tiny_model(config))


@given(
    percent=st.integers(5, 90),
    multiple=st.sampled_from([1, 4]),
    rises=st.lists(rises_of_a_layer, min_size=2, max_size=2),
)
def test_experts_of_a_layer_share_a_width_and_the_budget_is_exact(
    widths, percent, multiple, rises
):
    asked = {"prune_percent": percent, "multiple_of": multiple}
    uniform = widths.cut(PruneArguments(**asked))
    by_cost = {"allocation": "sensitivity", "calibration": "t.jsonl"}
    cut = plan_layers(widths.cut(PruneArguments(**asked, **by_cost)), MadeUp(rises))
    kept, targets = dict(cut.plan.layer_widths), cut.targets
    assert sum(kept.values()) == uniform.plan.width * len(kept)
    alike, difference = uniform.targets, 0
    shared = [mlp for mlp in widths.mlps if mlp.kind != "expert"]
    for mlp in shared:
        share = mlp.width * kept[mlp.layer] / WIDTH
        assert share - multiple < targets[mlp.name] < share + 1
        difference += targets[mlp.name] - alike[mlp.name]
    assert abs(difference) <= multiple * len(shared)
    experts = [mlp for mlp in widths.mlps if mlp.kind == "expert"]
    assert all(targets[mlp.name] == kept[mlp.layer] for mlp in experts)


@pytest.mark.parametrize("layers", [{"layers": "1+2"}, {"skip_layers": 0}])
def test_layers_that_are_left_alone_take_no_part(layers, text):
    """So the first, which is dense, need not be weighed against the experts of the others."""
    config = layouts.overrides("qwen3_moe", WIDTH) | {"num_hidden_layers": 3}
    model = checkpoints.tiny_model(checkpoints.tiny_config("qwen3_moe", **config))
    asked = {"prune_percent": 30, "allocation": "sensitivity", **layers, **text}
    pruned = prune_model(model, tokenizer=byte_tokenizer(), **asked)
    first, *others = widths_of(pruned)
    assert (first, sum(others)) == (3 * WIDTH, 2 * 28)
    assert 0 not in dict(pruned.prune_record.plan.layer_widths)
