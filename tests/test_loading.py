"""Checkpoints as they are found on disk: shards, dtypes, devices, damage."""

from __future__ import annotations

import gc
import logging
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, conversion_mapping

from lm_eval_pruned import load_pruned, loading, prune_model
from lm_eval_pruned.glu import UnsupportedModelError

from . import checkpoints, slicing
from .checkpoints import edit_config, edit_weights


@pytest.fixture
def copied(tiny_llama, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_llama, tmp_path / "copy")


@pytest.fixture
def copied_shards(tiny_llama_sharded, tmp_path):
    """A copy of the sharded tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_llama_sharded, tmp_path / "copy")


def test_shards_are_joined(tiny_llama, tiny_llama_sharded):
    assert len(list(tiny_llama_sharded.glob("*.safetensors"))) > 5
    slicing.assert_same_model(
        load_pruned(str(tiny_llama), ratio=1),
        load_pruned(str(tiny_llama_sharded), ratio=1),
    )


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, "auto"]
)
def test_scores_follow_the_weights_in_their_target_dtype(tiny_llama, dtype):
    full = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    pruned = load_pruned(str(tiny_llama), ratio=1, dtype=dtype)
    slicing.assert_same_model(pruned, prune_model(full, ratio=1))


def test_every_projection_is_read_once_and_where_it_lies(tiny_llama, monkeypatch):
    lies_in_the_file = []
    read = loading.NarrowedTensor.read

    def watched(self):
        weight = read(self)
        lies_in_the_file.append(weight.data_ptr() == read(self).data_ptr())
        return weight

    monkeypatch.setattr(loading.NarrowedTensor, "read", watched)
    load_pruned(str(tiny_llama), ratio=1, dtype=torch.bfloat16)
    assert len(lies_in_the_file) == 9, "every projection of the three layers"
    assert all(lies_in_the_file), "not a copy"


def test_a_thread_that_would_wait_scores_a_later_layer(tiny_llama, monkeypatch):
    scored, others = [], threading.Event()

    def watched(plan, name, *args, score=loading.score, **kwargs):
        scored.append(name)
        if name == "model.layers.0.mlp":
            assert others.wait(60), "nobody scores another layer meanwhile"
        else:
            others.set()
        return score(plan, name, *args, **kwargs)

    monkeypatch.setattr(loading, "score", watched)
    monkeypatch.setattr("transformers.core_model_loading.GLOBAL_WORKERS", 2)
    expected = prune_model(AutoModelForCausalLM.from_pretrained(tiny_llama), ratio=1)
    slicing.assert_same_model(load_pruned(str(tiny_llama), ratio=1), expected)
    assert sorted(scored) == [f"model.layers.{layer}.mlp" for layer in range(3)]


def test_no_layer_is_converted_at_its_full_width(tiny_llama, monkeypatch):
    # In the calling thread, where a dispatch mode sees every operation.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    full = {(88, 32), (32, 88)}
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if (
                isinstance(result, torch.Tensor)
                and result.device.type == "cpu"
                and result.dtype == torch.bfloat16
            ):
                seen.append(tuple(result.shape))
            return result

    with Watch():
        load_pruned(str(tiny_llama), ratio=1, dtype=torch.bfloat16)
    assert (32, 32) in seen, "the narrowed weights are converted"
    assert not full & set(seen)


@pytest.mark.parametrize("criterion", ["l2", "random"])
def test_criteria_that_copy_weights_see_one_layer_at_a_time(
    tiny_llama, monkeypatch, criterion
):
    scoring, most = [], []

    def watched(*args, score=loading.score, **kwargs):
        scoring.append(args[1])
        most.append(len(scoring))
        try:
            return score(*args, **kwargs)
        finally:
            scoring.pop()

    monkeypatch.setattr(loading, "score", watched)
    load_pruned(str(tiny_llama), ratio=1, criterion=criterion, dtype=torch.bfloat16)
    assert most == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["maw", "max_abs", "l1", "vow"])
def test_narrowing_before_converting_changes_no_bit(
    tmp_path, checkpoint_dtype, dtype, criterion
):
    folder = checkpoints.save_tiny(tmp_path / "tiny", dtype=checkpoint_dtype)
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    slicing.assert_same_model(
        load_pruned(str(folder), ratio=2, dtype=dtype, criterion=criterion),
        prune_model(full, ratio=2, criterion=criterion),
    )


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def checkpoint_dtype(request):
    return request.param


def test_weights_that_overflow_in_the_target_dtype_are_named(copied):
    key = "model.layers.1.mlp.gate_proj.weight"
    edit_weights(copied, lambda tensors: tensors[key][3, 3].fill_(1e6))
    load_pruned(str(copied), ratio=1)
    with pytest.raises(ValueError, match=f"{re.escape(key)} holds 1 NaN or infinite"):
        load_pruned(str(copied), ratio=1, dtype=torch.float16)


def test_the_order_of_the_tensors_does_not_matter(copied):
    def reverse(tensors):
        for key in sorted(tensors, reverse=True):
            tensors[key] = tensors.pop(key)

    expected = load_pruned(str(copied), ratio=1)
    edit_weights(copied, reverse)
    slicing.assert_same_model(load_pruned(str(copied), ratio=1), expected)


def test_nothing_stays_registered(tiny_llama, copied):
    before = PreTrainedModel.__dict__["_load_pretrained_model"]
    mapping = repr(conversion_mapping.get_checkpoint_conversion_mapping("llama"))
    load_pruned(str(tiny_llama), ratio=1)
    (copied / "model.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match="not an intact safetensors file"):
        load_pruned(str(copied), ratio=1)
    assert PreTrainedModel.__dict__["_load_pretrained_model"] is before
    assert (
        repr(conversion_mapping.get_checkpoint_conversion_mapping("llama")) == mapping
    )


def load_in_threads(tiny_llama):
    """Load pruned and unpruned models in four threads at once."""
    full = AutoModelForCausalLM.from_pretrained(tiny_llama)
    loaded = []

    def load(prune):
        for _ in range(4):
            loaded.append(
                load_pruned(str(tiny_llama), ratio=1)
                if prune
                else AutoModelForCausalLM.from_pretrained(tiny_llama)
            )

    threads = [threading.Thread(target=load, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(m.config.intermediate_size for m in loaded) == [32] * 8 + [88] * 8
    for model in loaded:
        expected = full
        if model.config.intermediate_size == 32:
            expected = load_pruned(str(tiny_llama), ratio=1)
        slicing.assert_same_model(model, expected)


def test_other_threads_load_untouched(tiny_llama):
    # In a process of its own: where threads load at once, transformers itself can leave
    # torch.nn.init replaced, and models built later would stay uninitialised.
    subprocess.run(
        [
            *(sys.executable, "-c"),
            (
                "import sys; from tests.test_loading import load_in_threads; "
                "load_in_threads(sys.argv[1])"
            ),
            str(tiny_llama),
        ],
        cwd=checkpoints.ROOT,
        check=True,
    )


def test_disk_offload_keeps_the_narrowed_weights(tiny_llama, tmp_path):
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    offloaded = load_pruned(
        str(tiny_llama),
        ratio=1,
        device_map=device_map,
        offload_folder=str(tmp_path / "offload"),
    )
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = load_pruned(str(tiny_llama), ratio=1)(tokens).logits
        assert torch.equal(offloaded(tokens).logits, expected)


def test_pickled_checkpoints_are_pruned_in_memory(copied, caplog):
    tensors = load_file(copied / "model.safetensors")
    expected = load_pruned(str(copied), ratio=1)
    (copied / "model.safetensors").unlink()
    torch.save(tensors, copied / "pytorch_model.bin")
    with caplog.at_level(logging.INFO, "lm_eval.pruned.loading"):
        model = load_pruned(str(copied), ratio=1)
    slicing.assert_same_model(model, expected)
    assert "loaded in full and pruned in memory" in caplog.text
    assert "not in safetensors" in caplog.text


def test_device_and_device_map_exclude_each_other(tiny_llama):
    with pytest.raises(ValueError, match="device=cpu and device_map=auto"):
        load_pruned(str(tiny_llama), ratio=1, device="cpu", device_map="auto")


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_nan_is_named_while_loading(copied, projection):
    key = f"model.layers.2.mlp.{projection}.weight"
    edit_weights(copied, lambda tensors: tensors[key][0].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{re.escape(key)} holds .* NaN or infinite"):
        load_pruned(str(copied), ratio=1)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_a_truncated_file_is_named(copied, keep):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(OSError, match=r"model\.safetensors is not an intact") as error:
        load_pruned(str(copied), ratio=1)
    assert "download or copy it again" in str(error.value)


def test_a_missing_shard_is_named(copied_shards):
    missing = sorted(copied_shards.glob("*.safetensors"))[3]
    missing.unlink()
    with pytest.raises(OSError, match=missing.name):
        load_pruned(str(copied_shards), ratio=1)


def test_a_missing_tensor_is_named(copied):
    key = "model.layers.1.mlp.up_proj.weight"
    edit_weights(copied, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=f"no tensor for {re.escape(key)}"):
        load_pruned(str(copied), ratio=1)


def test_a_config_that_lies_about_the_width_is_caught(copied):
    edit_config(copied, intermediate_size=96)
    with pytest.raises(
        ValueError,
        match=r"has 88 neurons in the checkpoint, but its config\.json says 96",
    ):
        load_pruned(str(copied), ratio=1)


def test_integer_weights_are_refused(copied):
    key = "model.layers.1.mlp.up_proj.weight"

    def to_int(tensors):
        tensors[key] = tensors[key].to(torch.int8)

    edit_weights(copied, to_int)
    with pytest.raises(ValueError, match="stored as I8"):
        load_pruned(str(copied), ratio=1)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantised_checkpoints_are_refused_before_weights_are_read(copied, method):
    edit_config(copied, quantization_config={"quant_method": method, "bits": 4})
    (copied / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=f"quant_method={method}"):
        load_pruned(str(copied), ratio=1)


@pytest.mark.parametrize(
    "arguments",
    [{"ratio": 9}, {"ratio": "x"}, {"criterion": "x"}, {"prune_percent": 100}],
)
def test_bad_arguments_are_refused_before_weights_are_read(copied, arguments):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        load_pruned(str(copied), **arguments)


def test_models_without_a_glu_are_refused_before_weights_are_read(tmp_path):
    checkpoints.tiny_config("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        load_pruned(str(tmp_path), ratio=1)


def test_the_files_are_closed_after_loading(tiny_llama, monkeypatch):
    opened = []

    class Recorder:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)
            self.closed = False
            opened.append(self)

        def __enter__(self):
            return self.file.__enter__()

        def __exit__(self, *error):
            self.closed = True
            return self.file.__exit__(*error)

    monkeypatch.setattr("safetensors.safe_open", Recorder)
    load_pruned(str(tiny_llama), ratio=1)
    assert opened
    assert all(recorder.closed for recorder in opened)


def test_the_garbage_collector_is_left_as_it_was(tiny_llama, copied):
    assert gc.isenabled()
    load_pruned(str(tiny_llama), ratio=1)
    (copied / "model.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match="not an intact safetensors file"):
        load_pruned(str(copied), ratio=1)
    assert gc.isenabled()
    gc.disable()
    try:
        load_pruned(str(tiny_llama), ratio=1)
        assert not gc.isenabled()
    finally:
        gc.enable()
