"""Where GLU-MLPs lie in a model: regions, layouts, and what is refused."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
from torch import nn

from lm_eval_pruned.checkpoints.configs import skeleton
from lm_eval_pruned.pruning.layouts import (
    LAYOUTS,
    GluMlp,
    Region,
    UnsupportedModelError,
    find_glu_mlps,
    resize,
)
from tests.helpers import checkpoints
from tests.helpers.layouts import FAMILIES, overrides


EXPERTS, WIDTH, HIDDEN = 3, 5, 4


def every_region():
    """Yield one region of every layout, with the shape of its parameter."""
    for expert, half, interleaved, transposed in itertools.product(
        (None, 0, 2), (None, 0, 1), (False, True), (False, True)
    ):
        if half is None and interleaved:
            continue
        shape = [WIDTH if half is None else 2 * WIDTH, HIDDEN]
        shape = shape[::-1] if transposed else shape
        shape = shape if expert is None else [EXPERTS, *shape]
        yield Region("p", expert, half, interleaved, transposed), shape


def by_hand(region, tensor):
    """Return a region's weights, one neuron at a time."""
    if region.expert is not None:
        tensor = tensor[region.expert]
    rows = []
    for neuron in range(WIDTH):
        row = neuron
        if region.half is not None:
            row = (
                2 * neuron + region.half
                if region.interleaved
                else neuron + region.half * WIDTH
            )
        rows.append(tensor[:, row] if region.transposed else tensor[row])
    return torch.stack(rows)


@pytest.mark.parametrize(("region", "shape"), list(every_region()))
def test_a_region_is_its_neurons_in_order(region, shape):
    tensor = torch.randn(shape)
    assert torch.equal(region.view(tensor), by_hand(region, tensor))


def test_a_view_shares_memory_with_its_parameter():
    tensor = torch.zeros(2 * WIDTH, HIDDEN)
    Region("p", half=1).view(tensor).fill_(1)
    assert torch.equal(tensor.sum(1), torch.tensor([0.0] * WIDTH + [HIDDEN] * WIDTH))


# Made-up models: nothing but modules under the config of a Llama.


class Made(nn.Module):
    """A model of the given modules, by path."""

    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, **modules):
        super().__init__()
        self.config = checkpoints.tiny_config()
        for name, module in modules.items():
            self.add_module(name, module)


def mlp(bias=False, width=WIDTH, names=("gate_proj", "up_proj", "down_proj")):
    gate, up, down = names
    return nn.ModuleDict(
        {
            gate: nn.Linear(HIDDEN, width, bias),
            up: nn.Linear(HIDDEN, width, bias),
            down: nn.Linear(width, HIDDEN, bias),
        }
    )


def fused(bias=False, factor=2, names=("gate_up_proj", "down_proj")):
    both, down = names
    return nn.ModuleDict(
        {
            both: nn.Linear(HIDDEN, factor * WIDTH, bias),
            down: nn.Linear(WIDTH, HIDDEN, bias),
        }
    )


def stacked(both=(EXPERTS, 2 * WIDTH, HIDDEN), down=(EXPERTS, HIDDEN, WIDTH), **more):
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(torch.randn(both))
    module.down_proj = nn.Parameter(torch.randn(down))
    for name, value in more.items():
        setattr(module, name, value)
    return module


SEPARATE = [names for names in LAYOUTS if names[0] != names[1]]
FUSED = [names[1:] for names in LAYOUTS if names[0] == names[1]]


@pytest.mark.parametrize("names", SEPARATE)
@pytest.mark.parametrize("bias", [False, True])
def test_three_linears_are_an_mlp(names, bias):
    module = mlp(bias, names=names)
    (found,) = find_glu_mlps(Made(mlp=module))
    assert (found.name, found.path, found.kind, found.layer) == (
        "mlp",
        "mlp",
        "dense",
        0,
    )
    assert (found.width, found.hidden_size) == (WIDTH, HIDDEN)
    for projection, name in zip(
        ("gate_proj", "up_proj", "down_proj"), names, strict=True
    ):
        assert found.projection(projection) is module[name]
        assert torch.equal(found.weight(projection), module[name].weight)
        assert found.regions[projection, "weight"] == Region(f"mlp.{name}.weight")
    biases = [place for place in found.regions if place[1] == "bias"]
    assert biases == ([("gate_proj", "bias"), ("up_proj", "bias")] if bias else [])
    if bias:
        assert torch.equal(found.weight("up_proj", "bias"), module[names[1]].bias)


