"""Every way to load, for every layout, cut, criterion and dtype, is slicing by hand."""

from __future__ import annotations

import copy
import math
import tempfile
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.pruning.criteria import (
    ACTIVITY,
    ALIASES,
    CALIBRATED,
    CRITERIA,
    RANDOM,
)
from tests.helpers import by_hand, layouts
from tests.helpers.checkpoints import byte_tokenizer, save_tiny
from tests.helpers.comparing import assert_same_model
from tests.helpers.layouts import breadth, layer_of, logits, ragged
from tests.helpers.ways_to_load import (
    TEXTS,
    WAYS,
    Source,
    assert_one_model,
    assert_state,
    write_texts,
)


WIDTH, HIDDEN = 16, 32
#: One MLP in each layer, of three matrices, by the config key of its bias, if it has any.
DENSE = {
    "gemma": None,
    "cohere": None,
    "ernie4_5": "use_bias",
    "gemma2": None,
    "gemma3_text": None,
    "granite": "mlp_bias",
    "llama": "mlp_bias",
    "mistral": None,
    "olmo2": None,
    "qwen2": None,
    "qwen3": None,
    "seed_oss": "mlp_bias",
    "smollm3": "mlp_bias",
    "stablelm": None,
}
#: A width is twice, or 3/2 of, what the config says, or a list.
ODD_KEYS = ("recurrent_gemma", "lfm2", "gemma3n_text")
LAYOUTS = dict.fromkeys((*layouts.FAMILIES, *DENSE, *ODD_KEYS))
#: Separate, fused, with an encoder, with a shared expert of an odd width, transposed, mixed.
QUICK = ("llama", "phi3", "t5", "qwen2_moe", "gpt_oss", "deepseek_v3")
#: Without `CALIBRATED`, and an alias.
BY_WEIGHTS = sorted({*CRITERIA, RANDOM} - {*CALIBRATED})


