"""Whole layers left out: on load, in memory, by hand and exported are the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.pruning.arguments import PruneArguments, without_idle
from lm_eval_pruned.pruning.depth import Depth
from lm_eval_pruned.pruning.layouts import UnsupportedModelError
from tests.helpers import by_hand
from tests.helpers.checkpoints import byte_tokenizer, save_tiny, tiny_config
from tests.helpers.layouts import EAGER, breadth, logits, overrides


LAYERS = 5
#: Shorter than the text of `logits`, so that it shows which layers have one.
WINDOW = {"sliding_window": 4}
_MOE = {**overrides("deepseek_v3", 12), "first_k_dense_replace": 2}
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3, **WINDOW},
    "qwen3": {},
    "mistral": WINDOW,
    "phi3": WINDOW,
    "gemma": {},
    "gemma2": WINDOW,
    "gemma3_text": {**WINDOW, "sliding_window_pattern": 2},
    "cohere2": {**WINDOW, "sliding_window_pattern": 3},
    "olmo2": {},
    "glm4": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv", "conv"]},
    "gpt_oss": {**overrides("gpt_oss", 12), **WINDOW, "layer_types": None},
    "qwen3_moe": {**overrides("qwen3_moe", 12), "mlp_only_layers": [0, 3]},
    "llama4_text": {**overrides("llama4_text", 12), "moe_layers": [1, 3]},
    "deepseek_v3": _MOE,
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_chunk_size": 8,
    },
}
#: Without and with windows by layer, without attention in some, with experts in all or some.
EACH = breadth(FAMILIES, "llama", "gemma3_text", "lfm2", "gpt_oss", "deepseek_v3")
dropped_layers = st.sets(st.integers(0, LAYERS - 1), min_size=1, max_size=LAYERS - 1)


def save(folder: Path, family: str, seed: int = 0) -> str:
    options = {**FAMILIES[family], "num_hidden_layers": LAYERS}
    return str(save_tiny(folder, family, seed=seed, **options))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a folder with the checkpoint of a family, made once."""
    made = {}

    def of(family: str = "llama") -> str:
        if family not in made:
            made[family] = save(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of


@pytest.fixture
def texts(tmp_path) -> str:
    file = tmp_path / "text.jsonl"
    lines = (
        "The quick brown fox jumps over the lazy dog.",
        "No layer is like another.",
    )
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(file)


def keeps_attention(folder: str, dropped) -> bool:
    """Return whether a model whose layers are of several kinds keeps one that attends."""
    config = json.loads((Path(folder) / "config.json").read_text())
    kinds = config.get("layer_types") or ["full_attention"] * LAYERS
    return any(
        "attention" in kind and "linear" not in kind
        for number, kind in enumerate(kinds)
        if number not in dropped
    )


def test_a_model_without_attention_is_refused(checkpoint):
    folder = checkpoint("lfm2")
    kinds = json.loads((Path(folder) / "config.json").read_text())["layer_types"]
    attending = [n for n, kind in enumerate(kinds) if kind == "full_attention"]
    sentence = r"drops every layer with attention of a lfm2 model"
    with pytest.raises(UnsupportedModelError, match=sentence):
        load_pruned(folder, drop_layers=attending)


def passed_over(folder: str, dropped):
    """Return the whole model with layers that hand on what they are given."""
    model = AutoModelForCausalLM.from_pretrained(folder, **EAGER)
    wraps = model.config.model_type == "falcon_h1"
    for number in dropped:
        model.model.layers[number].forward = lambda hidden_states, *_, **__: (
            (hidden_states,) if wraps else hidden_states
        )
    return model


def without(folder: str, dropped):
    """Return the model with an nn.ModuleList that lacks layers."""
    model = AutoModelForCausalLM.from_pretrained(folder, **EAGER)
    kept = [n for n in range(LAYERS) if n not in dropped]
    model.model.layers = nn.ModuleList(model.model.layers[n] for n in kept)
    for number, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    model.config.num_hidden_layers = len(kept)
    if vars(model.config).get("layer_types"):
        model.config.layer_types = [model.config.layer_types[n] for n in kept]
    return model


def assert_same(model, expected):
    own, state = model.state_dict(), expected.state_dict()
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(own[name], tensor), name


def answer(model, **options):
    return model.generate(
        torch.arange(40, 51).view(1, 11),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", EACH)
@settings(max_examples=settings.default.max_examples // 10)
@given(dropped=dropped_layers)
def test_on_load_in_memory_and_by_hand_are_one_model(
    family, dropped, checkpoint, tmp_path_factory
):
    folder, asked = checkpoint(family), sorted(dropped)
    assume(keeps_attention(folder, dropped))
    expected = without(folder, dropped)

    loaded = load_pruned(folder, drop_layers=asked, **EAGER)
    in_memory = prune_model(
        AutoModelForCausalLM.from_pretrained(folder, **EAGER), drop_layers=asked
    )

    for model in (loaded, in_memory):
        assert_same(model, expected)
        assert torch.equal(logits(model), logits(expected))
    torch.testing.assert_close(logits(loaded), logits(passed_over(folder, dropped)))
    assert loaded.prune_record.as_dict() == in_memory.prune_record.as_dict()
    assert loaded.config.to_dict() == in_memory.config.to_dict()
    count = sum(p.numel() for p in expected.parameters())
    assert loaded.prune_record.parameters_after == count
    whole = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.prune_record.parameters_before == whole.num_parameters()

    saved = tmp_path_factory.mktemp("saved")
    loaded.save_pretrained(saved)
    again = AutoModelForCausalLM.from_pretrained(saved, **EAGER)
    assert torch.equal(logits(again), logits(loaded))


@pytest.mark.parametrize("family", FAMILIES)
def test_generating_with_a_cache_is_generating_without(family, checkpoint):
    folder = checkpoint(family)
    models = [
        load_pruned(folder, drop_layers="0+2", **EAGER),
        prune_model(
            AutoModelForCausalLM.from_pretrained(folder, **EAGER), drop_layers="0+2"
        ),
    ]
    first, *others = [
        answer(model, use_cache=cached) for model in models for cached in (True, False)
    ]
    assert first.shape == (1, 19)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("family", EACH)
@settings(max_examples=settings.default.max_examples // 20)
@given(dropped=dropped_layers, percent=st.sampled_from([None, 40]))
def test_an_export_opens_in_stock_transformers(
    family, dropped, percent, checkpoint, tmp_path_factory
):
    folder = checkpoint(family)
    assume(keeps_attention(folder, dropped))
    options = {"drop_layers": sorted(dropped), "prune_percent": percent}
    output = tmp_path_factory.mktemp("exported") / "model"
    export = export_pruned(folder, output, prune_arguments=options)
    loaded = load_pruned(folder, **options, **EAGER)
    opened = AutoModelForCausalLM.from_pretrained(output, **EAGER)

    assert_same(opened, loaded)
    assert torch.equal(logits(opened), logits(loaded))
    assert torch.equal(answer(opened), answer(loaded))
    assert export.record.as_dict() == loaded.prune_record.as_dict()
    assert opened.config.num_hidden_layers == LAYERS - len(dropped)
    before = json.loads((Path(folder) / "config.json").read_text())
    after = json.loads((output / "config.json").read_text())
    changed = {name for name in before if before[name] != after.get(name)}
    lists = {name for name in changed if isinstance(before[name], list)}
    assert changed - lists <= {
        "num_hidden_layers",
        "first_k_dense_replace",
        *(["intermediate_size"] if percent else []),
        *(["moe_intermediate_size", "intermediate_size_mlp"] if percent else []),
        *(["block_auto_adjust_ff_dim"] if percent else []),
    }
    card = (output / "README.md").read_text()
    assert f"{LAYERS - len(dropped)} of {LAYERS} layers" in card


@settings(max_examples=settings.default.max_examples // 5)
@given(dropped=dropped_layers, percent=st.integers(1, 90), data=st.data())
def test_the_layers_that_stay_are_narrowed_as_ever(dropped, percent, data, checkpoint):
    folder = checkpoint()
    kept = [n for n in range(LAYERS) if n not in dropped]
    chosen = data.draw(st.none() | st.sets(st.sampled_from(kept), min_size=1))
    name = data.draw(st.sampled_from(["layers", "skip_layers"]))
    asked = {} if chosen is None else {"layers": sorted(chosen)}
    if chosen is not None and name == "skip_layers" and chosen != set(kept):
        asked = {"skip_layers": [n for n in kept if n not in chosen]}
    expected = without(folder, dropped)
    narrow = range(len(kept)) if chosen is None else [kept.index(n) for n in chosen]
    width = 88 - percent * 88 // 100
    paths = {f"model.layers.{number}.mlp" for number in narrow}
    rule = by_hand.best(lambda path, own: width if path in paths else own)
    state, _ = by_hand.sliced(expected, rule)

    loaded = load_pruned(
        folder, drop_layers=sorted(dropped), prune_percent=percent, **asked
    )
    in_memory = prune_model(
        AutoModelForCausalLM.from_pretrained(folder),
        drop_layers=sorted(dropped),
        prune_percent=percent,
        **asked,
    )
    for model in (loaded, in_memory):
        own = model.state_dict()
        assert own.keys() == state.keys()
        assert all(torch.equal(own[key], state[key]) for key in state)
    assert loaded.prune_record.as_dict() == in_memory.prune_record.as_dict()
    assert loaded.config.to_dict() == in_memory.config.to_dict()


@pytest.mark.parametrize(
    ("asked", "dropped"),
    [
        (1, [3]),
        ("2", [2, 3]),
        (4, [0, 1, 2, 3]),
        ("[3]", [3]),
        ([3], [3]),
        ((0, 2), [0, 2]),
        ("0+2-3", [0, 2, 3]),
        ("4-4", [4]),
    ],
)
def test_counts_and_lists_of_layers(asked, dropped, checkpoint):
    model = load_pruned(checkpoint(), drop_layers=asked)
    assert list(model.prune_record.plan.depth.dropped) == dropped
    assert_same(model, without(checkpoint(), dropped))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"drop_layers": 5}, "drop_layers=5 leaves none of the 5 layers"),
        ({"drop_layers": "0-4"}, "drop_layers=0-4 leaves none of the 5 layers"),
        (
            {"drop_layers": "3+5"},
            r"names layer 5, but the layers of this model are 0-4",
        ),
        ({"drop_layers": 0}, "drop_layers=0 is not a whole number of 1 or more"),
        ({"drop_layers": -1}, "drop_layers=-1 is not a whole number"),
        ({"drop_layers": "x"}, "drop_layers=x is no list of layers"),
        ({"drop_layers": []}, "is no list of layers"),
        ({"drop_layers": 1, "drop_by": "magic"}, "drop_by=magic is no way to choose"),
        ({"drop_by": "block_influence"}, "no count was given"),
        (
            {"drop_layers": "1+2", "drop_by": "block_influence"},
            "drop_layers names them itself",
        ),
        (
            {"drop_layers": 1, "drop_by": "block_influence"},
            "compares hidden states, so it needs text",
        ),
        ({"drop_layers": 1, "calibration": "a.jsonl"}, "looks at weights alone"),
        ({"drop_layers": 1, "widths": {0: 4}}, "drop_layers and widths="),
        (
            {"drop_layers": 1, "ratio": 1, "allocation": "global"},
            "drop_layers and allocation=global",
        ),
        (
            {"drop_layers": 1, "ratio": 1, "criterion": "best", "calibration": "a"},
            "drop_layers and criterion=best",
        ),
        ({"drop_layers": 1, "layers": "0"}, "no size was asked for"),
        ({"drop_layers": 1, "multiple_of": 8}, "rounds a kept width"),
        (
            {"drop_layers": "1", "ratio": 1, "layers": "0+3"},
            "layers=0[+]3 names layer 3, but the GLU-MLPs of this model are in the layers 0-2,4",
        ),
    ],
)
def test_what_cannot_be_dropped_is_refused_in_one_sentence(asked, message, checkpoint):
    folder = checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    for attempt in (
        lambda: load_pruned(folder, **asked),
        lambda: prune_model(model, **asked),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            attempt()
        assert str(refused.value).count(". ") == 0
    assert len(model.model.layers) == LAYERS


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "gemma3n_text",
            {"num_kv_shared_layers": 0},
            "depends on the number of its layer",
        ),
        (
            "jamba",
            {"num_hidden_layers": 8},
            "because model.layers.7.feed_forward depends on the number of its layer",
        ),
        ("t5", overrides("t5", 12), "it has an encoder"),
    ],
)
def test_layers_that_are_what_they_are_by_their_number_are_refused(
    family, options, message, tmp_path
):
    config = tiny_config(family, **{"num_hidden_layers": 4, **options})
    config.save_pretrained(tmp_path)
    from lm_eval_pruned.checkpoints.configs import auto_class_for

    with pytest.raises(UnsupportedModelError, match=message):
        load_pruned(str(tmp_path), drop_layers=1, auto_class=auto_class_for(config))