@pytest.mark.parametrize("names", FUSED)
@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up_may_be_fused(names, bias):
    module = fused(bias, names=names)
    (found,) = find_glu_mlps(Made(mlp=module))
    both = module[names[0]]
    assert (found.width, found.hidden_size) == (WIDTH, HIDDEN)
    assert torch.equal(found.weight("gate_proj"), both.weight[:WIDTH])
    assert torch.equal(found.weight("up_proj"), both.weight[WIDTH:])
    assert torch.equal(found.weight("down_proj"), module[names[1]].weight)
    assert found.projection("down_proj") is module[names[1]]
    assert len(found.regions) == (5 if bias else 3)
    if bias:
        assert torch.equal(found.weight("up_proj", "bias"), both.bias[WIDTH:])
    assert found.projection("gate_proj") is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("concatenated", [None, True, False])
def test_experts_may_be_stacked(transposed, concatenated):
    both, down = (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    if transposed:
        both, down = (EXPERTS, HIDDEN, 2 * WIDTH), (EXPERTS, WIDTH, HIDDEN)
    more = {} if concatenated is None else {"is_concatenated": concatenated}
    module = stacked(both, down, **more)
    module.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH))
    module.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
    found = find_glu_mlps(Made(experts=module))
    assert [m.name for m in found] == [f"experts[{i}]" for i in range(EXPERTS)]
    assert [m.layer for m in found] == [0, 1, 2]
    for expert, one in enumerate(found):
        weights = module.gate_up_proj[expert]
        weights = weights.T if transposed else weights
        halves = [slice(0, WIDTH), slice(WIDTH, None)]
        if concatenated is False:
            halves = [slice(0, None, 2), slice(1, None, 2)]
        for projection, half in zip(("gate_proj", "up_proj"), halves, strict=True):
            assert torch.equal(one.weight(projection), weights[half])
            bias = one.weight(projection, "bias")
            assert torch.equal(bias, module.gate_up_proj_bias[expert][half])
        columns = module.down_proj[expert]
        assert torch.equal(
            one.weight("down_proj"), columns.T if transposed else columns
        )
        assert (one.kind, one.width, one.hidden_size) == ("expert", WIDTH, HIDDEN)
        assert one.path == "experts"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("mlp", "dense"),
        ("expert", "dense"),
        ("shared_expert", "shared"),
        ("shared_experts", "shared"),
        ("shared_mlp", "shared"),
    ],
)
def test_kinds_of_mlps_are_told_by_their_path(path, kind):
    (found,) = find_glu_mlps(Made(**{path: mlp()}))
    assert found.kind == kind


@pytest.mark.parametrize(
    ("path", "stack", "block"),
    [
        ("model.layers.12.mlp", "model.layers.12", 12),
        ("decoder.block.3.layer.1.DenseReluDense", "decoder.block.3", 3),
        ("model.layers.4", "model.layers.4", 4),
        ("model.layers.7.experts.5", "model.layers.7", 7),
        ("mlp", "mlp", 0),
        ("layer2.mlp", "layer2.mlp", 0),
    ],
)
def test_the_number_of_a_layer_is_the_first_in_its_path(path, stack, block):
    found = GluMlp("x", 0, nn.Module(), path, "dense", {})
    assert (found.stack, found.block) == (stack, block)


def with_extra(module, name="extra"):
    module.register_parameter(name, nn.Parameter(torch.ones(WIDTH)))
    return module


def embedded():
    module = mlp()
    module["up_proj"] = nn.Embedding(WIDTH, HIDDEN)
    return module


def tied():
    one, other = mlp(), mlp()
    other["up_proj"].weight = one["up_proj"].weight
    return {"a": one, "b": other}


def unknown_experts(*shape):
    module = nn.Module()
    module.weights = nn.Parameter(torch.randn(shape))
    return {"mlp": mlp(), "experts": module}


