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
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


# Made-up models: nothing but modules under the config of a Llama.


class Made(nn.Module):
    """A model of the given modules, by path."""

    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config=None, **modules):
        super().__init__()
        self.config = checkpoints.tiny_config() if config is None else config
        for name, module in modules.items():
            self.add_module(name, module)


def mlp(bias=False, names=PROJECTIONS):
    gate, up, down = names
    return nn.ModuleDict(
        {
            gate: nn.Linear(HIDDEN, WIDTH, bias),
            up: nn.Linear(HIDDEN, WIDTH, bias),
            down: nn.Linear(WIDTH, HIDDEN, bias),
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


def with_biases(**more):
    biases = {"gate_up_proj_bias": 2 * WIDTH, "down_proj_bias": HIDDEN}
    return more | {n: nn.Parameter(torch.randn(EXPERTS, s)) for n, s in biases.items()}


TRANSPOSED = (EXPERTS, HIDDEN, 2 * WIDTH), (EXPERTS, WIDTH, HIDDEN)
SEPARATE = [names for names in LAYOUTS if names[0] != names[1]]
FUSED = [names[1:] for names in LAYOUTS if names[0] == names[1]]


@pytest.mark.parametrize("names", SEPARATE)
@pytest.mark.parametrize("bias", [False, True])
def test_three_linears_are_an_mlp(names, bias):
    module = mlp(bias, names=names)
    (found,) = find_glu_mlps(Made(mlp=module))
    assert (found.name, found.path, found.kind) == ("mlp", "mlp", "dense")
    assert (found.layer, found.width, found.hidden_size) == (0, WIDTH, HIDDEN)
    for projection, name in zip(PROJECTIONS, names, strict=True):
        assert found.projection(projection) is module[name]
        assert found.weight(projection).equal(module[name].weight)
        if bias and projection != "down_proj":
            assert found.weight(projection, "bias").equal(module[name].bias)
    assert len(found.regions) == (5 if bias else 3)


@pytest.mark.parametrize("names", FUSED)
@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up_may_be_fused(names, bias):
    module = fused(bias, names=names)
    (found,) = find_glu_mlps(Made(mlp=module))
    both, down = (module[name] for name in names)
    assert (found.width, found.hidden_size) == (WIDTH, HIDDEN)
    for projection, half in (
        ("gate_proj", slice(WIDTH)),
        ("up_proj", slice(WIDTH, None)),
    ):
        assert found.weight(projection).equal(both.weight[half])
        assert found.projection(projection) is None
        if bias:
            assert found.weight(projection, "bias").equal(both.bias[half])
    assert found.weight("down_proj").equal(down.weight)
    assert found.projection("down_proj") is down
    assert len(found.regions) == (5 if bias else 3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("concatenated", [None, True, False])
def test_experts_may_be_stacked(transposed, concatenated):
    more = {} if concatenated is None else {"is_concatenated": concatenated}
    module = stacked(*(TRANSPOSED if transposed else ()), **with_biases(**more))
    found = find_glu_mlps(Made(experts=module))
    assert [m.name for m in found] == [f"experts[{i}]" for i in range(EXPERTS)]
    assert [m.layer for m in found] == [0, 1, 2]
    halves = [slice(0, WIDTH), slice(WIDTH, None)]
    if concatenated is False:
        halves = [slice(0, None, 2), slice(1, None, 2)]
    for expert, one in enumerate(found):
        both, down = module.gate_up_proj[expert], module.down_proj[expert]
        both, down = (both.T, down.T) if transposed else (both, down)
        for projection, half in zip(("gate_proj", "up_proj"), halves, strict=True):
            assert one.weight(projection).equal(both[half])
            bias = module.gate_up_proj_bias[expert][half]
            assert one.weight(projection, "bias").equal(bias)
        assert one.weight("down_proj").equal(down)
        assert (one.kind, one.width, one.hidden_size) == ("expert", WIDTH, HIDDEN)
        assert one.path == "experts"


def test_a_view_shares_memory_with_its_parameter():
    tensor = torch.zeros(2 * WIDTH, HIDDEN)
    Region("p", half=1).view(tensor).fill_(1)
    assert tensor.sum(1).tolist() == [0.0] * WIDTH + [HIDDEN] * WIDTH


@pytest.mark.parametrize(
    ("path", "kind"),
    [("mlp", "dense"), ("expert", "dense"), ("shared_expert", "shared")]
    + [("shared_experts", "shared"), ("shared_mlp", "shared")],
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


def with_extra(module, *names):
    for name in names:
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


WIDE = (EXPERTS, HIDDEN, 3 * WIDTH), (EXPERTS, WIDTH, HIDDEN)
TWICE = "twice as wide as down"
REFUSED = [
    ({}, "no GLU-MLP of a known layout.*use --model hf"),
    ({"mlp": nn.ModuleDict({"up_proj": nn.Linear(2, 2)})}, "no GLU-MLP"),
    ({"mlp": with_extra(mlp(), "zeta", "alpha")}, "mlp.alpha inside its MLP"),
    ({"experts": with_extra(stacked(), "extra")}, "experts.extra inside"),
    ({"mlp": embedded()}, "Embedding, Linear"),
    *(({"mlp": fused(factor=n)}, f"mlp.gate_up_proj .* {TWICE}") for n in (1, 3)),
    ({"experts": stacked(*WIDE)}, f"experts.gate_up_proj .* {TWICE}"),
    ({"experts": stacked((EXPERTS, 3 * WIDTH, HIDDEN))}, TWICE),
    ({"experts": stacked((EXPERTS, 2 * WIDTH))}, r"shape \[3, 10\]"),
    ({"experts": stacked((EXPERTS, 2 * WIDTH, HIDDEN, 1))}, r"shape \[3, 10, 4, 1\]"),
    ({"experts": stacked(down=(EXPERTS - 1, HIDDEN, WIDTH))}, "one for each expert"),
    (tied(), "shares one weight between a.up_proj.weight and b"),
    (unknown_experts(EXPERTS, WIDTH, HIDDEN), "unknown layout in experts.weights"),
    (unknown_experts(EXPERTS * WIDTH, HIDDEN), "unknown layout in experts.weights"),
]


@pytest.mark.parametrize(("modules", "word"), REFUSED)
def test_what_cannot_be_sliced_is_refused_by_name(modules, word):
    with pytest.raises(UnsupportedModelError, match=word) as error:
        find_glu_mlps(Made(**modules))
    assert str(error.value).startswith("Made (model_type llama) ")


def test_a_router_beside_experts_is_none_of_them():
    router, scale = nn.Module(), nn.Module()
    router.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
    scale.weight = nn.Parameter(torch.ones(HIDDEN))
    block = nn.ModuleDict({"experts": stacked(), "router": router})
    assert len(find_glu_mlps(Made(block=block, experts=scale))) == EXPERTS


# Models of several parts.


class WordsConfig:
    """Config of a model of language."""

    model_type = "words"
    vocab_size = 10


class WholeConfig(WordsConfig):
    """Config of a model that has one of language inside, or an encoder and a decoder."""

    def __init__(self, is_encoder_decoder=False):
        self.is_encoder_decoder = is_encoder_decoder
        self.encoder, self.decoder = WordsConfig(), WordsConfig()

    def get_text_config(self, decoder=None, encoder=None):
        return self.decoder if decoder else self.encoder


def paths(model):
    return [mlp.path for mlp in find_glu_mlps(model)]


def test_only_the_language_part_of_a_model_is_searched():
    tower = Made(types.SimpleNamespace(), mlp=mlp())
    model = Made(vision=tower, text=Made(mlp=mlp()), last=mlp())
    assert paths(model) == ["text.mlp", "last"]
    config = WholeConfig()
    language = Made(config.decoder, mlp=mlp(), picture=Made(object(), mlp=mlp()))
    model = Made(config, projector=mlp(), language=language, last=mlp())
    assert paths(model) == ["language.mlp"]
    # Without such a part, the whole model is searched.
    assert paths(Made(config, a=mlp(), b=mlp())) == ["a", "b"]
    config = WholeConfig(is_encoder_decoder=True)
    both = {n: Made(getattr(config, n), mlp=mlp()) for n in ("encoder", "decoder")}
    assert paths(Made(config, **both)) == ["encoder.mlp", "decoder.mlp"]


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
    mlps, pieces = find_glu_mlps(model), {}
    for one, (projection, part) in itertools.product(mlps, mlps[0].regions):
        piece = one.weight(projection, part).detach().clone()
        piece = piece[:, :2] if projection == "down_proj" else piece[:2]
        pieces[one.name, projection, part] = piece
    resize(mlps, pieces)
    after = {mlp.name: mlp for mlp in find_glu_mlps(model)}
    assert {m.width for m in after.values()} == {2}
    for (name, *place), piece in pieces.items():
        assert after[name].weight(*place).equal(piece)
    for child in module.children():
        assert (child.out_features, child.in_features) == tuple(child.weight.shape)
    assert all(p.requires_grad is trainable for p in module.parameters())
    assert (module.intermediate_size, module.expert_dim) == (2, 2)
    assert module.d_ff == "as configured"
    assert not hasattr(module, "ffn_dim")


@pytest.mark.parametrize("family", FAMILIES)
def test_skeletons_have_the_parameters_of_the_model_and_no_memory(family):
    sizes = {**overrides(family, 8), "tie_word_embeddings": family != "llama"}
    config = checkpoints.tiny_config(family, **sizes)
    bones = skeleton(checkpoints.auto_class(config), config)
    assert all(p.device.type == "meta" for p in bones.parameters())
    full = checkpoints.tiny_model(config)
    assert bones.num_parameters() == full.num_parameters()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (bones, full)]
    assert shapes[0] == shapes[1]
