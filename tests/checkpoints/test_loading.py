"""Checkpoints as they are found on disk: shards, dtypes, devices, damage."""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import shutil
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints import load as loading
from lm_eval_pruned.checkpoints.configs import config_and_rest
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers import checkpoints, layouts
from tests.helpers.checkpoints import edit_config, edit_weights
from tests.helpers.comparing import assert_same_model


@pytest.fixture
def copied(tiny_llama, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_llama, tmp_path / "copy")


@pytest.fixture
def copied_shards(tiny_llama_sharded, tmp_path):
    """A copy of the sharded tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny_llama_sharded, tmp_path / "copy")


def test_however_a_checkpoint_is_stored_it_is_the_same_model(
    tiny_llama, tiny_llama_sharded, copied
):
    def reverse(tensors):
        for key in sorted(tensors, reverse=True):
            tensors[key] = tensors.pop(key)

    expected = load_pruned(str(tiny_llama), ratio=1)
    assert len(list(tiny_llama_sharded.glob("*.safetensors"))) > 5
    assert_same_model(load_pruned(str(tiny_llama_sharded), ratio=1), expected)
    edit_weights(copied, reverse)
    assert_same_model(load_pruned(str(copied), ratio=1), expected)
    file = copied / "model.safetensors"
    torch.save(load_file(file), copied / "pytorch_model.bin")
    file.unlink()
    assert_same_model(load_pruned(str(copied), ratio=1), expected)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("criterion", ["maw", "vow"])
def test_weights_are_ranked_as_they_are_stored_and_then_converted(
    tmp_path, checkpoint_dtype, dtype, criterion
):
    folder = checkpoints.save_tiny(tmp_path / "tiny", dtype=checkpoint_dtype)
    full = AutoModelForCausalLM.from_pretrained(folder)
    pruned = prune_model(full, ratio=2, criterion=criterion)
    digest = pruned.prune_record.digest
    loaded = load_pruned(str(folder), ratio=2, dtype=dtype, criterion=criterion)
    assert_same_model(loaded, pruned.to(dtype or checkpoint_dtype))
    assert loaded.dtype == (dtype or checkpoint_dtype)
    assert loaded.prune_record.digest == digest


def test_a_weight_that_overflows_in_the_dtype_of_the_load_is_named(
    tiny_llama, tmp_path
):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors[name].fill_(1e6))
    load_pruned(str(folder), ratio=2, dtype="bfloat16")
    with pytest.raises(ValueError, match=rf"{name} holds \d+ NaN or infinite values"):
        load_pruned(str(folder), ratio=2, dtype="float16")


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def checkpoint_dtype(request):
    return request.param


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
        assert_same_model(model, expected)


def in_another_process(function, folder):
    code = f"import sys; from {__name__} import {function}; {function}(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, folder], cwd=checkpoints.ROOT, check=True
    )


def load_tied_models_in_threads(folder):
    """Build, load and prune models with tied embeddings in six threads at once."""
    start = threading.Barrier(6)

    def load():
        start.wait()
        for _ in range(5):
            model = load_pruned(folder, ratio=1)
            loaded.append(prune_model(model, ratio=0.5))

    loaded: list = []
    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 30, "some thread failed"
    built = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    for model in (*loaded, built):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert built.model.layers[0].mlp.gate_proj.weight.std() < 0.1, "initialised"


@pytest.mark.slow
def test_tied_models_load_in_threads(tmp_path):
    folder = str(checkpoints.save_tiny(tmp_path, tie_word_embeddings=True))
    in_another_process("load_tied_models_in_threads", folder)


@pytest.mark.slow
def test_other_threads_load_untouched(tiny_llama):
    # In a process of its own: where threads load at once, transformers itself can leave
    # torch.nn.init replaced, and models built later would stay uninitialised.
    in_another_process("load_in_threads", str(tiny_llama))


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


def test_device_and_device_map_exclude_each_other(tiny_llama):
    with pytest.raises(ValueError, match="device=cpu and device_map=auto"):
        load_pruned(str(tiny_llama), ratio=1, device="cpu", device_map="auto")


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_nan_is_named_while_loading(copied, projection):
    key = f"model.layers.2.mlp.{projection}.weight"
    edit_weights(copied, lambda tensors: tensors[key][0].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{re.escape(key)} holds .* NaN or infinite"):
        load_pruned(str(copied), ratio=1)


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


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_quantised_checkpoints_are_refused_before_weights_are_read(copied, method):
    edit_config(copied, quantization_config={"quant_method": method, "bits": 4})
    (copied / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match=f"quant_method={method}"):
        load_pruned(str(copied), ratio=1)


def test_models_without_a_glu_are_refused_before_weights_are_read(tmp_path):
    checkpoints.tiny_config("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel"):
        load_pruned(str(tmp_path), ratio=1)


@pytest.mark.parametrize("sizes", [{}, {"ratio": 1}])
def test_a_model_that_is_let_go_waits_for_no_collection(tiny_llama, sizes):
    gc.disable()
    try:
        model = load_pruned(str(tiny_llama), **sizes)
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


def request_for(folder, arguments=None, **prune_arguments):
    return LoadRequest.resolve(
        AutoModelForCausalLM,
        str(folder),
        PruneArguments(**prune_arguments),
        arguments or {},
    )


def test_the_tokenizer_comes_from_where_the_model_does(tiny_llama, monkeypatch):
    request = request_for(tiny_llama, ratio=1)
    calls = []
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained",
        lambda *args, **kwargs: calls.append((args, kwargs)),
    )
    where = {
        "cache_dir": "c",
        "force_download": True,
        "local_files_only": True,
        "proxies": {"http": "p"},
        "revision": "r",
        "subfolder": "s",
        "token": "t",
        "trust_remote_code": True,
        "gguf_file": "a.gguf",
    }
    for arguments, expected in (
        ({}, {}),
        (
            {"revision": None, "dtype": torch.float16, "subfolder": ""},
            {"subfolder": ""},
        ),
        ({**where, "device_map": {"": "cpu"}}, where),
    ):
        dataclasses.replace(request, model_arguments=arguments).load_tokenizer()
        assert calls.pop() == ((str(tiny_llama),), expected)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "phi3"])
def test_what_was_merged_is_saved_as_it_was_stored(family, dtype, tmp_path):
    layouts.save_family(tmp_path / "source", family, 16)
    model = load_pruned(str(tmp_path / "source"), intermediate_size=8, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    source, saved = (
        load_file(tmp_path / name / "model.safetensors") for name in ("source", "saved")
    )
    assert source.keys() == saved.keys()
    assert_same_model(load_pruned(str(tmp_path / "saved")), model)


def test_arguments_are_for_the_config_or_for_the_model(tiny_llama):
    arguments = {
        "dtype": torch.float16,
        "quantization_config": None,
        "rms_norm_eps": 0.5,
        "revision": "main",
        "trust_remote_code": False,
        "attn_implementation": "eager",
        "low_cpu_mem_usage": True,
    }
    config, rest = config_and_rest(str(tiny_llama), arguments)
    assert config.rms_norm_eps == 0.5
    assert config.dtype == torch.float32, "what the checkpoint says"
    for name in ("dtype", "quantization_config", "revision", "trust_remote_code"):
        assert rest[name] is arguments[name]
    assert "rms_norm_eps" not in rest
    assert rest["low_cpu_mem_usage"] is True


def test_a_request_has_the_widths_of_the_config(copied):
    request = request_for(copied, ratio=1)
    assert request.plan == loading.load_request(request).prune_record.plan
    ragged = copied.parent / "ragged"
    load_pruned(str(copied), ratio=1, layers=1).save_pretrained(ragged)
    only = request_for(ragged, ratio=2)
    assert sorted(only.widths.actual.values()) == [32, 88, 88]
    config = json.loads((ragged / "config.json").read_text())
    del config["per_layer_config"]
    (ragged / "config.json").write_text(json.dumps(config))
    before = request_for(ragged, ratio=2)
    assert set(before.widths.actual.values()) == {88}
    model = loading.load_request(before)
    assert [len(kept) for kept in model.prune_record.kept] == [64, 32, 64]


def test_a_dense_model_may_carry_a_number_of_experts(tmp_path):
    """Dense Doge carries the number of experts of its sparse siblings."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 4}
    dense = checkpoints.save_tiny(tmp_path / "dense", "doge", **sizes)
    edit_config(dense, num_experts=16384, num_cdmoe_experts=16348)
    model = load_pruned(str(dense), ratio=1)
    whole = AutoModelForCausalLM.from_pretrained(dense)
    assert_same_model(model, prune_model(whole, ratio=1))
    edit_config(dense, is_moe=True)
    with pytest.raises(
        UnsupportedModelError, match=r"down_embed.* inside its MLP: a neuron of it is"
    ):
        load_pruned(str(dense), ratio=1)