REFUSED = {
    "nothing": ({}, "has no GLU-MLP of a known layout.*use --model hf"),
    "two linears": ({"mlp": nn.ModuleDict({"up_proj": nn.Linear(2, 2)})}, "no GLU-MLP"),
    "a parameter beside them": (
        {"mlp": with_extra(mlp())},
        "has mlp.extra inside its MLP",
    ),
    "one beside experts": (
        {"experts": with_extra(stacked())},
        "has experts.extra inside",
    ),
    "another kind of module": (
        {"mlp": embedded()},
        "holds mlp in Embedding, Linear: only dense nn.Linear",
    ),
    "a fused one too wide": (
        {"mlp": fused(factor=3)},
        "mlp.gate_up_proj in the shape .* twice as wide as down",
    ),
    "a fused one too narrow": (
        {"mlp": fused(factor=1)},
        "mlp.gate_up_proj in the shape .* twice as wide as down",
    ),
    "transposed experts too wide": (
        {
            "experts": stacked(
                both=(EXPERTS, HIDDEN, 3 * WIDTH), down=(EXPERTS, WIDTH, HIDDEN)
            )
        },
        "experts.gate_up_proj in the shape .* twice as wide as down",
    ),
    "one axis per expert": (
        {"experts": stacked(both=(EXPERTS, 2 * WIDTH))},
        r"experts.gate_up_proj in the shape \[3, 10\]",
    ),
    "three axes per expert": (
        {"experts": stacked(both=(EXPERTS, 2 * WIDTH, HIDDEN, 1))},
        r"experts.gate_up_proj in the shape \[3, 10, 4, 1\]",
    ),
    "fewer experts in down": (
        {"experts": stacked(down=(EXPERTS - 1, HIDDEN, WIDTH))},
        "there is one for each expert",
    ),
    "experts too wide": (
        {"experts": stacked(both=(EXPERTS, 3 * WIDTH, HIDDEN))},
        "experts.gate_up_proj in the shape .* twice as wide as down",
    ),
    "one weight in two layers": (
        tied(),
        "shares one weight between a.up_proj.weight and b",
    ),
    "experts beside known ones": (
        unknown_experts(EXPERTS, WIDTH, HIDDEN),
        "unknown layout in experts.weights",
    ),
    "flattened experts beside known ones": (
        unknown_experts(EXPERTS * WIDTH, HIDDEN),
        "unknown layout in experts.weights",
    ),
    "two parameters beside them": (
        {"mlp": with_extra(with_extra(mlp(), "zeta"), "alpha")},
        "has mlp.alpha inside its MLP",
    ),
}


