"""What cannot be pruned is refused in one sentence, before a weight is read or changed.

More mistakes, with the whole sentence about each, are in `tests/golden/loading.py`.
"""

from __future__ import annotations

import contextlib

import pytest
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers.checkpoints import auto_class, save_tiny, tiny_config
from tests.helpers.layouts import overrides, save_family
from tests.helpers.ways_to_load import forbid_reading, request_of, write_texts


NO_NUMBER = ("wide", float("nan"), float("inf"), True, "1e9999", "1e-9999", "1/0", "")
NO_LAYERS = ("", "a", "1-", -1, "2-1", "1.5", True, "0-999999", "1--2", [], "0000001")
ACT = {"criterion": "act", "calibration": "a"}
BY_LOSS = {"allocation": "sensitivity"}
#: Arguments for a model of 5 layers of 88 neurons, whose hidden size is 32, and a telling word.
ARGUMENTS = [
    *(({"ratio": each}, f"ratio={each} is not a finite") for each in NO_NUMBER),
    ({"ratio": 2.7501}, r"88/32: pass at most 2\.75,"),
    ({"ratio": "1e999"}, "above the model's own"),
    ({"prune_percent": "nan"}, "prune_percent=nan is not a finite"),
    ({"ratio": 2, "multiple_of": 1.5}, "multiple_of=.*1 or m"),
    ({"ratio": 2, "seed": "x"}, "seed=x is not a finite"),
    ({"seed": 2**43}, "seed=8796093022208 is too large"),
    *(({"ratio": 1, "layers": n}, "layers=.* does not name layers") for n in NO_LAYERS),
    ({"ratio": 1, "skip_layers": ""}, "skip_layers=.* does not name"),
    ({"ratio": 1, "layers": "0-99999"}, "names layer 5, .* 0-4"),
    ({"widths": {0: 0}}, "gives layer 0 0 neurons, but it has 88"),
    ({"widths": {0: 20, 2: 7}, "multiple_of": 8}, "multiple_of=8 .* width 7"),
    ({"widths": {0: 20}, "ratio": 1}, "ratio=1 and widths=0:20"),
    ({"widths": {0: 20}, **BY_LOSS}, "widths=0:20 and allocation=sensitivity"),
    ({"widths": 3}, "widths=3 cannot be read"),
    ({"ratio": 2, "allocation": "global"}, "pass one of uniform, sensitivity"),
    ({"ratio": 2, "calibration_samples": 1}, "calibration_samples=1 .* criterion=maw"),
    ({"ratio": 2, "recipe": "worst"}, "recipe=worst is unknown"),
    ({"ratio": 2, "repair": "nails"}, "repair=nails is unknown"),
    ({"ratio": 2, **ACT, "calibration_samples": 0}, "ation_samples=0 is not a whole"),
    ({"layers": "0"}, "layers=0 has no effect without ratio or"),
    ({"multiple_of": 8}, "multiple_of=8 has no effect without"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("llama"), num_hidden_layers=5))


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("asked", "word"), ARGUMENTS)
def test_arguments(asked, word, folder, model, monkeypatch):
    forbid_reading(monkeypatch)
    for attempt in (
        lambda: load_pruned(folder, **asked),
        lambda: prune_model(model, **asked),
    ):
        with pytest.raises(ValueError, match=word) as refused:
            attempt()
        said = str(refused.value)
        assert "\n" not in said and said.count(". ") == 0
    assert len(model.model.layers) == 5
    assert model.model.layers[0].mlp.gate_proj.out_features == 88