def test_biases_are_no_part_of_the_ranking(tmp_path):
    folder = checkpoints.save_tiny(tmp_path / "tiny", mlp_bias=True)
    expected = load_pruned(str(folder), ratio=1).prune_record.digest
    gate, down = (f"model.layers.1.mlp.{name}_proj.bias" for name in ("gate", "down"))

    def spoil(tensors):
        tensors[gate][5:80] = float("nan")
        tensors[down][3] = float("inf")

    edit_weights(folder, spoil)
    loaded = load_pruned(str(folder), ratio=1)
    assert loaded.prune_record.digest == expected
    assert loaded.get_parameter(gate).isnan().any()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_config_that_lies_about_a_small_model_is_caught(tmp_path, layers):
    folder = checkpoints.save_tiny(tmp_path / "tiny", num_hidden_layers=layers)
    edit_config(folder, intermediate_size=96)
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp has 88 .* says 96: correct in"
    ):
        load_pruned(str(folder))


def test_the_key_of_the_first_lie_is_named(tmp_path):
    sizes = {**layouts.overrides("qwen3_moe", 16), "intermediate_size": 16}
    folder = checkpoints.save_tiny(tmp_path / "tiny", "qwen3_moe", **sizes)
    edit_config(folder, intermediate_size=20, moe_intermediate_size=24)
    with pytest.raises(
        ValueError, match=r"0\.mlp has 16 .* 20: correct intermediate_size"
    ):
        load_pruned(str(folder))


