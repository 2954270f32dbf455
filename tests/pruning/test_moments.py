"""Repair of layers that hold several MLPs: one Gram matrix at a time, whatever memory allows."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from lm_eval_pruned.pruning import moments
from lm_eval_pruned.pruning.layouts import find_glu_mlps
from lm_eval_pruned.pruning.moments import Moments, TextMoments
from lm_eval_pruned.pruning.repair import cut_layer_by_layer
from tests.helpers.checkpoints import tiny_config, tiny_model
from tests.helpers.layouts import overrides
from tests.helpers.ways_to_load import assert_state


class Mixture(nn.Module):
    """Experts that are separate modules, of which two see each token."""

    def __init__(self, config):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, 4)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(4))

    def forward(self, x):
        chosen, total = self.router(x).topk(2).indices, torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            here = (chosen == number).any(-1)
            total[here] += expert(x[here])
        return total


def made(kind: str):
    if kind != "apart":
        return tiny_model(tiny_config(kind, **overrides(kind, 64)))
    model = tiny_model(tiny_config(intermediate_size=64))
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Mixture(model.config)
    return model


@given(st.integers(0, 2**20), st.integers(2, 40), st.sampled_from([0.0, 300.0]))
def test_the_sum_in_blocks_is_the_plain_product(seed, tokens, mean):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 13, generator=generator) + mean
    summed = Moments.none(13, x.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_ROWS", 5)
        patch.setattr(moments, "_BLOCK", 7)
        summed.add(x[: tokens // 2])
        summed.add(x[tokens // 2 :])
        grams = {centred: summed.gram(centred) for centred in (False, True)}
    for centred, gram in grams.items():
        y = x.double() - (x.double().mean(0) if centred else 0)
        plain = y.T @ y
        # Each of as many sums as there are tokens rounds once, each deviation as well.
        size = torch.outer(y.norm(dim=0), y.norm(dim=0))
        bound = (tokens + 8) * torch.finfo(torch.float32).eps * size
        assert ((gram.double() - plain).abs() <= bound + 1e-9).all()


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text", "apart"])
def test_few_matrices_exist_at_a_time_and_memory_does_not_change_the_result(
    kind, monkeypatch
):
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(250, (1, 90), generator=generator) for _ in range(3)]
    matrices, alive, passes, results, repaired = [], [], [], [], []
    none, run = Moments.none, TextMoments._run

    def counted(width, device):
        found = none(width, device)
        matrices.append(weakref.ref(found.scatter))
        alive[-1] = max(alive[-1], sum(each() is not None for each in matrices))
        return found

    def noted(self, group):
        passes[-1] += 1
        return run(self, group)

    monkeypatch.setattr(Moments, "none", counted)
    monkeypatch.setattr(TextMoments, "_run", noted)
    monkeypatch.setattr(moments, "_SHARE", 0)
    model = made(kind)
    mlps = find_glu_mlps(model)
    matrix = 4 * min(mlp.width for mlp in mlps) ** 2
    for most in (1, 3 * matrix, 10**6 * matrix):
        monkeypatch.setattr(moments, "_LEAST", most)
        passes.append(0)
        alive.append(0)
        model = made(kind)
        mlps = find_glu_mlps(model)
        targets = {mlp.name: mlp.width // 2 for mlp in mlps}
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        roots = {mlp.name: torch.eye(mlp.hidden_size) for mlp in mlps}
        results.append({})
        take = lambda _, cut_mlps, found=results[-1]: found.update(cut_mlps)
        asked = (targets, {}, roots, "least_squares", take)
        repaired.append(cut_layer_by_layer(TextMoments(model, texts), mlps, *asked))
        assert_state(model, before)
    assert passes[0] == len(mlps) > passes[1] > passes[2] == 1
    assert alive[0] == 1 and alive[1] <= 3
    assert repaired[0] and len({*repaired}) == 1
    for other in results[1:]:
        for name, mlp in results[0].items():
            assert torch.equal(mlp.kept, other[name].kept)
            assert torch.equal(mlp.down, other[name].down)


def test_a_gram_is_the_same_in_both_triangles():
    """Products of matrices round the two otherwise, and solutions would depend on which one is read."""
    moments = Moments.none(24, torch.device("cpu"))
    moments.add(torch.randn(61, 24, generator=torch.Generator().manual_seed(0)) + 3)
    for centred in (False, True):
        gram = moments.gram(centred)
        assert gram.equal(gram.T)
