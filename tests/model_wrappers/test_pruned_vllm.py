"""``pruned-vllm`` and the vLLM loader ``pruned``, compared with ``pruned-hf``."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance

from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers.engines import (
    HEADS,
    pruned_hf,
    pruned_vllm,
    scores,
)
from tests.helpers.layouts import save_family, save_gemma3n
from tests.helpers.ways_to_load import Source, request_of


pytestmark = pytest.mark.vllm


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
def test_each_list_of_widths_is_compiled_for_itself(
    llama, tmp_path, in_this_process, monkeypatch
):
    """The config, whose hash vLLM keeps compiled code under, has one width for all layers."""
    from vllm import envs

    # An engine of an earlier test had vLLM remember the environment.
    envs.disable_envs_cache()
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    # vLLM sets it for the whole process; this has it restored.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = set()
    # torch's configuration has no instance dictionary, from which pytest 9.2 could restore it.
    with torch._dynamo.config.patch(disable=False):
        for asked in ({}, *({"prune_percent": p, "layers": "0"} for p in (20, 40))):
            ours, theirs = (
                pruned_vllm(llama, **asked, enforce_eager=False),
                pruned_hf(llama, **asked),
            )
            assert scores(ours) == pytest.approx(scores(theirs), abs=1e-3)
            config = ours.model.llm_engine.vllm_config.compilation_config
            compiled.add(Path(config.local_cache_dir))
    assert len(compiled) == 3
    assert all(list(folder.rglob("*.so")) for folder in compiled)


def test_activations_are_observed_before_the_engine_loads(
    llama, tmp_path, in_this_process
):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "Some words to run on."}) + "\n")
    asked = {"ratio": 2.0, "criterion": "maw_act", "calibration": str(text)}
    ours, theirs = pruned_vllm(llama, **asked), pruned_hf(llama, **asked)
    assert ours.get_model_info()["pruning"] == theirs.get_model_info()["pruning"]


def test_files_are_read_ahead_where_that_is_asked(llama, monkeypatch, in_this_process):
    from vllm.model_executor.model_loader import weight_utils

    read: list[str] = []
    prefetch = "_prefetch_all_checkpoints"
    monkeypatch.setattr(weight_utils, prefetch, lambda files, **_: read.extend(files))
    ours = pruned_vllm(llama, ratio=2.0, safetensors_load_strategy="prefetch")
    assert read == [str(llama / "model.safetensors")]
    assert scores(ours) == pytest.approx(scores(pruned_hf(llama, ratio=2.0)), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"ratio": 9}, ValueError, r"ratio=9 is above the model's own"),
        ({"ratio": 2, "prune_percent": 4}, ValueError, r"were given together"),
        ({"ratio": 2, "criterion": "no"}, ValueError, r"criterion=no"),
        (
            {"intermediate_size": 1, "tensor_parallel_size": 512},
            ValueError,
            r"512 processes of tensor_parallel_size: pass multiple_of=512",
        ),
        ({"ratio": 2, "load_format": "dummy"}, ValueError, r"load_format=dummy"),
        ({"worker_extension_cls": "a.B"}, ValueError, r"worker_extension_cls=a.B"),
        ({"prune_precent": 2}, ValueError, r"did you mean prune_percent"),
        ({"ratio": 2, "trust_remote_code": "off"}, ValueError, r"trust_remote_code"),
    ],
)
def test_errors_come_before_the_engine_starts(
    arguments, error, sentence, llama, monkeypatch
):
    from lm_eval.models.vllm_causallms import VLLM

    monkeypatch.setattr(VLLM, "__init__", lambda *_, **__: pytest.fail("it started"))
    with pytest.raises(error, match=sentence):
        pruned_vllm(llama, **arguments)


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"ratio": 2, "allocation": "sensitivity"}, "^allocation=sensitivity"),
        ({"ratio": 2, "layers": "0"}, ""),
    ],
)
def test_what_an_engine_cannot_build_is_refused(asked, word, llama):
    from lm_eval_pruned.model_wrappers.vllm_loader import check_buildable

    refused = contextlib.nullcontext()
    if word:
        refused = pytest.raises(UnsupportedModelError, match=word)
    with refused:
        check_buildable(request_of(llama, **asked))


def test_engines_build_experts_from_one_number_and_dense_layers_anew(tmp_path, llama):
    from lm_eval_pruned.model_wrappers.vllm_loader import check_buildable

    save_family(tmp_path / "full", "mixtral", 48)
    asked = {"prune_percent": 50, "layers": "0"}
    Source(tmp_path / "full").export(tmp_path / "odd", **asked)
    for name, more in (("full", asked), ("odd", {})):
        checkpoint = request_of(tmp_path / name, **more).with_stored_widths()
        with pytest.raises(UnsupportedModelError, match=r"model.layers.0.mlp.experts"):
            check_buildable(checkpoint)
    Source(llama).export(tmp_path / "dense", **asked)
    check_buildable(request_of(tmp_path / "dense").with_stored_widths())


def test_a_width_that_is_typed_beside_the_derived_one_is_refused(
    llama, in_this_process
):
    with pytest.raises(ValueError, match=r"intermediate_size=100.*hf_overrides"):
        pruned_vllm(llama, ratio=2.0, hf_overrides={"intermediate_size": 100})


@pytest.mark.parametrize("asked", [{}, {"layers": "0"}], ids=["one width", "two"])
def test_an_exported_checkpoint_is_the_same_model(
    asked, llama, tmp_path, in_this_process
):
    asked = {"ratio": 2.0, **asked}
    ours = scores(pruned_vllm(llama, **asked))
    export_pruned(str(llama), tmp_path / "x", prune_arguments=asked)
    assert scores(pruned_vllm(tmp_path / "x")) == ours


def test_a_config_that_lists_a_width_for_each_layer(tmp_path, in_this_process):
    """Gemma 3n. vLLM's own answers differ there from those of transformers, unpruned too."""
    heads = {name: size for name, size in HEADS.items() if name != "intermediate_size"}
    save_gemma3n(tmp_path / "model", [96, 160, 128], **heads)
    asked = {"prune_percent": 50}
    ours = pruned_vllm(tmp_path / "model", **asked)
    record = ours.get_model_info()["pruning"]
    assert [group["width_after"] for group in record["groups"]] == [48, 80, 64]
    theirs = pruned_hf(tmp_path / "model", **asked)
    assert record == theirs.get_model_info()["pruning"]
    found = scores(ours)
    export_pruned(str(tmp_path / "model"), tmp_path / "x", prune_arguments=asked)
    assert scores(pruned_vllm(tmp_path / "x")) == found


