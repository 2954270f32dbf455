"""A checkpoint as a stream of narrowed tensors, as engines other than transformers read it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.checkpoints.stream import (
    as_stored,
    check_buildable,
    open_stream,
    scores_of_activations,
)
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers import checkpoints
from tests.helpers.layouts import save_family


def request_of(folder, *, dtype=torch.float32, **prune_arguments) -> LoadRequest:
    return LoadRequest.resolve(
        AutoModelForCausalLM,
        str(folder),
        PruneArguments(**prune_arguments),
        {"dtype": dtype},
    )


@pytest.mark.parametrize(
    "family", ["llama", "phi3", "mixtral", "qwen3_moe", "llama4_text"]
)
def test_the_stream_is_the_exported_checkpoint(family, tmp_path):
    save_family(tmp_path / "full", family, 48)
    asked = {"prune_percent": 40, "criterion": "l2"}
    export = export_pruned(
        str(tmp_path / "full"), tmp_path / "pruned", prune_arguments=asked
    )
    exported = load_file(tmp_path / "pruned" / "model.safetensors")
    with open_stream(request_of(tmp_path / "full", **asked)) as stream:
        assert stream.changes_model
        streamed = dict(stream.tensors())
        record = stream.record()
    assert streamed.keys() == exported.keys()
    for key, tensor in streamed.items():
        assert torch.equal(tensor, exported[key]), key
    assert record.as_dict() == export.record.as_dict()


def test_the_record_is_that_of_loading_in_the_same_dtype(tiny_llama):
    asked = {"ratio": 1.5, "criterion": "l1"}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_pruned(str(tiny_llama), dtype=dtype, **asked)
        with open_stream(request_of(tiny_llama, dtype=dtype, **asked)) as stream:
            tensors = dict(stream.tensors())
            assert stream.record().as_dict() == model.prune_record.as_dict()
        down = tensors["model.layers.0.mlp.down_proj.weight"]
        assert torch.equal(down, model.model.layers[0].mlp.down_proj.weight)


def test_scores_of_activations(tiny_llama, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "Some words to run on."}) + "\n")
    asked = {"ratio": 1.5, "criterion": "maw_act", "calibration": str(text)}
    request = request_of(tiny_llama, **asked)
    with open_stream(request, scores_of_activations(request)) as stream:
        assert dict(stream.tensors())
        record = stream.record()
    expected = load_pruned(str(tiny_llama), dtype=torch.float32, **asked).prune_record
    assert record.as_dict() == expected.as_dict()


def test_dense_layers_keep_widths_that_the_config_cannot_hold(tiny_llama, tmp_path):
    asked = {"ratio": 2.0, "layers": "0"}
    export_pruned(str(tiny_llama), tmp_path, prune_arguments=asked)
    exported = load_file(tmp_path / "model.safetensors")
    for request in (request_of(tiny_llama, **asked), request_of(tmp_path)):
        check_buildable(request)
        with open_stream(request) as stream:
            streamed = dict(stream.tensors())
        assert streamed.keys() == exported.keys()
        for key, tensor in streamed.items():
            assert torch.equal(tensor, exported[key]), key
    found = as_stored(request_of(tmp_path)).widths.actual
    assert list(found.values()) == [64, 88, 88]


def test_experts_of_different_width_are_refused_where_the_config_has_one_number(
    tmp_path,
):
    save_family(tmp_path / "full", "mixtral", 48)
    asked = {"prune_percent": 50, "layers": "0"}
    sentence = r"gives model.layers.0.mlp.experts.* a width of its own"
    with pytest.raises(UnsupportedModelError, match=sentence):
        check_buildable(request_of(tmp_path / "full", **asked))
    export_pruned(str(tmp_path / "full"), tmp_path / "odd", prune_arguments=asked)
    with pytest.raises(UnsupportedModelError, match=r"The checkpoint " + sentence):
        as_stored(request_of(tmp_path / "odd"))


def test_a_pickled_checkpoint_has_to_be_exported_first(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with (
        pytest.raises(
            UnsupportedModelError, match=r"is not in safetensors: export .* first"
        ),
        open_stream(request_of(tmp_path, ratio=2.0)),
    ):
        pass
    baseline = request_of(tmp_path)
    assert as_stored(baseline) is baseline


def test_damage_is_seen_before_a_weight_is_read(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path)
    checkpoints.edit_weights(
        tmp_path, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight")
    )
    with (
        pytest.raises(ValueError, match=r"holds no tensor for .*q_proj"),
        open_stream(request_of(tmp_path, ratio=2.0)),
    ):
        pass


def test_nan_is_named(tiny_llama, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    checkpoints.edit_weights(
        tmp_path,
        lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")),
    )
    with (
        open_stream(request_of(tmp_path, ratio=2.0)) as stream,
        pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*NaN"),
    ):
        dict(stream.tensors())