def test_an_error_leaves_the_model_whole(checkpoint):
    folder = checkpoint("gemma2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers, config = model.model.layers, model.config.to_dict()
    with torch.no_grad():
        layers[4].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        prune_model(model, drop_layers="1+2", prune_percent=40)
    assert model.model.layers is layers
    assert model.config.to_dict() == config
    numbers = [layer.self_attn.layer_idx for layer in layers]
    assert numbers == list(range(LAYERS))


def test_the_record_and_the_digest_know_the_layers(checkpoint):
    record = load_pruned(checkpoint(), drop_layers="1-2").prune_record
    assert (
        record.as_dict()
        | {
            "asked": {"drop_layers": "[1-2]"},
            "layers": 3,
            "layers_before": 5,
            "layers_dropped": "1-2",
            "layers_kept": "0,3-4",
            "criterion": None,
        }
        == record.as_dict()
    )
    kept = torch.tensor([0, 3, 4]).numpy().astype("<i8").tobytes()
    assert record.digest == hashlib.sha256(b"layers" + kept).hexdigest()
    assert "layers dropped 1-2" in record.as_table()

    both = load_pruned(checkpoint(), drop_layers="1-2", ratio=1).prune_record
    digest = hashlib.sha256(b"layers" + kept)
    for neurons in both.kept:
        digest.update(neurons.numpy().astype("<i8").tobytes())
    assert both.digest == digest.hexdigest()
    assert both.as_dict()["asked"] == {"ratio": "1", "drop_layers": "[1-2]"}


def influence_by_hand(folder: str, texts: str) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    similar = [[] for _ in range(LAYERS)]
    states = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, given, returned: states.append((given[0], returned))
        )
    for line in Path(texts).read_text().splitlines():
        states.clear()
        tokens = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids
        with torch.no_grad():
            model(input_ids=tokens)
        for layer, (before, after) in enumerate(states):
            for x, y in zip(before[0].double(), after[0].double(), strict=True):
                similar[layer].append(float(x @ y / (x.norm() * y.norm())))
    return [1 - sum(each) / len(each) for each in similar]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_block_influence_is_its_formula(count, checkpoint, texts):
    folder = checkpoint()
    expected = influence_by_hand(folder, texts)
    least = sorted(range(LAYERS), key=lambda n: expected[n])[:count]
    options = {"drop_layers": count, "drop_by": "block_influence", "calibration": texts}

    loaded = load_pruned(folder, **options)
    in_memory = prune_model(
        AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        **options,
    )
    for model in (loaded, in_memory):
        depth = model.prune_record.plan.depth
        assert list(depth.dropped) == sorted(least)
        assert depth.influence == pytest.approx(expected, abs=1e-5)
        assert depth.measured_on["texts"] == 2
        assert_same(model, without(folder, least))
    assert loaded.prune_record.digest == in_memory.prune_record.digest
    record = loaded.prune_record.as_dict()
    assert record["asked"]["drop_by"] == "block_influence"
    assert json.loads(json.dumps(record))["block_influence"].keys() == set("01234")