def test_a_stack_of_one_expert_is_a_stack(tmp_path):
    sizes = layouts.overrides("gpt_oss", 16)
    sizes |= {"num_local_experts": 1, "num_experts_per_tok": 1}
    folder = checkpoints.save_tiny(tmp_path / "tiny", "gpt_oss", **sizes)
    arguments = {"prune_percent": 50}
    full = AutoModelForCausalLM.from_pretrained(folder, **layouts.EAGER)
    loaded = load_pruned(str(folder), **arguments, **layouts.EAGER)
    assert_same_model(loaded, prune_model(full, **arguments))


def test_layers_that_keep_their_width_are_not_scored(tmp_path):
    folder = checkpoints.save_tiny(tmp_path / "tiny", intermediate_size=300)
    key = "model.layers.2.mlp.gate_proj.weight"
    edit_weights(folder, lambda tensors: tensors[key][7].fill_(float("nan")))
    model = load_pruned(str(folder), ratio=1, layers="0-1")
    assert [len(kept) for kept in model.prune_record.kept] == [32, 32, 300]
    assert model.get_parameter(key)[7].isnan().all()
    with pytest.raises(ValueError, match=f"{re.escape(key)} holds 32 NaN"):
        load_pruned(str(folder), ratio=1)


def test_errors_before_the_checkpoint_is_opened_are_told(tiny_llama):
    class Broken(AutoModelForCausalLM):
        @staticmethod
        def from_pretrained(*args, **kwargs):
            raise KeyError("out of order")

    with pytest.raises(ValueError, match=r"cannot be loaded .KeyError: .*order"):
        load_pruned(str(tiny_llama), ratio=1, auto_class=Broken)


def test_shapes_may_differ_outside_of_the_mlps_on_request(copied):
    def cut(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:200].clone()

    edit_weights(copied, cut)
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \[200, 32\]"):
        load_pruned(str(copied), ratio=1)
    loaded = load_pruned(str(copied), ratio=1, ignore_mismatched_sizes=True)
    assert loaded.lm_head.weight.shape == (260, 32)


