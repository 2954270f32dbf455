"""The dtypes of a file, of its config and of a load: three things, and one model whatever they are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.checkpoint import tensors_of
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.checkpoints.load import stored_model
from lm_eval_pruned.pruning.slicing import carry_out
from tests.helpers import by_hand
from tests.helpers.checkpoints import edit_config, edit_weights, save_tiny
from tests.helpers.layouts import logits
from tests.helpers.ways_to_load import (
    WEIGHTS,
    assert_state,
    norms_in_float32,
    request_of,
    write_texts,
)


DTYPES = ("float32", "float16", "bfloat16")
HEAD = "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)


def stored_as(folder, file: str, config: str | None, **options):
    """Write a checkpoint whose config.json names another dtype than its file has, or none."""
    save_tiny(folder, dtype=dtype_of(file), **options)
    edit_config(folder, dtype=config)
    return folder


def by_rank_of_the_file(folder, width):
    """Return the rule that keeps the neurons that score best by the tensors of the file."""
    tensors = load_file(folder / WEIGHTS)

    def kept_of(path, gate, up):
        rows = [
            tensors[f"{path}.{n}_proj.weight"].float().numpy() for n in ("gate", "up")
        ]
        return by_hand.top(by_hand.FORMULAS["maw"](*rows).tolist(), width)

    return kept_of


def assert_sliced_from_stock(folder, **dtype):
    """Compare a pruned and an unpruned load with what stock transformers loads."""
    stock = AutoModelForCausalLM.from_pretrained(folder, **dtype)
    state, _ = by_hand.sliced(stock, by_rank_of_the_file(folder, 40))
    pruned = load_pruned(str(folder), intermediate_size=40, **dtype)
    assert_state(pruned, state)
    whole = load_pruned(str(folder), **dtype)
    assert_state(whole, stock.state_dict())
    assert torch.equal(logits(whole), logits(stock))
    assert pruned.dtype == pruned.config.dtype == stock.dtype
    narrow = by_hand.narrow(stock, by_hand.listed(pruned.prune_record.kept))
    assert torch.equal(logits(pruned), logits(narrow))
    return pruned


@pytest.mark.parametrize(
    ("family", "unread"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("glm4_moe", "model.layers.92.mlp.down_proj.weight"),
    ],
)
def test_tensors_that_transformers_ignores_widen_no_other(family, unread, tmp_path):
    folder = save_tiny(tmp_path / "source", family, dtype=torch.bfloat16)
    size = {"prune_percent": 40}
    export_pruned(folder, tmp_path / "without", prune_arguments=size)
    tensors = load_file(folder / WEIGHTS)
    extra = {unread: torch.ones(16)}
    save_file(tensors | extra, folder / WEIGHTS, {"format": "pt"})
    export_pruned(folder, tmp_path / "with", prune_arguments=size)
    before, after = (load_file(tmp_path / n / WEIGHTS) for n in ("without", "with"))
    after.pop(unread, None)
    assert {n: t.dtype for n, t in after.items()} == {
        n: t.dtype for n, t in before.items()
    }
    assert load_pruned(str(folder), **size).dtype == torch.bfloat16


@pytest.mark.parametrize("file", DTYPES)
@pytest.mark.parametrize("config", [*DTYPES, None])
def test_all_sizes_are_slices_of_the_model_that_stock_transformers_loads(
    file, config, tmp_path
):
    folder = stored_as(tmp_path / "source", file, config)
    digests = {
        assert_sliced_from_stock(folder, **asked).prune_record.digest
        for asked in ({}, *({"dtype": name} for name in DTYPES))
    }
    assert len(digests) == 1, "neurons are ranked as they are stored"


def mixed(folder, config="bfloat16"):
    """Norms in float32, all else in bfloat16."""
    stored_as(folder, "bfloat16", config)
    edit_weights(folder, norms_in_float32)
    return folder


@pytest.mark.parametrize("config", [*DTYPES, None])
def test_tensors_of_several_dtypes(config, tmp_path):
    folder = mixed(tmp_path / "source", config)
    for asked in ({}, *({"dtype": name} for name in DTYPES)):
        assert_sliced_from_stock(folder, **asked)


def test_an_mlp_in_another_dtype_is_ranked_as_it_is_stored(tmp_path):
    folder = stored_as(tmp_path / "source", "float32", "bfloat16")

    def narrow_the_rest(tensors):
        for name in tensors.keys() - {
            f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up")
        }:
            tensors[name] = tensors[name].to(torch.bfloat16)

    edit_weights(folder, narrow_the_rest)
    for asked in ({}, {"dtype": "float32"}):
        assert_sliced_from_stock(folder, **asked)


def in_shards(folder, tensors):
    """One file for each tensor, and a first one in another dtype."""
    weight_map = {
        name: f"model-{n}.safetensors" for n, name in enumerate(sorted(tensors))
    }
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def in_a_torch_file(folder, tensors):
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize("config", ["bfloat16", None])
@pytest.mark.parametrize("store", [in_shards, in_a_torch_file])
def test_all_files_of_a_checkpoint_tell_their_dtypes(store, config, tmp_path):
    source = mixed(tmp_path / "source", config)
    folder = shutil.copytree(source, tmp_path / "copy")
    (folder / WEIGHTS).unlink()
    store(folder, load_file(source / WEIGHTS))
    for asked in ({}, {"dtype": "float32"}):
        model = load_pruned(str(folder), intermediate_size=40, **asked)
        stock = AutoModelForCausalLM.from_pretrained(folder, **asked)
        rule = by_rank_of_the_file(source, 40)
        assert_state(model, by_hand.sliced(stock, rule)[0])


def test_values_beyond_the_dtype_of_the_config_are_kept_or_refused(tmp_path):
    folder = stored_as(tmp_path / "source", "float32", "float16")
    edit_weights(folder, lambda t: t[UP].__setitem__((5, 3), 1e6))
    model = load_pruned(str(folder), ratio=1, dtype="float32")
    assert model.get_parameter(UP).max() == 1e6
    for asked in ({"ratio": 1}, {}):
        with pytest.raises(ValueError, match=rf"{UP} holds 1 .*dtype=float32"):
            load_pruned(str(folder), **asked)


def wide_mlps(folder):
    """One up projection in bfloat16, all else of the MLPs in float32, and what is outside in bfloat16."""
    stored_as(folder, "float32", "bfloat16")

    def narrow_the_rest(tensors):
        for name in tensors.keys():
            if ".mlp." not in name or name == UP:
                tensors[name] = tensors[name].to(torch.bfloat16)

    edit_weights(folder, narrow_the_rest)
    return folder


@pytest.mark.parametrize(
    "make", [mixed, wide_mlps, lambda f: stored_as(f, "float32", "bfloat16")]
)
@pytest.mark.parametrize(
    "asked",
    [{"ratio": 1}, {"recipe": "best", "ratio": 1, "calibration_samples": 8}],
)
def test_an_export_is_stored_as_its_source_is(make, asked, tmp_path):
    """So that it is the same model however it is opened."""
    folder, out = make(tmp_path / "source"), tmp_path / "out"
    export_pruned(str(folder), out, prune_arguments=asked)
    stored, source = load_file(out / WEIGHTS), load_file(folder / WEIGHTS)
    assert {n: t.dtype for n, t in stored.items()} == {
        n: source[n].dtype for n in stored
    }
    for dtype in DTYPES:
        model = load_pruned(str(folder), dtype=dtype, **asked)
        stock = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
        assert_state(stock, model.state_dict())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    # What vLLM is handed.
    checkpoint = request_of(folder, **asked)
    whole = stored_model(checkpoint)
    carry_out(whole, checkpoint.cut)
    checkpoint.as_stored(whole.model)
    tensors = dict(tensors_of(whole.model))
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)


def test_text_decides_alike_for_every_dtype(tmp_path):
    text = write_texts(tmp_path / "text.jsonl")
    folder = mixed(tmp_path / "source")
    asked = {"ratio": 1, "criterion": "act", "calibration": text}
    digests = {
        load_pruned(str(folder), dtype=dtype, **asked).prune_record.digest
        for dtype in DTYPES
    }
    assert len(digests) == 1


def test_shapes_that_may_differ_are_not_taken_from_the_file(tmp_path):
    folder = stored_as(tmp_path, "bfloat16", "bfloat16")
    edit_weights(folder, lambda t: t.update({HEAD: t[HEAD].float() + 1e-5}))
    edit_config(folder, vocab_size=300)
    asked = {"ratio": 1, "dtype": "float32", "ignore_mismatched_sizes": True}
    assert load_pruned(str(folder), **asked).lm_head.weight.shape == (300, 32)