@pytest.mark.parametrize(
    "method",
    [
        "fp8_per_channel",
        pytest.param(
            "fp8_per_block",
            marks=pytest.mark.skipif(
                not torch.cpu._is_amx_tile_supported(),
                reason="vLLM's kernels for blocks of fp8 need a processor with AMX",
            ),
        ),
    ],
)
def test_pruned_weights_are_quantised_while_they_load(
    method, llama, tmp_path, in_this_process
):
    """Of vLLM's methods that need no quantised checkpoint, those that have CPU kernels."""
    engine = {"dtype": "bfloat16", "quantization": method}
    ours = pruned_vllm(llama, ratio=2.0, **engine)
    theirs = pruned_hf(llama, ratio=2.0, dtype="bfloat16")
    assert ours.get_model_info()["pruning"] == theirs.get_model_info()["pruning"]
    answers = scores(ours)
    worker = ours.model.llm_engine.model_executor.driver_worker.worker
    down = worker.get_model().model.layers[0].mlp.down_proj.weight
    assert down.dtype == torch.float8_e4m3fn
    assert 128 in down.shape
    export_pruned(
        str(llama),
        tmp_path / "x",
        prune_arguments={"ratio": 2.0},
        dtype=torch.bfloat16,
    )
    assert scores(pruned_vllm(tmp_path / "x", **engine)) == answers


def without_cached_rows(outputs):
    """As the newer of vLLM's runners, which needs a GPU, returns them."""
    for output in outputs:
        if cached := output.num_cached_tokens:
            output.prompt_logprobs[1 : cached + 1] = []
    return outputs


def of_nothing(outputs):
    """The memory of rows that were read from the cache is anything."""
    for output in outputs:
        for row in output.prompt_logprobs[1 : (output.num_cached_tokens or 0) + 1]:
            row.update(dict.fromkeys(row, 1e9))
    return outputs


@pytest.mark.parametrize("told", [without_cached_rows, of_nothing])
def test_scored_prompts_read_the_prefix_cache(
    told, llama, monkeypatch, in_this_process
):
    """Two equal requests, and answers that begin alike across a block of the cache."""
    from lm_eval.models.vllm_causallms import VLLM

    answer, context = VLLM._model_generate, "Some words that all share. " * 5
    monkeypatch.setattr(
        VLLM, "_model_generate", lambda *a, **more: told(answer(*a, **more))
    )
    ends = ("yes", "yes", "no", "both of " * 6 + "a", "both of " * 6 + "b")
    requests = [Instance("loglikelihood", {}, (context, end), 0) for end in ends]
    ours = pruned_vllm(llama, ratio=2.0, block_size=32)
    expected = pruned_hf(llama, ratio=2.0).loglikelihood(requests)
    # All of it is in the cache at the second time.
    for _ in range(2):
        before = ours.token_counts.processed
        found = ours.loglikelihood(requests, disable_tqdm=True)
        computed = ours.token_counts.processed - before
        path = ours.get_model_info()["answer_paths"]["loglikelihood"]
        assert [one for one, _ in found] == pytest.approx(
            [one for one, _ in expected], abs=1e-3
        )
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert path["requests"] == {"prefix_cache": len(ends)}
        assert path["tokens_computed"] == {"prefix_cache": computed}
        tokens = sum(len(ours.tok_encode(context + end)) for end in ends)
        assert computed < 0.6 * tokens
