"""What an error of a layer costs: one backward pass, held against gradients by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

from lm_eval_pruned.pruning import curvature as module
from lm_eval_pruned.pruning.curvature import curvature
from lm_eval_pruned.pruning.layouts import find_glu_mlps
from lm_eval_pruned.pruning.repair import removed_in_steps, repaired
from tests.helpers.checkpoints import byte_tokenizer
from tests.helpers.layouts import breadth
from tests.pruning.test_repair import SHAPES, TEXTS, layer, made, objective, tiny


seeds = st.integers(0, 2**20)
IDS = [torch.tensor([byte_tokenizer()(text[:90])["input_ids"]]) for text in TEXTS]


class Linear(torch.nn.Module):
    """A model whose logits are a linear function of what its one GLU-MLP returns."""

    device, config = torch.device("cpu"), SimpleNamespace()

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedded = torch.randn(11, 6, generator=generator)
        self.head = torch.randn(11, 4, generator=generator)
        self.down = torch.nn.Linear(6, 4, bias=False)

    def num_parameters(self) -> int:
        return 10**6

    def forward(self, input_ids, use_cache):
        logits = self.down(self.embedded[input_ids]) @ self.head.T
        return SimpleNamespace(logits=logits)


def test_curvature_of_a_linear_model_has_a_closed_form():
    """At a token the gradient is H' (p - y), p being what is predicted and y what follows."""
    model, texts = Linear(), [torch.tensor([[3, 1, 4, 1, 5]]), torch.tensor([[9, 2]])]
    mlp = SimpleNamespace(
        name="mlp",
        kind="dense",
        stack="",
        hidden_size=4,
        width=6,
        projection=lambda _: model.down,
    )
    found = curvature(model, texts, [mlp])
    gradients, loss = [], 0.0
    for text in texts:
        with torch.no_grad():
            predicted = model(text, False).logits[0, :-1].log_softmax(-1)
        for row, after in zip(predicted, text[0, 1:], strict=True):
            loss -= float(row[after])
            wrong = row.exp()
            wrong[after] -= 1
            gradients.append(wrong @ model.head)
    gradients = torch.stack(gradients)
    # What is returned for the last token of a text predicts nothing.
    expected = gradients.T @ gradients / 7
    torch.testing.assert_close(found.roots["mlp"].T @ found.roots["mlp"], expected)
    assert found.loss == pytest.approx(loss / 5)


@pytest.mark.parametrize(
    "family", breadth((*SHAPES, "gpt_oss"), "llama", "gemma2", "qwen2_moe")
)
def test_a_small_error_raises_the_loss_as_gradients_by_hand_say(family, tmp_path):
    # In float64, because the differences of a loss are a millionth of it.
    model = made(tmp_path, family).double()
    mlps = find_glu_mlps(model)
    wanted = [each.requires_grad for each in model.parameters()]
    found = curvature(model, IDS, mlps)
    assert [each.requires_grad for each in model.parameters()] == wanted
    assert all(each.grad is None for each in model.parameters())
    assert found.roots.keys() == {mlp.name for mlp in mlps}
    place = model.get_submodule(mlps[-1].stack)
    if mlps[-1].kind == "dense":
        place = mlps[-1].projection("down_proj")
    error = torch.randn(
        mlps[-1].hidden_size, generator=torch.Generator().manual_seed(1)
    ).double()
    # The slope of the loss of each token's error, by finite differences of one text.
    text, size, squares = IDS[0][:, :9], 1e-3, 0.0
    alone = curvature(model, [text], mlps).roots[mlps[-1].name]

    @torch.no_grad()
    def loss_with(step: float, token: int) -> float:
        def shift(_module, _given, output):
            returned = output[0] if isinstance(output, tuple) else output
            returned.view(-1, len(error))[token] += step * error

        handle = place.register_forward_hook(shift)
        logits = model(input_ids=text, use_cache=False).logits[0, :-1].double()
        handle.remove()
        return float(
            torch.nn.functional.cross_entropy(logits, text[0, 1:], reduction="sum")
        )

    for token in range(9):
        slope = (loss_with(size, token) - loss_with(-size, token)) / (2 * size)
        squares += slope**2
    assert float((alone.double() @ error).square().sum()) == pytest.approx(
        squares / 9, rel=0.05
    )


@pytest.mark.parametrize("family", breadth(SHAPES, "llama", "qwen2_moe"))
def test_layers_that_compute_twice_give_the_same(family, tmp_path, monkeypatch):
    model = made(tmp_path, family)
    once = curvature(model, IDS, find_glu_mlps(model))
    before = [dict(vars(each)) for each in model.modules()]
    monkeypatch.setattr(module, "_takes_much", lambda *_: True)
    twice = curvature(model, IDS, find_glu_mlps(model))
    assert [dict(vars(each)).keys() for each in model.modules()] == [
        each.keys() for each in before
    ]
    assert once.loss == pytest.approx(twice.loss, rel=1e-5)
    for name, root in once.roots.items():
        other = twice.roots[name]
        scale = float(root.norm() ** 2)
        torch.testing.assert_close(
            root.T @ root, other.T @ other, rtol=1e-4, atol=1e-5 * scale
        )


def test_gradients_that_are_not_finite_are_refused():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(float("inf"))
    with pytest.raises(ValueError, match="NaN or infinite gradients"):
        curvature(model, IDS, find_glu_mlps(model))


@given(seeds)
def test_the_error_in_nats_is_what_the_loss_minds_and_chooses_no_neuron(seed):
    _, down, gram = layer(seed)
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))
    widths = [23, 17, 4]
    steps = removed_in_steps(gram, down, widths, root=root)
    for (kept, error), (plain, _) in zip(
        steps, removed_in_steps(gram, down, widths), strict=True
    ):
        assert kept.equal(plain)
        change = -down.clone()
        change[:, kept] += repaired(gram, down, kept)
        minded = root.double().T @ root.double()
        expected = float((minded @ change @ gram @ change.T).diagonal().sum())
        assert error == pytest.approx(expected, rel=1e-6)
        # Without them it is the plain objective.
        assert objective(gram, down, kept, repaired(gram, down, kept)) > 0