def test_of_layers_alike_the_later_goes():
    arguments = PruneArguments(
        drop_layers=2, drop_by="block_influence", calibration="a.jsonl"
    )
    assert Depth.of(arguments, 4, [0.1, 0.2, 0.1, 0.1]).dropped == (2, 3)


@pytest.mark.parametrize("criterion", ["maw", "act"])
def test_text_chooses_layers_and_neurons(criterion, checkpoint, texts, tmp_path):
    folder = checkpoint()
    options = {
        "drop_layers": 2,
        "drop_by": "block_influence",
        "calibration": texts,
        "criterion": criterion,
        "prune_percent": 40,
    }
    loaded = load_pruned(folder, **options)
    in_memory = prune_model(
        AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=byte_tokenizer(),
        **options,
    )
    export = export_pruned(folder, tmp_path / "out", prune_arguments=options)
    digest = loaded.prune_record.digest
    assert in_memory.prune_record.digest == export.record.digest == digest
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(opened), logits(loaded))


@pytest.mark.parametrize("named", ["layers", "skip_layers"])
def test_layers_may_name_some_that_text_drops(named, checkpoint, texts):
    folder = checkpoint()
    options = {"drop_layers": 2, "drop_by": "block_influence", "calibration": texts}
    gone = load_pruned(folder, **options).prune_record.plan.depth.dropped
    stay = [layer for layer in range(LAYERS) if layer not in gone]
    listed = {"layers": [*gone, *stay[:2]], "skip_layers": [gone[0], stay[2]]}[named]
    expected = prune_model(without(folder, gone), prune_percent=40, layers="0-1")
    options |= {"prune_percent": 40, named: listed}
    in_memory = prune_model(
        AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=byte_tokenizer(),
        **options,
    )
    for model in (load_pruned(folder, **options), in_memory):
        assert model.prune_record.plan.layers == tuple(stay[:2])
        assert_same(model, expected)


