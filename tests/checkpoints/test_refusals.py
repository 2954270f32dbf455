"""What cannot be pruned is refused in one sentence, before a weight is read or changed."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers.checkpoints import auto_class, save_tiny, tiny_config, tiny_model
from tests.helpers.layouts import overrides, save_family
from tests.helpers.ways_to_load import forbid_reading, write_texts


NO_NUMBER = ("wide", float("nan"), float("inf"), True, "1e9999", "1e-9999", "1/0", "")
NO_LAYERS = ("", "a", "1-", -1, "2-1", "1.5", True, "0-999999", "1--2", [], "0000001")
INFLUENCE = {"drop_by": "block_influence"}
DROP = {"drop_layers": 1}
#: Arguments for a model of 5 layers of 88 neurons, whose hidden size is 32, and a telling word.
ARGUMENTS = [
    ({"ratio": 2, "prune_percent": 40}, "ratio=2 and prune_percent=40"),
    ({"ratio": 2, "intermediate_size": 4}, "ratio=2 and intermediate_size=4"),
    *(({"ratio": each}, f"ratio={each} is not a finite") for each in NO_NUMBER),
    ({"ratio": 0}, r"ratio=0 keeps no neuron.* at most 2\.75,"),
    ({"ratio": -1.5}, "keeps no neuron"),
    ({"ratio": 2.7501}, r"88/32: pass at most 2\.75,"),
    ({"ratio": "1e999"}, "above the model's own"),
    *(({"prune_percent": n}, rf"{n} is outside \[0, 10") for n in (100, 100.5, -1)),
    ({"prune_percent": "nan"}, "prune_percent=nan is not a finite"),
    *(({"intermediate_size": n}, f"{n} is not a .* 1 to 88") for n in (0, 89, 12.5)),
    *(({"ratio": 2, "multiple_of": n}, "multiple_of=.*1 or m") for n in (0, 1.5)),
    ({"ratio": 2, "multiple_of": "x"}, "multiple_of=x is not a finite"),
    ({"intermediate_size": 10, "multiple_of": 16}, "multiple_of=16 .* at most 10"),
    ({"multiple_of": 64}, "multiple_of=64 .* none was asked for"),
    ({"ratio": 2, "criterion": "magic"}, "criterion=magic .*maw.*random.*ppm"),
    ({"ratio": 2, "seed": "x"}, "seed=x is not a finite"),
    ({"seed": -1}, "seed=-1 .* 0 or more"),
    ({"seed": 2**43}, "seed=8796093022208 is too large"),
    *(({"ratio": 1, "layers": n}, "layers=.* is no list of") for n in NO_LAYERS),
    *(({"ratio": 1, "skip_layers": n}, "skip_layers=.* is no l") for n in ("x", "")),
    ({"ratio": 1, "layers": "0-99999"}, "names layer 5, .* 0-4"),
    ({"ratio": 1, "layers": "0,7,6"}, "names layer 6"),
    ({"ratio": 1, "skip_layers": "0-4"}, "skip_layers=0-4 leaves no layer"),
    ({"ratio": 1, "layers": 0, "skip_layers": 1}, "layers=0 and skip_layers=1"),
    ({"layers": 0}, "^layers says .* no size"),
    ({"skip_layers": 0}, "^skip_layers says .* no size"),
    # Widths by layer.
    ({"widths": {5: 1}}, "names layer 5, but"),
    ({"widths": {0: 0}}, "gives layer 0 0 neurons, but it has 88"),
    ({"widths": {0: 89}}, "gives layer 0 89 neurons, but it has 88"),
    ({"widths": {0: 20, 2: 7}, "multiple_of": 8}, "multiple_of=8 .* width 7"),
    ({"widths": {0: 20}, "layers": 0}, "layers=0 and widths=0:20"),
    ({"widths": {0: 20}, "skip_layers": 1}, "skip_layers=1 and widths=0:20"),
    ({"widths": {0: 20}, "ratio": 1}, "ratio=1 and widths=0:20"),
    ({"widths": {0: 20}, "allocation": "global"}, "allocation=global and widths"),
    ({"widths": 3}, "widths=3 cannot be read"),
    ({"widths": "none.json"}, "widths=none.json cannot be read"),
    # Allocation and the choice of criteria.
    ({"allocation": "global"}, "allocation=global shares .* no size"),
    ({"ratio": 2, "allocation": "fair"}, "allocation=fair is unknown"),
    (
        {"ratio": 2, "criterion": "best", "allocation": "global", "calibration": "a"},
        "criterion=best and allocation=global",
    ),
    ({"ratio": 2, "criteria_tried": "maw+act"}, r"criteria_tried=maw\+act names"),
    (
        {"ratio": 2, "criterion": "best", "criteria_tried": "+", "calibration": "a"},
        r"criteria_tried=\+ names no criterion",
    ),
    ({"ratio": 2, "min_width": 8}, "min_width=8 bounds"),
    ({"ratio": 2, "allocation": "global", "min_width": 0}, "min_width=0 is not a"),
    # Text.
    ({"ratio": 2, "calibration": "a"}, "calibration=a .* criterion=maw looks"),
    ({"ratio": 2, "calibration_samples": 1}, "calibration_samples=1 .* criterion=maw"),
    ({"ratio": 2, "recipe": "worst"}, "recipe=worst is unknown"),
    ({"ratio": 2, "repair": "nails"}, "repair=nails is unknown"),
    (
        {"ratio": 2, "criterion": "act", "calibration": "a", "calibration_samples": 0},
        "calibration_samples=0 is not a whole",
    ),
    # Layers to drop.
    ({"drop_layers": 5}, "drop_layers=5 leaves none of the 5"),
    ({"drop_layers": "0-4"}, "drop_layers=0-4 leaves none of the 5"),
    ({"drop_layers": "3+5"}, "names layer 5, .* 0-4"),
    *(({"drop_layers": n}, f"drop_layers={n} is not a whole") for n in (0, -1)),
    *(({"drop_layers": each}, "is no list of layers") for each in ("x", [])),
    (DROP | {"drop_by": "magic"}, "drop_by=magic is no way"),
    (INFLUENCE, "no count was given"),
    ({"drop_layers": "1+2", **INFLUENCE}, "drop_layers names them itself"),
    (DROP | {"calibration": "a.jsonl"}, "looks at weights alone"),
    (DROP | {"widths": {0: 4}}, "drop_layers and widths="),
    (DROP | {"ratio": 1, "allocation": "global"}, "drop_layers and allocation=global"),
    (
        DROP | {"ratio": 1, "criterion": "best", "calibration": "a"},
        "drop_layers and criterion=best",
    ),
    (DROP | {"layers": "0"}, "no size was asked for"),
    (DROP | {"multiple_of": 8}, "rounds a kept width"),
    ({"drop_layers": "1", "ratio": 1, "layers": "0+3"}, "names layer 3, .* 0-2,4"),
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
        (b'{"text": "a"}\n{"text": ', "line 2 is no JSON object"),
        *(
            (line, "line 1 is no JSON object")
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


BEST = {"prune_percent": 40, "criterion": "best"}


@pytest.mark.parametrize(
    ("family", "asked", "word"),
    [
        ("mixtral", {"prune_percent": 40, "criterion": "act"}, "stacked with others"),
        ("mixtral", BEST, r"stacked .*criteria_tried=maw\+l2\.$"),
        ("mixtral", BEST | {"allocation": "sensitivity"}, r"criteria_tried=maw\+l2"),
        ("t5", {"prune_percent": 40, "criterion": "act"}, "encoder"),
        ("t5", BEST | {"criteria_tried": "maw+l2"}, "encoder"),
        ("t5", {"prune_percent": 40, "allocation": "sensitivity"}, "encoder"),
        *(
            (
                family,
                {"prune_percent": 30, "allocation": "sensitivity"},
                "1 dense MLP in layer 0 and 3 experts.* in layer 1.*: name layers",
            )
            for family in ("qwen3_moe", "deepseek_v3", "llama4_text")
        ),
    ],
)
def test_models_that_text_says_nothing_of(family, asked, word, tmp_path, monkeypatch):
    whole = save_family(tmp_path, family, 24)
    forbid_reading(monkeypatch)
    text = write_texts(tmp_path / "texts.jsonl")
    more = {"calibration": text, "auto_class": auto_class(whole.config)}
    with pytest.raises(UnsupportedModelError, match=word):
        load_pruned(str(tmp_path), **asked, **more)


@pytest.mark.parametrize(
    ("family", "options", "dropped", "word"),
    [
        ("gemma3n_text", {"num_kv_shared_layers": 0}, 1, "the number of its layer"),
        ("jamba", {"num_hidden_layers": 8}, 1, r"layers.7.feed_forward depends on the"),
        ("t5", overrides("t5", 12), 1, "it has an encoder"),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "1+3", "every layer"),
    ],
)
def test_layers_that_are_what_they_are_by_their_number(
    family, options, dropped, word, tmp_path
):
    config = tiny_config(family, **{"num_hidden_layers": 4, **options})
    config.save_pretrained(tmp_path)
    asked = {"drop_layers": dropped, "auto_class": auto_class(config)}
    with pytest.raises(UnsupportedModelError, match=word):
        load_pruned(str(tmp_path), **asked)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_models_without_a_glu(family):
    model = tiny_model(tiny_config(family))
    name = f"{type(model).__name__} .*{family}.* has no GLU-MLP"
    with pytest.raises(UnsupportedModelError, match=name):
        prune_model(model, ratio=1)


def test_text_without_a_tokenizer(tmp_path, model):
    asked = {"criterion": "act", "calibration": write_texts(tmp_path / "t.jsonl")}
    with pytest.raises(ValueError, match="no tokenizer"):
        prune_model(model, ratio=2, **asked)


def test_bounds_that_leave_too_much(folder):
    asked = {"ratio": 2, "allocation": "global", "min_width": 65}
    with pytest.raises(ValueError, match=r"^min_width=65 keeps .* at most 64"):
        load_pruned(folder, **asked)