QUANTISED = {"quantization_config": {"quant_method": "torchao"}}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (QUANTISED | {"load_in_8bit": True}, "load_in_8bit and quantization_config"),
        ({"quantization_config": {"quant_method": "shrink"}}, "shrink"),
        ({"quantization_config": {"bits": 8}}, "quant_method"),
        ({"device": "cpu", "device_map": "auto"}, "device=cpu and device_map=auto"),
        ({"trust_remote_code": "off"}, "trust_remote_code='off' is not"),
        ({"trust_remote_code": "false"}, "trust_remote_code='false' is not"),
    ],
)
def test_arguments_of_from_pretrained(arguments, word, folder, monkeypatch):
    forbid_reading(monkeypatch)
    with pytest.raises(ValueError, match=word):
        load_pruned(folder, ratio=2, **arguments)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"", "holds 0 texts, but 3"),
        (b"\n  \n", "holds 0 texts"),
        (b'{"text": "a"}', "holds 1 texts, but 3 .*smaller calibration_samples"),
        (b'{"text": "a"}\n{"text": ', "line 2 is not a JSON object"),
        *(
            (line, "line 1 is not a JSON object")
            for line in (b'{"text": ""}', b'{"prompt": "a"}', b'["a"]')
            + (b'{"messages": []}', b'{"messages": ["a"]}')
        ),
    ],
)
def test_files_of_text(folder, tmp_path, monkeypatch, content, word):
    file = tmp_path / "texts.jsonl"
    if content is not None:
        file.write_bytes(content)
    forbid_reading(monkeypatch)
    asked = {"ratio": 2, "criterion": "act", "calibration": str(file)}
    with pytest.raises(ValueError, match=word):
        load_pruned(folder, **asked, calibration_samples=3)


MIXED = "1 dense MLP in layer 0 and 3 experts.* in layer 1.*: name layers"


@pytest.mark.parametrize(
    ("family", "asked", "word"),
    [
        ("mixtral", ACT, "stacked with others"),
        ("t5", ACT, "encoder"),
        ("t5", BY_LOSS, "encoder"),
        *((each, BY_LOSS, MIXED) for each in ("qwen3_moe", "deepseek_v3")),
        ("llama4_text", BY_LOSS, MIXED),
    ],
)
def test_models_that_text_says_nothing_of(family, asked, word, tmp_path, monkeypatch):
    whole = save_family(tmp_path, family, 24)
    forbid_reading(monkeypatch)
    text = write_texts(tmp_path / "texts.jsonl")
    more = {"calibration": text, "auto_class": auto_class(whole.config)}
    with pytest.raises(UnsupportedModelError, match=word):
        load_pruned(str(tmp_path), prune_percent=40, **asked | more)


REPAIRED = {"prune_percent": 40, "repair": "least_squares"}
RECURRENT = {"lru_width": 32, "num_key_value_heads": 1, "intermediate_size": 1}
DOGE = {"num_hidden_layers": 2, "num_key_value_heads": 4, "is_moe": True}


@pytest.mark.parametrize(
    ("family", "options", "asked", "word"),
    [
        ("t5", overrides("t5", 12), REPAIRED, r"one list of .* pass recipe=fast\.$"),
        ("recurrent_gemma", RECURRENT, {"ratio": 1}, "no key of its config sets"),
        ("hrm_text", {}, {"ratio": 1, "recipe": "best"}, r"^Hrm.* pass recipe=fast\.$"),
        ("doge", DOGE, {"ratio": 1}, r"down_embed.* inside its MLP"),
        ("gpt2", {}, {"ratio": 1}, "GPT2LMHeadModel .*gpt2.* has no GLU-MLP"),
    ],
)
def test_models_that_a_config_rules_out(family, options, asked, word, tmp_path):
    config = tiny_config(family, **{"num_hidden_layers": 4, **options})
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=word):
        load_pruned(str(tmp_path), auto_class=auto_class(config), **asked)


def test_text_without_a_tokenizer(tmp_path, model):
    asked = {"criterion": "act", "calibration": write_texts(tmp_path / "t.jsonl")}
    with pytest.raises(ValueError, match="no tokenizer"):
        prune_model(model, ratio=2, **asked)


#: Whether four processes share it.
SHARED = [
    ({"intermediate_size": 64}, ""),
    ({"intermediate_size": 63}, "63 gives model.layers.0.mlp 63 .*le_of=4,"),
    ({"intermediate_size": 54, "multiple_of": 6}, "54 neurons.*le_of=12,"),
    ({"prune_percent": 40, "layers": "1"}, "model.layers.1.mlp 53 neurons"),
    ({"widths": {1: 27}}, "model.layers.1.mlp 27 neurons"),
    # What an allocation finds is not known yet; the mean is.
    ({"intermediate_size": 52, **BY_LOSS}, "multiple_of=4,"),
    ({"intermediate_size": 54, **BY_LOSS, "multiple_of": 4}, ""),
]


@pytest.mark.parametrize(("asked", "word"), SHARED)
def test_what_processes_cannot_share(asked, word, folder):
    refused = contextlib.nullcontext()
    if word:
        refused = pytest.raises(ValueError, match=word)
    with refused:
        request_of(folder, **asked).check_divides(4, "tp_plan")