def test_a_pruned_model_loses_layers_once_more(checkpoint, tmp_path):
    """Layers of an odd width, which the config describes by their number, keep it."""
    first = load_pruned(checkpoint(), layers="1+3", prune_percent=50)
    first.save_pretrained(tmp_path)
    again = load_pruned(str(tmp_path), drop_layers="0+1")
    assert [layer.mlp.gate_proj.out_features for layer in again.model.layers] == [
        88,
        44,
        88,
    ]
    in_memory = prune_model(first, drop_layers="0+1")
    assert_same(again, in_memory)
    written = again.config.to_dict()["per_layer_config"]
    assert written == in_memory.config.to_dict()["per_layer_config"]


def test_the_harness_s_pieces_of_lists_find_their_argument():
    taken = PruneArguments.taken_from
    given = {"drop_layers": 3, "7": "", "ratio": 2, "skip_layers": 0, "15": "", "a": 1}
    arguments = taken(given)
    assert arguments.drop_layers == (3, 7)
    assert arguments.skip_layers == [0, "15"]
    assert given == {"a": 1}
    assert taken({"drop_layers": 3}).drop_layers == 3


def test_what_is_idle_beside_layers():
    given = {
        "drop_layers": 2,
        "drop_by": "block_influence",
        "calibration": "a",
        "criterion": "act",
        "multiple_of": 8,
    }
    told = {n: given[n] for n in ("drop_layers", "drop_by", "calibration")}
    assert without_idle(given) == told
    assert without_idle({**given, "drop_layers": None}) == {"drop_layers": None}
    assert without_idle({**given, "drop_by": "last"}) == {
        "drop_layers": 2,
        "drop_by": "last",
    }