@pytest.mark.parametrize("sizes", [{}, {"ratio": 1}])
def test_shapes_may_not_differ_inside_of_the_mlps(copied, sizes):
    """Neither in safetensors nor in other files."""
    edit_config(copied, intermediate_size=80)
    more = {"ignore_mismatched_sizes": True, **sizes}
    with pytest.raises(ValueError, match=r"88 neurons .* config.json says 80"):
        load_pruned(str(copied), **more)
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"88 neurons .* config.json says 80"):
        load_pruned(str(copied), **more)
    edit_config(copied, intermediate_size=88, vocab_size=300)
    assert load_pruned(str(copied), **more).lm_head.weight.shape == (300, 32)


def test_options_are_passed_by_name(tiny_llama):
    with pytest.raises(TypeError, match="positional"):
        load_pruned(str(tiny_llama), 1)
    model = load_pruned(ratio=1, pretrained=str(tiny_llama))
    assert model.config.intermediate_size == 32


@pytest.mark.parametrize("text", ["off", "false", ""])
def test_text_does_not_let_remote_code_run(tiny_llama, text):
    with pytest.raises(ValueError, match=f"trust_remote_code='{text}' is not"):
        load_pruned(str(tiny_llama), ratio=2, trust_remote_code=text)


@pytest.mark.parametrize("trusted", [False, None])
def test_code_that_is_not_remote_needs_no_trust(tiny_llama, trusted):
    model = load_pruned(str(tiny_llama), ratio=2, trust_remote_code=trusted)
    assert_same_model(model, load_pruned(str(tiny_llama), ratio=2))


def test_a_gate_of_three_axes_is_named_and_not_its_neighbour(copied):
    key = "model.layers.1.mlp.gate_proj.weight"
    edit_weights(copied, lambda tensors: tensors.update({key: torch.randn(5, 32, 1)}))
    for more in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(
            ValueError, match=rf"^{re.escape(key)} has shape \[5, 32, 1\]"
        ):
            load_pruned(str(copied), ratio=1, **more)


def test_what_the_hub_holds_is_known_by_name_and_commit(tiny_llama):
    request = dataclasses.replace(request_for(tiny_llama, ratio=1), pretrained="org/a")
    assert request.content_key() is None
    request.widths.original._commit_hash = "1" * 40
    other = dataclasses.replace(request, pretrained="org/b")
    assert request.content_key() not in (None, other.content_key())


def test_what_the_class_lets_be_missing_or_superfluous_is_no_damage(
    copied, monkeypatch
):
    def edit(tensors):
        tensors["model.extra"] = tensors.pop("model.norm.weight")

    edit_weights(copied, edit)
    with pytest.raises(ValueError, match=r"model\.(norm\.weight|extra)"):
        load_pruned(str(copied), ratio=1)
    for list_of, name in (("missing", "norm"), ("unexpected", "extra")):
        name = f"_keys_to_ignore_on_load_{list_of}", [rf"model\.{name}"]
        monkeypatch.setattr(LlamaForCausalLM, *name, raising=False)
    load_pruned(str(copied), ratio=1)


def test_a_model_of_text_with_the_config_of_more(tmp_path):
    """Its class is handed the part of the config that is of text."""
    text = {
        **checkpoints.tiny_config("qwen3_5_text", head_dim=8).to_dict(),
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    config = CONFIG_MAPPING["qwen3_5"](text_config=text)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(whole.config) is not type(config)
    pruned = prune_model(whole, ratio=1)
    assert_same_model(load_pruned(str(tmp_path), ratio=1), pruned)
    cast = load_pruned(str(tmp_path), ratio=1, dtype=torch.bfloat16)
    assert_same_model(cast, pruned.to(torch.bfloat16))
    export_pruned(str(tmp_path), tmp_path / "out", prune_arguments={"ratio": 1})
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_model(opened.to(torch.bfloat16), cast)
    ragged = load_pruned(str(tmp_path), ratio=1, layers=1, dtype=torch.bfloat16)
    whole = prune_model(
        AutoModelForCausalLM.from_pretrained(tmp_path), ratio=1, layers=1
    )
    assert_same_model(ragged, whole.to(torch.bfloat16))
