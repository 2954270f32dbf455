"""Where GLU-MLPs lie in a model: the part that is searched, and what is refused."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from lm_eval_pruned.pruning.layouts import (
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
    """Return a module of parameters of the given shapes."""
    made = nn.Module()
    for name, shape in values.items():
        setattr(made, name, nn.Parameter(torch.randn(shape)))
    return made


def mlp(names=PROJECTIONS):
    return linears(**dict(zip(names, ((5, 4), (5, 4), (4, 5)), strict=True)))


@pytest.mark.parametrize("trainable", [True, False])
def test_fused_rows_and_their_biases_are_found_and_narrowed(trainable):
    """The layouts of models are those of `test_loading_contract`; none has these biases."""
    gate, up, bias = torch.randn(WIDTH, HIDDEN), torch.randn(WIDTH, HIDDEN), range(10)
    both = torch.cat([gate, up])
    module = linears(True, gate_up_proj=both, down_proj=(HIDDEN, WIDTH))
    module["gate_up_proj"].bias = nn.Parameter(torch.tensor([*map(float, bias)]))
    module.intermediate_size = module.expert_dim = WIDTH
    module.d_ff = "as configured"
    module.requires_grad_(trainable)
    (found,) = find_glu_mlps(Made(mlp=module))
    assert (found.name, found.width, found.hidden_size) == ("mlp", WIDTH, HIDDEN)
    pieces = {
        ("mlp", *place): found.weight(*place).index_select(
            int(place[0] == "down_proj"), torch.tensor([1, 3])
        )
        for place in found.regions
    }
    resize([found], pieces)
    assert module["gate_up_proj"].weight.equal(torch.cat([gate[[1, 3]], up[[1, 3]]]))
    assert module["gate_up_proj"].bias.tolist() == [1, 3, 6, 8]
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
