"""Whole layers left out: by every way to load they are the model that never had them."""

from __future__ import annotations

import functools
import hashlib
import json

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from transformers import AutoTokenizer

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.depth import Depth
from tests.helpers.checkpoints import byte_tokenizer, save_tiny
from tests.helpers.layouts import EAGER, breadth, logits, overrides
from tests.helpers.ways_to_load import (
    TEXTS,
    WAYS,
    Source,
    assert_one_model,
    assert_same_model,
    assert_state,
    write_texts,
)


LAYERS = 5
#: Shorter than the text of `logits`, so that it shows which layers have one.
WINDOW = {"sliding_window": 4}
_MAMBA = ("mamba_d_ssm", "mamba_n_heads", "mamba_d_head", "mamba_chunk_size")
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
    "deepseek_v3": {**overrides("deepseek_v3", 12), "first_k_dense_replace": 2},
    "falcon_h1": dict(zip(_MAMBA, (32, 4, 8, 8), strict=True)),
}
#: Without and with windows by layer, without attention in some, with experts in all or some.
EACH = breadth(FAMILIES, "llama", "gpt_oss")
dropped_layers = st.sets(st.integers(0, LAYERS - 1), min_size=1, max_size=LAYERS - 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the checkpoint of a family, made once."""

    @functools.cache
    def of(family: str = "llama") -> Source:
        options = {**FAMILIES[family], "num_hidden_layers": LAYERS}
        return Source(save_tiny(tmp_path_factory.mktemp(family), family, **options))

    return of


@pytest.fixture
def influence(tmp_path):
    """Arguments that have text choose the layers."""
    text = write_texts(tmp_path / "text.jsonl")
    return {"drop_by": "block_influence", "calibration": text}


GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def keeps_attention(source, dropped) -> bool:
    """Return whether a model whose layers are of several kinds keeps one that attends."""
    kinds = config_of(source.folder).get("layer_types") or ["attention"] * LAYERS
    stay = [kind for number, kind in enumerate(kinds) if number not in dropped]
    return any("attention" in kind and "linear" not in kind for kind in stay)


def without(model, dropped):
    """Take layers out of the nn.ModuleList of a model, by hand."""
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


@pytest.mark.parametrize("family", EACH)
@settings(max_examples=settings.default.max_examples // 10)
@given(dropped=dropped_layers)
def test_every_way_gives_the_model_without_the_layers(
    family, dropped, made, tmp_path_factory
):
    source, asked = made(family), {"drop_layers": sorted(dropped)}
    assume(keeps_attention(source, dropped))
    expected, folder = without(source.whole(), dropped), tmp_path_factory.mktemp("ways")
    ways = ("one file", "in memory", "saved", "exported")
    record = assert_one_model(source, asked, expected.state_dict(), folder, ways)
    assert record.parameters_after == sum(p.numel() for p in expected.parameters())
    assert record.parameters_before == source.whole().num_parameters()
    loaded, in_memory = (WAYS[way](source, asked, None)[0] for way in ways[:2])
    assert loaded.config.to_dict() == in_memory.config.to_dict()
    for model in (loaded, in_memory, source.whole(folder / "exported")):
        assert torch.equal(logits(model), logits(expected))
    # The whole model computes the same where these layers hand on what they are given.
    whole = source.whole()
    for number in dropped:
        whole.model.layers[number].forward = lambda hidden_states, *_, **__: (
            (hidden_states,) if family == "falcon_h1" else hidden_states
        )
    torch.testing.assert_close(logits(loaded), logits(whole))
    first, *others = (
        model.generate(torch.arange(40, 51)[None], use_cache=cached, **GREEDY)
        for model in (loaded, in_memory)
        for cached in (True, False)
    )
    assert all(torch.equal(first, other) for other in others)
    before, after = config_of(source.folder), config_of(folder / "exported")
    changed = {name for name in before if before[name] != after.get(name)}
    lists = {name for name in changed if isinstance(before[name], list)}
    assert changed - lists <= {"num_hidden_layers", "first_k_dense_replace"}


def test_settings_of_single_layers_move_with_their_layers(tmp_path):
    """Gemma 4 has heads of another size where it attends to all tokens."""
    kinds = ["sliding_attention", "full_attention"] * 2 + ["full_attention"]
    more = {
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "layer_types": kinds,
    }
    options = {**WINDOW, **more, "num_hidden_layers": LAYERS}
    source = Source(save_tiny(tmp_path, "gemma4_text", **options))
    whole, pruned = source.whole(), load_pruned(str(tmp_path), drop_layers=[0])
    whole.model.layers[0].forward = lambda hidden_states, *_, **__: hidden_states
    assert torch.equal(logits(pruned), logits(whole))
    overrides = {"0": {"head_dim": 16}, "2": {"head_dim": 16}, "3": {"head_dim": 16}}
    assert pruned.config.to_dict()["per_layer_config"] == overrides


@pytest.mark.parametrize(
    ("asked", "influence", "dropped"),
    [
        (1, None, (3,)),
        ("2", None, (2, 3)),
        ("[3]", None, (3,)),
        ("0+2-3", None, (0, 2, 3)),
        # Of layers alike the later goes.
        (2, [0.1, 0.2, 0.1, 0.1, 0.3], (2, 3)),
    ],
)
def test_counts_and_lists_of_layers(asked, influence, dropped):
    depth = Depth.of(PruneArguments(drop_layers=asked), LAYERS, influence)
    assert depth.dropped == dropped


def test_an_error_leaves_the_model_whole(made):
    model = made("gemma2").whole()
    layers, config = model.model.layers, model.config.to_dict()
    with torch.no_grad():
        layers[4].mlp.gate_proj.weight[0, 0] = float("inf")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    name = r"mlp\.gate_proj\.weight holds 1 NaN or infinite"
    with pytest.raises(ValueError, match=name):
        prune_model(model, drop_layers="1+2", prune_percent=40)
    assert_state(model, before)
    assert model.model.layers is layers
    assert model.config.to_dict() == config
    assert [layer.self_attn.layer_idx for layer in layers] == [*range(LAYERS)]


def test_the_record_and_the_digest_know_the_layers(made):
    record = made().load(drop_layers="1-2").prune_record
    said = {"layers": 3, "layers_before": 5, "layers_dropped": "1-2"}
    said |= {"layers_kept": "0,3-4", "asked": {"drop_layers": "[1-2]"}}
    assert record.as_dict().items() >= {**said, "criterion": None}.items()
    digest = hashlib.sha256(b"layers")
    digest.update(torch.tensor([0, 3, 4]).numpy().astype("<i8").tobytes())
    assert record.digest == digest.hexdigest()
    both = made().load(drop_layers="1-2", ratio=1).prune_record
    for neurons in both.kept:
        digest.update(neurons.numpy().astype("<i8").tobytes())
    assert both.digest == digest.hexdigest()


def influence_by_hand(source) -> list[float]:
    model, tokenizer = source.whole(), AutoTokenizer.from_pretrained(source.folder)
    similar, states = [[] for _ in range(LAYERS)], []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, given, returned: states.append((given[0], returned))
        )
    for text in TEXTS:
        states.clear()
        with torch.no_grad():
            model(input_ids=tokenizer(text, return_tensors="pt").input_ids)
        for layer, (before, after) in enumerate(states):
            for x, y in zip(before[0].double(), after[0].double(), strict=True):
                similar[layer].append(float(x @ y / (x.norm() * y.norm())))
    return [1 - sum(each) / len(each) for each in similar]


@pytest.mark.parametrize("count", [1, 4])
def test_block_influence_is_its_formula(count, made, influence, tmp_path):
    expected = influence_by_hand(made())
    least = sorted(sorted(range(LAYERS), key=lambda n: expected[n])[:count])
    state = without(made().whole(), least).state_dict()
    asked, ways = {"drop_layers": count, **influence}, ("one file", "in memory")
    record = assert_one_model(made(), asked, state, tmp_path, ways)
    assert list(record.plan.depth.dropped) == least
    assert record.plan.depth.influence == pytest.approx(expected, abs=1e-5)
    assert record.plan.depth.measured_on["texts"] == 3
    written = json.loads(json.dumps(record.as_dict()))
    assert written["asked"]["drop_by"] == "block_influence"
    assert written["block_influence"].keys() == set("01234")


@pytest.mark.parametrize(
    ("criterion", "named"), [("act", None), ("maw", "layers"), ("maw", "skip_layers")]
)
def test_the_layers_that_stay_are_narrowed(criterion, named, made, influence, tmp_path):
    """Activity is that of the layers that stay; lists may name some that text drops."""
    asked = {"drop_layers": 2, **influence}
    gone = made().load(**asked).prune_record.plan.depth.dropped
    stay = [layer for layer in range(LAYERS) if layer not in gone]
    listed = {"layers": [*gone, *stay[:2]], "skip_layers": [gone[0], stay[2]]}
    size = {"criterion": criterion, "prune_percent": 40}
    more = {"layers": "0-1"} if named else {"calibration": influence["calibration"]}
    model = without(made().whole(), gone)
    expected = prune_model(model, tokenizer=byte_tokenizer(), **size, **more)
    asked |= size | ({named: listed[named]} if named else {})
    ways = ("one file", "in memory", "exported")
    assert_one_model(made(), asked, expected.state_dict(), tmp_path, ways)


def test_a_pruned_model_loses_layers_once_more(made, tmp_path):
    """Layers of an odd width, which the config describes by their number, keep it."""
    first = made().load(layers="1+3", prune_percent=50)
    first.save_pretrained(tmp_path)
    again = load_pruned(str(tmp_path), drop_layers="0+1", **EAGER)
    widths = [layer.mlp.gate_proj.out_features for layer in again.model.layers]
    assert widths == [88, 44, 88]
    assert_same_model(again, prune_model(first, drop_layers="0+1"))
