"""Every way to load, for every layout, cut, criterion and dtype, is slicing by hand."""

from __future__ import annotations

import copy
import functools
import math
from fractions import Fraction

import make_architectures as script
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lm_eval_pruned.pruning.criteria import (
    ACTIVITY,
    ALIASES,
    CALIBRATED,
    CRITERIA,
    RANDOM,
)
from lm_eval_pruned.pruning.widths import widths_in_memory
from tests.helpers import by_hand, layouts
from tests.helpers.checkpoints import (
    byte_tokenizer,
    edit_config,
    save_tiny,
    tiny_config,
    tiny_model,
)
from tests.helpers.layouts import breadth, layer_of, logits, ragged
from tests.helpers.ways_to_load import (
    Source,
    Uneven,
    assert_one_model,
    assert_state,
    write_texts,
)


WIDTH, HIDDEN = 16, 32
#: One MLP in each layer, of three matrices.
DENSE = ("cohere", "ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "llama")
DENSE += ("mistral", "olmo2", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm")
#: A width is twice, or 3/2 of, what the config says, or a list.
ODD_KEYS = ("recurrent_gemma", "lfm2", "gemma3n_text")
#: A text model whose config has more; one whose config names experts that it lacks; one expert.
ODD_CONFIGS = ("qwen3_5", "gemma3", "doge", "gpt_oss of one expert")
LAYOUTS = dict.fromkeys((*layouts.FAMILIES, *DENSE, *ODD_KEYS, *ODD_CONFIGS))
#: Separate, fused, an encoder, stacked and transposed experts.
QUICK = ("llama", "phi3", "t5", "gpt_oss")
#: Without `CALIBRATED`, and an alias.
BY_WEIGHTS = sorted({*CRITERIA, RANDOM} - {*CALIBRATED})


_LINEAR = {f"linear_{part}_head_dim": 8 for part in ("key", "value")}
_LINEAR |= {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
_LINEAR["layer_types"] = ["linear_attention", "full_attention", "linear_attention"]
_VISION = {"hidden_size": 16, "intermediate_size": WIDTH, "num_hidden_layers": 1}
_VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
#: What a config of more than text has for text, and besides.
_MORE = {"qwen3_5": (_LINEAR, {})}
_MORE["gemma3"] = ({}, {"vision_config": _VISION, "mm_tokens_per_image": 4})
_ONE = {"num_local_experts": 1, "num_experts_per_tok": 1}
_SIZES = {
    "recurrent_gemma": {"intermediate_size": 2 * WIDTH, "lru_width": HIDDEN},
    "doge": {"num_hidden_layers": 2, "num_key_value_heads": 4},
    "gpt_oss of one expert": layouts.overrides("gpt_oss", WIDTH) | _ONE,
}
_SIZES["recurrent_gemma"]["num_key_value_heads"] = 1
FOUR = "deepseek_v3 of 4 layers"
_SIZES[FOUR] = layouts.overrides("deepseek_v3", WIDTH) | {"num_hidden_layers": 4}
_SIZES[FOUR]["first_k_dense_replace"] = 2


def write(folder, layout):
    if layout == "gemma3n_text":
        layouts.save_gemma3n(folder, [WIDTH] * 3)
    elif layout in layouts.FAMILIES:
        layouts.save_family(folder, layout, WIDTH)
    elif layout == "lfm2_moe":
        model = script.tiny_model(AutoModelForCausalLM, script.tiny_config(layout))
        model.save_pretrained(folder)
    elif layout in _MORE:
        of_text, more = _MORE[layout]
        sizes = {"head_dim": 8, "intermediate_size": WIDTH}
        text = tiny_config(f"{layout}_text", **sizes, **of_text).to_dict()
        config = CONFIG_MAPPING[layout](text_config=text, **more)
        tiny_model(config).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        # The model itself saves the part that is of text.
        (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    else:
        sizes = {"intermediate_size": WIDTH, **_SIZES.get(layout, {})}
        save_tiny(folder, layout.partition(" ")[0], **sizes)
        if layout == "doge":
            edit_config(folder, num_experts=16384, num_cdmoe_experts=16348)
    return Source(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the checkpoint of a layout, made once."""
    return functools.cache(lambda each: write(tmp_path_factory.mktemp(each), each))


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


@torch.no_grad()
def silenced(model, masks):
    for name, mask in masks.items():
        model.get_parameter(name).mul_(mask)
    return model


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
    silent = silenced(whole, masks)
    torch.testing.assert_close(logits(model), logits(silent), rtol=1e-3, atol=1e-3)


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


def assert_cast_alike(source, dtype, folder) -> set[str]:
    """Compare a load and an export with what stock transformers casts; return what it does not."""
    asked = {"prune_percent": 50}
    record = source.export(folder / "stored", **asked).record
    loaded = source.load(dtype=dtype, **asked)
    assert_state(loaded, source.whole(folder / "stored", dtype=dtype).state_dict())
    export = source.export(folder / "cast", dtype=dtype, **asked)
    assert_state(source.whole(folder / "cast"), loaded.state_dict())
    assert loaded.prune_record.digest == export.record.digest == record.digest
    tensors = loaded.state_dict().items()
    return {n for n, t in tensors if t.is_floating_point() and t.dtype != dtype}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "dtype", "in_float32"),
    [
        *(("llama", t, "") for t in (torch.float32, torch.float16, torch.bfloat16)),
        ("t5", torch.float16, "decoder.block.0.layer.2.DenseReluDense.wo.weight"),
        ("deepseek_v3", torch.bfloat16, "layers.1.mlp.gate.e_score_correction_bias"),
        ("gpt_oss", torch.float16, "layers.0.input_layernorm.weight"),
        ("gpt_oss", torch.bfloat16, ""),
        # Built in float32 without a word about it in the plan.
        ("lfm2_moe", torch.bfloat16, "layers.2.feed_forward.expert_bias"),
    ],
)
def test_weights_are_ranked_as_they_are_stored_and_then_cast(
    layout, dtype, in_float32, stored, made, tmp_path
):
    whole = made(layout).whole()
    for name, buffer in whole.named_buffers():
        if name in whole.state_dict() and buffer.is_floating_point():
            buffer.add_(torch.randn_like(buffer) * 0.05)
    whole.to(stored).save_pretrained(tmp_path / "source")
    source = Source(tmp_path / "source")
    kept = assert_cast_alike(source, dtype, tmp_path)
    assert any(name.endswith(in_float32) for name in kept) == bool(in_float32)
    state, _ = by_hand.sliced(source.whole(), by_hand.best(in_proportion(8)(None)))
    assert_state(source.whole(tmp_path / "stored"), state)


OPEN = {
    **{criterion: {"criterion": criterion} for criterion in ACTIVITY},
    "sensitivity": {"allocation": "sensitivity"},
}


@pytest.mark.parametrize("way", OPEN)
def test_what_weights_and_text_decide_is_decided_alike(way, tmp_path, text):
    """By every way to load, and in each dtype in which source and export are loaded."""
    source = Source(save_tiny(tmp_path / "source", num_hidden_layers=4))
    asked = {"prune_percent": 30, "calibration": text, **OPEN[way]}
    state = source.load(**asked).state_dict()
    ways = ("in memory", "exported")
    record = assert_one_model(source, asked, state, tmp_path, ways)
    cast = source.load(dtype=torch.bfloat16, device="cpu", **asked)
    assert cast.prune_record.digest == record.digest
    exported = source.load(tmp_path / "exported", dtype=torch.bfloat16)
    assert_state(exported, cast.state_dict())


@pytest.mark.parametrize(
    "layout", breadth((*layouts.FAMILIES, FOUR), "llama", "t5", FOUR)
)
def test_a_model_whose_layers_differ_is_saved_opened_and_pruned_again(
    layout, made, tmp_path
):
    asked = own_widths(made(layout).whole())
    asked |= {n: own // 4 + 1 for n, own in asked.items() if n % 2 == 0}
    first = made(layout).load(widths=asked)
    first.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    source = Uneven(tmp_path / "source")
    assert_state(source.whole(), first.state_dict())
    assert own_widths(first) == asked
    assert torch.equal(logits(source.whole()), logits(first))
    own = widths_in_memory(first).actual
    ways = ("one file", "in memory", "saved", "exported")
    for number, size in enumerate(
        [{"intermediate_size": 8}, {"ratio": "1/16"}, {"prune_percent": 30}]
        + [{"widths": {n: own - 2 for n, own in asked.items()}}]
    ):
        model = source.load(**size)
        folder = tmp_path / str(number)
        assert_one_model(source, size, model.state_dict(), folder, ways)
        if number < 2 and layout not in ("qwen3_moe", "deepseek_v3", "llama4_text"):
            # A size narrows each MLP that is wider than in a model of that size.
            of_size = widths_in_memory(made(layout).load(**size)).actual
            expected = {name: min(own[name], of_size[name]) for name in own}
            assert widths_in_memory(model).actual == expected


@settings(max_examples=5)
@given(
    widths=st.lists(st.integers(1, 16), min_size=3, max_size=3).filter(
        lambda widths: len(set(widths)) > 1
    ),
    said=st.integers(0, 3),
    size=st.one_of(
        st.integers(1, 16).map(lambda k: {"intermediate_size": k}),
        st.integers(0, 99).map(lambda p: {"prune_percent": p}),
    ),
    more=st.sampled_from([{}, {"ignore_mismatched_sizes": True}]),
)
@example(widths=[8, 16, 12], said=0, size={"intermediate_size": 8}, more={})
def test_tensors_tell_of_widths_that_no_config_does(
    widths, said, size, more, tmp_path_factory
):
    """The config says that of one layer, or the one from which they were cut."""
    folder = tmp_path_factory.mktemp("ragged")
    _, state = ragged(folder, widths)
    said = [*widths, 16][said]
    edit_config(folder, intermediate_size=said)
    source = Uneven(folder)
    assert_state(source.load(**more), state)
    if size.get("intermediate_size", 0) > min(said, max(widths)):
        with pytest.raises(ValueError, match="intermediate_size"):
            source.load(**size)
        return

    def target(path, width):
        if "prune_percent" in size:
            return width - size["prune_percent"] * width // 100
        return min(width, size["intermediate_size"])

    expected, _ = by_hand.sliced(source.load(), by_hand.best(target))
    changed = any(state[name].shape != each.shape for name, each in expected.items())
    ways = ("one file", "in memory", *(["exported", "shards"] if changed else []))
    assert_one_model(source, size, expected, folder, ways)


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
    for key in sorted({"mlp_bias", "use_bias"} & vars(tiny_config(family)).keys()):
        overrides[key] = draw(st.booleans())
    return family, overrides


@pytest.mark.smoke
@settings(max_examples=settings.default.max_examples // 3)
@given(
    architecture=architectures(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    criterion=st.sampled_from([*BY_WEIGHTS, *ALIASES]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_any_dense_model_on_load_in_memory_and_by_hand(
    architecture, dtype, criterion, seed, data, tmp_path_factory
):
    family, overrides = architecture
    width = data.draw(st.integers(1, overrides["intermediate_size"]), label="width")
    asked = {"intermediate_size": width, "criterion": criterion, "seed": seed}
    folder = tmp_path_factory.mktemp("any")
    source = Source(save_tiny(folder, family, seed=seed, dtype=dtype, **overrides))
    full, loaded = source.whole(), source.load(**asked)
    record = loaded.prune_record
    kept = record.kept or [range(width)] * record.layers
    rule = by_hand.listed(kept)
    if criterion in ("maw", "ppm"):
        rule = by_hand.best(width)
    sliced = by_hand.narrow(copy.deepcopy(full), rule)
    ways = ("one file", "in memory")
    assert_one_model(source, asked, sliced.state_dict(), folder, ways)
    assert torch.equal(logits(loaded), logits(sliced))
    # In float64 both sum the same terms, in another order: only rounding differs.
    silent = silenced(full.double(), by_hand.sliced(full, by_hand.listed(kept))[1])
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(logits(loaded.double()), logits(silent), **close)
