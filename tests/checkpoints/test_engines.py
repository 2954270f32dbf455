"""A pruned model as the tensors of a checkpoint, for engines other than transformers."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.checkpoints.load import Stored, check_buildable, tensors_of
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers.layouts import save_family


def request_of(folder, **asked) -> LoadRequest:
    auto, arguments = AutoModelForCausalLM, PruneArguments(**asked)
    return LoadRequest.resolve(auto, str(folder), arguments, {})


def assert_streams(request, folder):
    model = Stored.of(request).pruned()
    streamed = dict(tensors_of(model))
    exported = load_file(folder / "model.safetensors")
    assert streamed.keys() == exported.keys()
    assert all(tensor.equal(exported[key]) for key, tensor in streamed.items())
    return model.prune_record


@pytest.mark.parametrize(
    "family", ["llama", "phi3", "mixtral", "qwen3_moe", "llama4_text", "lfm2"]
)
def test_the_stream_is_the_exported_checkpoint(family, tmp_path):
    full, out = tmp_path / "full", tmp_path / "pruned"
    save_family(full, family, 48)
    asked = {"prune_percent": 40, "criterion": "l2"}
    export = export_pruned(str(full), out, prune_arguments=asked)
    record = assert_streams(request_of(full, **asked), out)
    assert record.as_dict() == export.record.as_dict()


def test_dense_layers_keep_widths_that_the_config_cannot_hold(tiny_llama, tmp_path):
    asked = {"ratio": 2.0, "layers": "0"}
    export_pruned(str(tiny_llama), tmp_path, prune_arguments=asked)
    for request in (request_of(tiny_llama, **asked), request_of(tmp_path)):
        check_buildable(request)
        assert_streams(request, tmp_path)
    assert list(request_of(tmp_path).widths.actual.values()) == [64, 88, 88]


def test_experts_of_different_width_are_refused_where_the_config_has_one_number(
    tmp_path,
):
    full, odd = tmp_path / "full", tmp_path / "odd"
    save_family(full, "mixtral", 48)
    asked = {"prune_percent": 50, "layers": "0"}
    export_pruned(str(full), odd, prune_arguments=asked)
    for request in (request_of(full, **asked), request_of(odd)):
        with pytest.raises(UnsupportedModelError, match=r"model.layers.0.mlp.experts"):
            check_buildable(request)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"allocation": "global"}, "allocation=global"),
        ({"criterion": "best", "calibration": "texts.jsonl"}, "criterion=best"),
        ({"drop_layers": 1}, "drop_layers"),
    ],
)
def test_an_engine_needs_the_widths_before_it_reads_a_weight(
    tiny_llama, arguments, named
):
    request = request_of(tiny_llama, ratio=2, **arguments)
    with pytest.raises(UnsupportedModelError, match=f"^{named}"):
        check_buildable(request)