def write(folder, layout):
    if layout == "gemma3n_text":
        layouts.save_gemma3n(folder, [WIDTH] * 3)
    elif layout == "recurrent_gemma":
        more = {"lru_width": HIDDEN, "num_key_value_heads": 1}
        save_tiny(folder, layout, intermediate_size=2 * WIDTH, **more)
    elif layout in layouts.FAMILIES:
        layouts.save_family(folder, layout, WIDTH)
    else:
        save_tiny(folder, layout, intermediate_size=WIDTH)
    return Source(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the checkpoint of a layout, made once."""
    known = {}

    def of(layout):
        if layout not in known:
            known[layout] = write(tmp_path_factory.mktemp(layout), layout)
        return known[layout]

    return of


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_texts(tmp_path / "texts.jsonl")


def own_widths(model) -> dict[int, int]:
    """Return the width of the experts of each layer, else of its MLP, by hand."""
    dense, experts = {}, {}

    def note(path, gate, up):
        module = model.get_submodule(path)
        stacked = isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
        (experts if stacked else dense)[layer_of(path)] = len(gate)
        return torch.arange(len(gate))

    by_hand.sliced(model, note)
    return dense | experts


def in_proportion(kept, multiple=1):
    def width_of(path, own):
        width = math.ceil(Fraction(own * kept, WIDTH))
        return width // multiple * multiple or width

    return lambda model: width_of


def only_layer_1(model):
    rule = in_proportion(6)(model)
    return lambda path, own: rule(path, own) if layer_of(path) == 1 else own


def by_layer(widths):
    def rule(model):
        before = own_widths(model)
        share = {n: Fraction(widths.get(n, own), own) for n, own in before.items()}
        return lambda path, own: math.ceil(own * share[layer_of(path)])

    return rule


#: Arguments of pruning, and from a model to the kept width of each MLP.
CUTS = {
    "percent": ({"prune_percent": 40}, in_proportion(10)),
    "width": ({"intermediate_size": 7, "multiple_of": 3}, in_proportion(6, 3)),
    "layers": ({"ratio": "3/16", "skip_layers": "0,2"}, only_layer_1),
    "widths": ({"widths": {0: 11, 1: 5}}, by_layer({0: 11, 1: 5})),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("layout", breadth(LAYOUTS, *QUICK))
def test_every_way_gives_the_model_sliced_by_hand(layout, cut, made, tmp_path):
    source, (asked, rule) = made(layout), CUTS[cut]
    whole = source.whole()
    if "skip_layers" in asked and len(own_widths(whole)) == 2:
        asked = {**asked, "skip_layers": 0}
    keeps = by_hand.best(rule(whole))
    state, masks = by_hand.sliced(whole, keeps)
    record = assert_one_model(source, asked, state, tmp_path)
    assert record.parameters_before == whole.num_parameters()
    model = source.load(**asked)
    assert record.parameters_after == model.num_parameters()
    # What is left computes what the whole model computes without the removed neurons.
    with torch.no_grad():
        for name, mask in masks.items():
            whole.get_parameter(name).mul_(mask)
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("layout", breadth(LAYOUTS, *QUICK))
def test_the_own_size_is_the_identity(layout, made):
    source = made(layout)
    model = source.load(ratio="0.5")
    assert_state(model, source.whole().state_dict())
    assert model.prune_record.digest is None


@pytest.mark.parametrize("criterion", BY_WEIGHTS)
@pytest.mark.parametrize("layout", ["phi3", "mixtral", "t5", "gpt_oss"])
def test_every_criterion_keeps_the_same_however_it_is_asked(
    layout, criterion, made, tmp_path
):
    source, seed = made(layout), 7
    rule = by_hand.best(in_proportion(8)(None), criterion, seed)
    state, _ = by_hand.sliced(source.whole(), rule)
    asked = {"prune_percent": 50, "criterion": criterion, "seed": seed}
    ways = ("one file", "in memory", "exported")
    record = assert_one_model(source, asked, state, tmp_path, ways)
    assert record.as_dict().get("seed") == (seed if criterion == RANDOM else None)


@pytest.mark.parametrize("criterion", ACTIVITY)
@pytest.mark.parametrize("layout", ["llama", "phi3", "gemma2"])
def test_criteria_of_activity_follow_their_formulas(
    layout, criterion, made, tmp_path, text
):
    source = made(layout)
    model, seen = source.whole(), {}
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda down, given: seen.setdefault(down, []).append(given[0][0].double())
        )
    with torch.no_grad():
        for each in TEXTS:
            model(input_ids=torch.tensor([byte_tokenizer()(each)["input_ids"]]))

    def kept_of(path, gate, up):
        down = model.get_submodule(path).down_proj
        weights = (w.detach().double().numpy() for w in (gate, up, down.weight.T))
        formula = by_hand.FORMULAS_OF_ACTIVITY[criterion]
        return by_hand.top(formula(*weights, [x.numpy() for x in seen[down]]), 8)

    state, _ = by_hand.sliced(model, kept_of)
    asked = {"prune_percent": 50, "criterion": criterion, "calibration": text}
    ways = ("one file", "in memory", "shards", "exported")
    assert_one_model(source, asked, state, tmp_path, ways)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["llama", "t5", "deepseek_v3"])
def test_weights_are_ranked_as_they_are_stored_and_then_cast(
    layout, stored, dtype, made, tmp_path
):
    """What stock transformers keeps in float32, ``wo`` of T5, is not cast."""
    source = made(layout)
    source.whole().to(stored).save_pretrained(tmp_path / "stored")
    source = Source(tmp_path / "stored")
    state, _ = by_hand.sliced(source.whole(), by_hand.best(in_proportion(8)(None)))
    asked = {"prune_percent": 50}
    pruned, record = WAYS["exported"](source, asked, tmp_path / "pruned")
    assert_state(pruned, state)
    loaded = source.load(dtype=dtype, **asked)
    assert loaded.dtype == dtype
    assert_state(loaded, source.whole(tmp_path / "pruned", dtype=dtype).state_dict())
    name = str(dtype).removeprefix("torch.")
    export = export_pruned(
        str(source.folder), tmp_path / "cast", dtype=name, prune_arguments=asked
    )
    assert_state(source.whole(tmp_path / "cast"), loaded.state_dict())
    assert loaded.prune_record.digest == export.record.digest == record.digest


OPEN = {
    "global": {"criterion": "vow", "allocation": "global"},
    "sensitivity": {"allocation": "sensitivity"},
    "best": {"criterion": "best", "criteria_tried": "maw+act+random"},
    "best and sensitivity": {"criterion": "best", "allocation": "sensitivity"},
    "influence": {"drop_layers": 1, "drop_by": "block_influence"},
}


@pytest.mark.parametrize("way", OPEN)
def test_what_weights_and_text_decide_is_decided_alike(way, tmp_path, text):
    """By every way to load, and in each dtype in which source and export are loaded."""
    source = Source(save_tiny(tmp_path / "source", num_hidden_layers=4))
    asked = {"prune_percent": 30, **OPEN[way]}
    if way != "global":
        asked["calibration"] = text
    state = source.load(**asked).state_dict()
    ways = ("in memory", "exported")
    record = assert_one_model(source, asked, state, tmp_path, ways)
    cast = source.load(dtype=torch.bfloat16, **asked)
    assert cast.prune_record.digest == record.digest
    exported = source.load(tmp_path / "exported", dtype=torch.bfloat16)
    assert_state(exported, cast.state_dict())


@pytest.mark.parametrize(
    "layout", breadth(layouts.FAMILIES, "llama", "t5", "deepseek_v3")
)
def test_a_model_whose_layers_differ_is_saved_opened_and_pruned_again(
    layout, made, tmp_path
):
    whole = made(layout).whole()
    asked = {n: own - 2 * (n + 1) for n, own in own_widths(whole).items()}
    first = made(layout).load(widths=asked)
    first.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    source = Source(tmp_path / "source")
    source.whole = lambda folder=None, **more: source.load(folder, **more)
    assert_state(source.whole(), first.state_dict())
    assert own_widths(source.whole()) == asked
    assert torch.equal(logits(source.whole()), logits(first))
    for size in (
        {"prune_percent": 30},
        {"intermediate_size": min(asked.values()) - 3},
        {"widths": {n: own - 2 for n, own in asked.items()}},
    ):
        state = source.load(**size).state_dict()
        ways = ("in memory", "saved", "exported")
        assert_one_model(source, size, state, tmp_path / "-".join(size), ways)


@settings(max_examples=5)
@given(
    widths=st.lists(st.integers(1, 16), min_size=3, max_size=3).filter(
        lambda widths: len(set(widths)) > 1
    ),
    size=st.one_of(
        st.integers(1, 16).map(lambda k: {"intermediate_size": k}),
        st.integers(0, 99).map(lambda p: {"prune_percent": p}),
    ),
)
def test_tensors_tell_of_widths_that_no_config_does(widths, size, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ragged")
    _, state = ragged(folder, widths)
    source = Source(folder)
    assert_state(source.load(), state)
    if size.get("intermediate_size", 0) > max(widths):
        with pytest.raises(ValueError, match="intermediate_size"):
            source.load(**size)
        return

    def target(path, width):
        if "prune_percent" in size:
            return width - size["prune_percent"] * width // 100
        return min(width, size["intermediate_size"])

    expected, _ = by_hand.sliced(source.load(), by_hand.best(target))
    further, in_memory = source.load(**size), prune_model(source.load(), **size)
    for model in (further, in_memory):
        assert_state(model, expected)
    assert further.prune_record.as_dict() == in_memory.prune_record.as_dict()


@st.composite
def architectures(draw):
    """Draw the arguments of `tiny_config` for a small model."""
    family = draw(st.sampled_from(sorted(DENSE)))
    hidden_size = draw(st.sampled_from([16, 32, 48]))
    overrides = {
        "hidden_size": hidden_size,
        "head_dim": hidden_size // 2,
        "intermediate_size": draw(st.integers(1, 70)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": 2,
        "num_key_value_heads": draw(st.sampled_from([1, 2])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if DENSE[family]:
        overrides[DENSE[family]] = draw(st.booleans())
    return family, overrides


@pytest.mark.smoke
@settings(max_examples=settings.default.max_examples // 3)
@given(
    architecture=architectures(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    criterion=st.sampled_from([*BY_WEIGHTS, *ALIASES]),
    seed=st.integers(0, 1000),
    sharded=st.booleans(),
    data=st.data(),
)
def test_any_dense_model_on_load_in_memory_and_by_hand(
    architecture, dtype, criterion, seed, sharded, data
):
    family, overrides = architecture
    width = data.draw(st.integers(1, overrides["intermediate_size"]), label="width")
    asked = {"intermediate_size": width, "criterion": criterion, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        size = "3KB" if sharded else "5GB"
        more = {"seed": seed, "dtype": dtype, "max_shard_size": size}
        save_tiny(Path(folder), family, **more, **overrides)
        full = AutoModelForCausalLM.from_pretrained(folder)
        on_load = load_pruned(folder, **asked)
    in_memory = prune_model(copy.deepcopy(full), **asked)
    record = on_load.prune_record
    assert_same_model(on_load, in_memory)
    assert record.digest == in_memory.prune_record.digest
    kept = by_hand.listed(record.kept or [range(width)] * record.layers)
    if criterion in ("maw", "ppm"):
        kept = by_hand.best(width)
    sliced = by_hand.narrow(copy.deepcopy(full), kept)
    assert_same_model(on_load, sliced)
    assert torch.equal(logits(on_load), logits(sliced))
    # In float64 both sum the same terms, in another order: only rounding differs.
    kept = by_hand.listed(record.kept or [range(width)] * record.layers)
    silent = by_hand.silence(full.double(), kept)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(logits(on_load.double()), logits(silent), **close)
