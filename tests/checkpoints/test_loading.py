"""Checkpoints as they are found on disk: threads, devices, damage, and what is refused."""

from __future__ import annotations

import dataclasses
import gc
import re
import shutil
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers import checkpoints, layouts
from tests.helpers.checkpoints import edit_config, edit_weights, save_tiny
from tests.helpers.comparing import assert_same_model
from tests.helpers.layouts import logits
from tests.helpers.ways_to_load import Source, assert_one_model


GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture
def copied(tiny_llama, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def request_for(folder, arguments=None, **asked):
    return LoadRequest.resolve(
        AutoModelForCausalLM, str(folder), PruneArguments(**asked), arguments or {}
    )


# Threads, each in a process of its own: where they load at once, transformers itself can leave
# torch.nn.init replaced, and models built later would stay uninitialised.


def in_threads(count, load):
    threads = [threading.Thread(target=load, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def load_pruned_and_whole_models(folder):
    loaded = []

    def load(number):
        ways = (AutoModelForCausalLM.from_pretrained, partial(load_pruned, ratio=1))
        loaded.extend(ways[number % 2](folder) for _ in range(4))

    in_threads(4, load)
    full = AutoModelForCausalLM.from_pretrained(folder)
    pruned = load_pruned(folder, ratio=1)
    assert sorted(m.config.intermediate_size for m in loaded) == [32] * 8 + [88] * 8
    for model in loaded:
        assert_same_model(
            model, pruned if model.config.intermediate_size == 32 else full
        )


def load_tied_models(folder):
    start, loaded = threading.Barrier(6), []

    def load(number):
        start.wait()
        for _ in range(5):
            loaded.append(prune_model(load_pruned(folder, ratio=1), ratio=0.5))

    in_threads(6, load)
    assert len(loaded) == 30, "some thread failed"
    built = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    for model in (*loaded, built):
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert built.model.layers[0].mlp.gate_proj.weight.std() < 0.1, "initialised"


@pytest.mark.slow
@pytest.mark.parametrize("load", [load_pruned_and_whole_models, load_tied_models])
def test_threads_do_not_disturb_each_other(load, tmp_path):
    save_tiny(tmp_path, tie_word_embeddings=load is load_tied_models)
    name = load.__name__
    code = f"import sys; from {__name__} import {name}; {name}(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, cwd=checkpoints.ROOT, check=True)


@pytest.mark.parametrize("sizes", [{}, {"ratio": 1}])
def test_a_model_that_is_let_go_waits_for_no_collection(tiny_llama, sizes):
    gc.disable()
    try:
        reference = weakref.ref(load_pruned(str(tiny_llama), **sizes))
        assert reference() is None
    finally:
        gc.enable()


def test_the_tokenizer_comes_from_where_the_model_does(tiny_llama, monkeypatch):
    request, calls = request_for(tiny_llama, ratio=1), []
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained",
        lambda *args, **kwargs: calls.append((args, kwargs)),
    )
    where = dict.fromkeys(
        ("cache_dir", "force_download", "local_files_only", "proxies", "revision")
        + ("subfolder", "token", "trust_remote_code", "gguf_file"),
        "x",
    )
    given = {**where, "device_map": {"": "cpu"}, "dtype": "float16", "variant": None}
    dataclasses.replace(request, model_arguments=given).load_tokenizer()
    assert calls == [((str(tiny_llama),), where)]


def test_biases_are_no_part_of_the_ranking(tmp_path):
    folder = save_tiny(tmp_path / "tiny", mlp_bias=True)
    expected = load_pruned(str(folder), ratio=1).prune_record.digest
    gate, down = (f"model.layers.1.mlp.{name}_proj.bias" for name in ("gate", "down"))

    def spoil(tensors):
        tensors[gate][5:80] = float("nan")
        tensors[down][3] = float("inf")

    edit_weights(folder, spoil)
    loaded = load_pruned(str(folder), ratio=1)
    assert loaded.prune_record.digest == expected
    assert loaded.get_parameter(gate).isnan().any()


def test_layers_that_keep_their_width_are_not_scored(copied):
    edit_weights(copied, lambda tensors: tensors[GATE][7].fill_(float("nan")))
    model = load_pruned(str(copied), ratio=1, skip_layers=1)
    assert [len(kept) for kept in model.prune_record.kept] == [32, 88, 32]
    assert model.get_parameter(GATE)[7].isnan().all()


def test_what_the_hub_holds_is_known_by_name_and_commit(tiny_llama):
    request = dataclasses.replace(request_for(tiny_llama, ratio=1), pretrained="org/a")
    assert request.content_key() is None
    request.widths.original._commit_hash = "1" * 40
    other = dataclasses.replace(request, pretrained="org/b")
    assert request.content_key() not in (None, other.content_key())


def test_what_the_class_lets_be_missing_or_superfluous_is_no_damage(
    copied, monkeypatch
):
    edit_weights(copied, lambda t: t.update({"model.x": t.pop("model.norm.weight")}))
    with pytest.raises(ValueError, match=r"model\.(norm\.weight|x)"):
        load_pruned(str(copied), ratio=1)
    for list_of, name in (("missing", "norm"), ("unexpected", "x")):
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
    config, folder = CONFIG_MAPPING["qwen3_5"](text_config=text), tmp_path / "source"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    source = Source(folder)
    assert type(source.whole().config) is not type(config)
    for number, asked in enumerate(({"ratio": 1}, {"ratio": 1, "layers": 1})):
        pruned = prune_model(source.whole(), **asked)
        ways = ("one file", "exported") if number == 0 else ("one file",)
        out = tmp_path / str(number)
        assert_one_model(source, asked, pruned.state_dict(), out, ways)
        cast = source.load(dtype=torch.bfloat16, **asked)
        assert_same_model(cast, pruned.to(torch.bfloat16))


def test_a_nested_text_config_is_narrowed_and_other_towers_are_not(tmp_path):
    from transformers import AutoModelForImageTextToText

    vision = {"hidden_size": 16, "intermediate_size": 88, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = CONFIG_MAPPING["gemma3"](
        text_config=checkpoints.tiny_config("gemma3_text").to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    full = AutoModelForImageTextToText.from_config(config).eval()
    full.save_pretrained(tmp_path)
    auto = {"auto_class": AutoModelForImageTextToText}
    pruned = load_pruned(str(tmp_path), ratio=1.5, **auto)
    assert pruned.config.text_config.intermediate_size == 48
    assert pruned.config.vision_config.intermediate_size == 88
    in_memory = prune_model(full, ratio=1.5)
    assert_same_model(pruned, in_memory)
    assert torch.equal(logits(pruned), logits(in_memory))


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        # Dense Doge carries the number of experts of its sparse siblings.
        ("doge", {"num_experts": 16384, "num_cdmoe_experts": 16348}),
        ("gpt_oss", {"num_local_experts": 1, "num_experts_per_tok": 1}),
    ],
)
def test_unusual_numbers_of_experts(tmp_path, family, sizes):
    if family == "doge":
        save_tiny(tmp_path, family, num_hidden_layers=2, num_key_value_heads=4)
        edit_config(tmp_path, **sizes)
    else:
        save_tiny(tmp_path, family, **(layouts.overrides(family, 16) | sizes))
    source = Source(tmp_path)
    in_memory = prune_model(source.whole(), prune_percent=50)
    assert_same_model(source.load(prune_percent=50), in_memory)
    if family == "doge":
        edit_config(tmp_path, is_moe=True)
        with pytest.raises(UnsupportedModelError, match=r"down_embed.* inside its MLP"):
            load_pruned(str(tmp_path), ratio=1)


# What is refused: what was done to the checkpoint, arguments, and a telling word.


def missing_shard(folder):
    load_pruned(str(folder)).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("*.safetensors"))[3].unlink()


def overflowing(folder):
    edit_weights(folder, lambda tensors: tensors[GATE].fill_(1e6))
    load_pruned(str(folder), ratio=2, dtype="bfloat16")


def weights(change):
    return lambda folder: edit_weights(folder, change)


def nan_in(name):
    return weights(lambda t: t[name][0].fill_(float("nan")))


def quantised(method):
    def change(folder):
        edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
        (folder / "model.safetensors").unlink()

    return change


def without_glu(folder):
    for file in folder.iterdir():
        file.unlink()
    checkpoints.tiny_config("gpt2").save_pretrained(folder)


REFUSED = [
    *(
        (nan_in(name), {}, f"{re.escape(name)} holds .* NaN")
        for name in (GATE, GATE.replace("gate", "up"), GATE.replace("gate", "down"))
    ),
    (overflowing, {"dtype": "float16"}, rf"{re.escape(GATE)} holds \d+ NaN or inf"),
    (missing_shard, {}, "model-00004-of"),
    (weights(lambda t: t.pop(GATE)), {}, f"no tensor for {re.escape(GATE)}"),
    *(
        (
            weights(lambda t: t.update({GATE: torch.randn(5, 32, 1)})),
            more,
            rf"^{re.escape(GATE)} has shape \[5, 32, 1\]",
        )
        for more in ({}, {"ignore_mismatched_sizes": True})
    ),
    (
        weights(lambda t: t.update({"lm_head.weight": torch.ones(200, 32)})),
        {},
        r"lm_head\.weight has shape \[200, 32\]",
    ),
    *((quantised(m), {}, f"quant_method={m}") for m in ("gptq", "awq", "bitsandbytes")),
    (without_glu, {}, "GPT2LMHeadModel"),
]


@pytest.mark.parametrize(("change", "arguments", "word"), REFUSED)
def test_what_is_wrong_is_named(copied, change, arguments, word):
    change(copied)
    with pytest.raises((ValueError, OSError), match=word):
        load_pruned(str(copied), ratio=1, **arguments)


def test_shapes_may_differ_outside_of_the_mlps_on_request(copied):
    edit_config(copied, vocab_size=300)
    for sizes in ({}, {"ratio": 1}):
        model = load_pruned(str(copied), ignore_mismatched_sizes=True, **sizes)
        assert model.lm_head.weight.shape == (300, 32)


def test_errors_before_the_checkpoint_is_opened_are_told(tiny_llama):
    class Broken(AutoModelForCausalLM):
        @staticmethod
        def from_pretrained(*args, **kwargs):
            raise KeyError("out of order")

    with pytest.raises(ValueError, match=r"cannot be loaded .KeyError: .*order"):
        load_pruned(str(tiny_llama), ratio=1, auto_class=Broken)


def test_a_damaged_model_is_refused_by_the_model_type_too(copied):
    (copied / "config.json").write_text("{")
    with pytest.raises((ValueError, OSError), match=str(copied)):
        PrunedHFLM(str(copied), device="cpu", ratio=1)