@pytest.mark.parametrize(("modules", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_sliced_is_refused_by_name(modules, message):
    with pytest.raises(UnsupportedModelError, match=message) as error:
        find_glu_mlps(Made(**modules))
    assert str(error.value).startswith("Made (model_type llama) ")


def test_a_router_beside_experts_is_none_of_them():
    module = stacked()
    router = nn.Module()
    router.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
    scale = nn.Module()
    scale.weight = nn.Parameter(torch.ones(HIDDEN))
    found = find_glu_mlps(
        Made(block=nn.ModuleDict({"experts": module, "router": router}), experts=scale)
    )
    assert len(found) == EXPERTS


def test_a_tower_without_words_is_left_alone():
    tower = Made(mlp=mlp())
    tower.config = types.SimpleNamespace()
    speech = Made(mlp=mlp())
    found = find_glu_mlps(Made(vision=tower, text=speech, last=mlp()))
    assert [m.path for m in found] == ["text.mlp", "last"]


class WordsConfig:
    """Config of a model of language."""

    model_type = "words"
    vocab_size = 10


class WholeConfig:
    """Config of a model that has one of language inside, or an encoder and a decoder."""

    model_type = "whole"
    vocab_size = 10

    def __init__(self, is_encoder_decoder=False):
        self.is_encoder_decoder = is_encoder_decoder
        self.encoder, self.decoder = WordsConfig(), WordsConfig()

    def get_text_config(self, decoder=None, encoder=None):
        return self.decoder if decoder else self.encoder


def part(config, **modules):
    module = Made(**modules)
    module.config = config
    return module


def test_only_the_language_part_of_a_model_is_searched():
    config = WholeConfig()
    language = part(config.decoder, mlp=mlp(), picture=part(object(), mlp=mlp()))
    model = part(config, projector=mlp(), language=language, last=mlp())
    assert [m.path for m in find_glu_mlps(model)] == ["language.mlp"]
    # Without such a part, the whole model is searched.
    model = part(config, a=mlp(), b=mlp())
    assert [m.path for m in find_glu_mlps(model)] == ["a", "b"]


def test_encoders_and_decoders_are_both_searched():
    config = WholeConfig(is_encoder_decoder=True)
    model = part(
        config,
        encoder=part(config.encoder, mlp=mlp()),
        decoder=part(config.decoder, mlp=mlp()),
    )
    assert [m.path for m in find_glu_mlps(model)] == ["encoder.mlp", "decoder.mlp"]


def narrowed(mlps, kept):
    """Return the pieces of `mlps` with the first `kept` neurons."""
    return {
        (m.name, projection, part): (
            m.weight(projection, part)[:, :kept]
            if projection == "down_proj"
            else m.weight(projection, part)[:kept]
        )
        for m in mlps
        for projection, part in m.regions
    }


def with_biases(**more):
    biases = {"gate_up_proj_bias": 2 * WIDTH, "down_proj_bias": HIDDEN}
    return more | {n: nn.Parameter(torch.randn(EXPERTS, s)) for n, s in biases.items()}


TRANSPOSED = (EXPERTS, HIDDEN, 2 * WIDTH), (EXPERTS, WIDTH, HIDDEN)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp(bias=True),
        lambda: fused(bias=True),
        stacked,
        lambda: stacked(**with_biases(is_concatenated=False)),
        lambda: stacked(*TRANSPOSED, **with_biases()),
        lambda: stacked(*TRANSPOSED, **with_biases(is_concatenated=False)),
    ],
)
@pytest.mark.parametrize("trainable", [True, False])
def test_resizing_gives_modules_their_new_width(make, trainable):
    module = make()
    module.intermediate_size = module.expert_dim = WIDTH
    module.d_ff = "as configured"
    module.requires_grad_(trainable)
    model = Made(experts=module)
    mlps = find_glu_mlps(model)
    pieces = {key: piece.clone() for key, piece in narrowed(mlps, 2).items()}
    resize(mlps, pieces)
    after = find_glu_mlps(model)
    assert {m.width for m in after} == {2}
    for one in after:
        for projection, part in one.regions:
            assert torch.equal(
                one.weight(projection, part), pieces[one.name, projection, part]
            )
    for child in module.children():
        assert (child.out_features, child.in_features) == tuple(child.weight.shape)
    assert all(p.requires_grad is trainable for p in module.parameters())
    assert (module.intermediate_size, module.expert_dim) == (2, 2)
    assert module.d_ff == "as configured"
    assert not hasattr(module, "ffn_dim")


def test_skeletons_trust_code_on_request():
    asked = []

    class Auto:
        @staticmethod
        def from_config(config, *, trust_remote_code):
            asked.append(trust_remote_code)
            return checkpoints.tiny_model(config)

    config = checkpoints.tiny_config(num_hidden_layers=1)
    skeleton(Auto, config)
    skeleton(auto_class=Auto, config=config, trust_remote_code=True)
    assert asked == [False, True]
    with pytest.raises(TypeError, match="positional"):
        skeleton(Auto, config, True)


@pytest.mark.parametrize("family", FAMILIES)
def test_skeletons_have_the_parameters_of_the_model_and_no_memory(family):
    config = checkpoints.tiny_config(
        family, **overrides(family, 8), tie_word_embeddings=family != "llama"
    )
    bones = skeleton(checkpoints.auto_class(config), config)
    assert all(p.device.type == "meta" for p in bones.parameters())
    full = checkpoints.tiny_model(config)
    assert bones.num_parameters() == full.num_parameters()
    assert {k: v.shape for k, v in bones.state_dict().items()} == {
        k: v.shape for k, v in full.state_dict().items()
    }
