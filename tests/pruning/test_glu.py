"""Where GLU-MLPs lie in a model: layouts, the part that is searched, and what is refused."""

from __future__ import annotations

import itertools
import types

import pytest
import torch
from torch import nn

from lm_eval_pruned.pruning.layouts import (
    LAYOUTS,
    UnsupportedModelError,
    find_glu_mlps,
    resize,
)
from tests.helpers import checkpoints


EXPERTS, WIDTH, HIDDEN = 3, 5, 4
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Made(nn.Module):
    """A model of the given modules, by path, under the config of a Llama."""

    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config=None, **modules):
        super().__init__()
        self.config = checkpoints.tiny_config() if config is None else config
        for name, module in modules.items():
            self.add_module(name, module)


def linears(bias=False, **weights):
    """Return nn.Linear modules of the given weights, or shapes of weights."""
    made = nn.ModuleDict()
    for name, weight in weights.items():
        value = weight if isinstance(weight, torch.Tensor) else torch.randn(weight)
        made[name] = nn.Linear(*reversed(value.shape), bias)
        made[name].weight = nn.Parameter(value)
    return made


def tensors(**values):
    """Return a module of parameters of the given values or shapes; others are attributes."""
    made = nn.Module()
    for name, value in values.items():
        given = torch.randn(value) if isinstance(value, tuple) else value
        is_tensor = isinstance(given, torch.Tensor)
        setattr(made, name, nn.Parameter(given) if is_tensor else given)
    return made


def mlp(names=PROJECTIONS):
    return linears(**dict(zip(names, ((5, 4), (5, 4), (4, 5)), strict=True)))


def dense(names, bias):
    """Return a module of one layout, and the weights of its MLP by projection and part."""
    gate, up = torch.randn(2, WIDTH, HIDDEN)
    down, biases = torch.randn(HIDDEN, WIDTH), torch.randn(2, WIDTH)
    if names[0] == names[1]:
        module = linears(bias, **{names[0]: torch.cat([gate, up]), names[2]: down})
        of_names = {names[0]: biases.flatten()}
    else:
        module = linears(bias, **dict(zip(names, (gate, up, down), strict=True)))
        of_names = {names[0]: biases[0], names[1]: biases[1]}
    held = {
        (p, "weight"): w for p, w in zip(PROJECTIONS, (gate, up, down), strict=True)
    }
    if bias:
        for name, value in of_names.items():
            module[name].bias = nn.Parameter(value)
        held |= {("gate_proj", "bias"): biases[0], ("up_proj", "bias"): biases[1]}
    return module, [held]


def stacked(transposed, concatenated):
    """Return the same for experts in one tensor."""
    gate, up = torch.randn(2, EXPERTS, WIDTH, HIDDEN)
    down, biases = torch.randn(EXPERTS, HIDDEN, WIDTH), torch.randn(2, EXPERTS, WIDTH)
    if concatenated is False:
        both = torch.stack([gate, up], 2).flatten(1, 2)
        of_both = torch.stack([*biases], 2).flatten(1)
    else:
        both, of_both = torch.cat([gate, up], 1), torch.cat([*biases], 1)
    module = tensors(
        gate_up_proj=both.mT.contiguous() if transposed else both,
        down_proj=down.mT.contiguous() if transposed else down,
        gate_up_proj_bias=of_both,
        down_proj_bias=(EXPERTS, HIDDEN),
        **({} if concatenated is None else {"is_concatenated": concatenated}),
    )
    found = ((p, "weight") for p in PROJECTIONS), (gate, up, down)
    held = dict(zip(*found, strict=True))
    held |= {("gate_proj", "bias"): biases[0], ("up_proj", "bias"): biases[1]}
    return module, [{k: w[n] for k, w in held.items()} for n in range(EXPERTS)]


EACH = [(dense, each) for each in itertools.product(LAYOUTS, (False, True))]
EACH += [(stacked, e) for e in itertools.product((False, True), (None, True, False))]


def assert_holds(model, expected, width):
    mlps = find_glu_mlps(model)
    for number, (found, held) in enumerate(zip(mlps, expected, strict=True)):
        name = "mlp" if len(expected) == 1 else f"mlp[{number}]"
        assert (found.name, found.path, found.layer) == (name, "mlp", number)
        assert (found.width, found.hidden_size) == (width, HIDDEN)
        assert found.regions.keys() == held.keys()
        assert all(found.weight(*place).equal(held[place]) for place in held)
    return mlps


@pytest.mark.parametrize(("make", "options"), EACH)
@pytest.mark.parametrize("trainable", [True, False])
def test_every_layout_is_found_and_narrowed(make, options, trainable):
    module, expected = make(*options)
    module.intermediate_size = module.expert_dim = WIDTH
    module.d_ff = "as configured"
    module.requires_grad_(trainable)
    model, pieces = Made(mlp=module), {}
    mlps = assert_holds(model, expected, WIDTH)
    for found, held in zip(mlps, expected, strict=True):
        for place, weight in held.items():
            held[place] = (
                weight[:, [1, 3]] if place[0] == "down_proj" else weight[[1, 3]]
            )
            pieces[found.name, *place] = held[place]
    resize(mlps, pieces)
    assert_holds(model, expected, 2)
    for child in module.children():
        assert (child.out_features, child.in_features) == tuple(child.weight.shape)
    assert all(p.requires_grad is trainable for p in module.parameters())
    assert (module.intermediate_size, module.expert_dim) == (2, 2)
    assert module.d_ff == "as configured"


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


def experts(both, down=(EXPERTS, HIDDEN, WIDTH)):
    return {"experts": tensors(gate_up_proj=both, down_proj=down)}


BOTH = (EXPERTS, 2 * WIDTH, HIDDEN)
TWICE = "twice as wide as down"
REFUSED = [
    ({}, "no GLU-MLP of a known layout.*use --model hf"),
    ({"mlp": linears(up_proj=(2, 2))}, "no GLU-MLP"),
    ({"mlp": with_extra(mlp(), "zeta", "alpha")}, "mlp.alpha inside its MLP"),
    ({"experts": with_extra(experts(BOTH)["experts"], "extra")}, "experts.extra"),
    ({"mlp": embedded()}, "Embedding, Linear"),
    ({"mlp": linears(gate_up_proj=(15, 4), down_proj=(4, 5))}, f"gate_up.*{TWICE}"),
    (experts((3, 4, 15), (3, 5, 4)), f"experts.gate_up_proj .* {TWICE}"),
    (experts((3, 15, 4)), TWICE),
    (experts((3, 10)), r"shape \[3, 10\]"),
    (experts((3, 10, 4, 1)), r"shape \[3, 10, 4, 1\]"),
    (experts(BOTH, (2, 4, 5)), "one for each expert"),
    (tied(), "shares one weight between a.up_proj.weight and b"),
    ({"mlp": mlp(), "experts": tensors(weights=(15, 4))}, "unknown .* experts.weights"),
]


@pytest.mark.parametrize(("modules", "word"), REFUSED)
def test_what_cannot_be_sliced_is_refused_by_name(modules, word):
    with pytest.raises(UnsupportedModelError, match=rf"^Made .*llama.*{word}"):
        find_glu_mlps(Made(**modules))


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


def test_only_the_language_part_of_a_model_is_searched():
    def paths(model):
        return [mlp.path for mlp in find_glu_mlps(model)]

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
