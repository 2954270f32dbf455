"""What an error of a layer costs: one backward pass, held against gradients by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, strategies as st

from lm_eval_pruned.pruning import curvature as module
from lm_eval_pruned.pruning.curvature import curvature, enough, weighted
from lm_eval_pruned.pruning.layouts import find_glu_mlps, norm_follows
from lm_eval_pruned.pruning.repair import order_by_cost, removed_in_steps, repaired
from tests.helpers.checkpoints import byte_tokenizer
from tests.helpers.layouts import breadth
from tests.pruning.test_repair import SHAPES, TEXTS, layer, made, tiny


seeds = st.integers(0, 2**20)
IDS = [torch.tensor([byte_tokenizer()(text[:90])["input_ids"]]) for text in TEXTS]


class Linear(torch.nn.Module):
    """A model whose logits are a linear function of what its one GLU-MLP returns."""

    device, dtype, config = torch.device("cpu"), torch.float32, SimpleNamespace()

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedded = torch.randn(11, 6, generator=generator)
        self.head = torch.randn(11, 4, generator=generator)
        self.down = torch.nn.Linear(6, 4, bias=False)

    def forward(self, input_ids, use_cache):
        logits = self.down(self.embedded[input_ids]) @ self.head.T
        return SimpleNamespace(logits=logits)


def test_curvature_of_a_linear_model_has_a_closed_form():
    """It is H' (diag(p) - p p') H at a token, p being what is predicted; of drawn tokens, the mean."""
    model, generator = Linear(), torch.Generator().manual_seed(1)
    texts = [torch.randint(11, (1, 3000), generator=generator) for _ in range(2)]
    mlp = SimpleNamespace(
        name="mlp",
        kind="dense",
        layer_path="",
        hidden_size=4,
        width=6,
        projection=lambda _: model.down,
    )
    curved = curvature(model, texts, [mlp])
    expected, squares, loss = torch.zeros(4, 4), torch.zeros(4, 4), 0.0
    for text in texts:
        with torch.no_grad():
            predicted = model(text, False).logits[0].log_softmax(-1)
        after = text[0, 1:, None]
        loss -= float(predicted[:-1].gather(1, after).sum())
        p = predicted.exp()
        # Of each token that can be drawn, the gradient, shape (tokens, 11, 4).
        gradients = (p[:, None] - torch.eye(11)) @ model.head
        products = gradients[..., :, None] * gradients[..., None, :]
        expected += torch.einsum("td,tdij->ij", p, products) / 6000
        squares += torch.einsum("td,tdij->ij", p, products**2) / 6000
    root = curved.roots["mlp"]
    # Five standard errors of the mean of what is drawn.
    assert ((root.T @ root - expected).abs() < 5 * (squares / 6000).sqrt()).all()
    assert curved.loss == pytest.approx(loss / 5998, rel=1e-5)


@pytest.mark.parametrize(
    "family", breadth((*SHAPES, "gpt_oss"), "llama", "gemma2", "qwen2_moe")
)
def test_a_small_error_raises_the_loss_as_gradients_by_hand_say(family, tmp_path):
    # In float64, because the differences of a loss are a millionth of it.
    model = made(tmp_path, family).double()
    mlps = find_glu_mlps(model)
    wanted = [each.requires_grad for each in model.parameters()]
    curved = curvature(model, IDS, mlps)
    assert [each.requires_grad for each in model.parameters()] == wanted
    assert all(each.grad is None for each in model.parameters())
    assert curved.roots.keys() == {mlp.name for mlp in mlps}
    place = model.get_submodule(mlps[-1].layer_path)
    if mlps[-1].kind == "dense":
        place = mlps[-1].projection("down_proj")
    error = torch.randn(
        mlps[-1].hidden_size, generator=torch.Generator().manual_seed(1)
    ).double()
    # The slope of the loss of each token's error, by finite differences of one text.
    text, size, squares = IDS[0][:, :9], 1e-2, 0.0
    alone = curvature(model, [text], mlps).roots[mlps[-1].name]
    # Where a norm follows, an error is a share of the size of the output.
    sizes = torch.ones(9)

    def note(_module, _given, output):
        sizes[:] = output[0].square().mean(-1).sqrt()

    normed = norm_follows(model, mlps[-1])
    assert normed == (family in ("gemma2", "gemma3n_text", "olmo2"))
    noting = place.register_forward_hook(note) if normed else None
    with torch.no_grad():
        logits = model(input_ids=text, use_cache=False).logits[0].float()
    if noting:
        noting.remove()
    chance = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(logits.softmax(-1), 1, generator=chance)[:, 0]

    @torch.no_grad()
    def loss_with(step: float, token: int) -> float:
        def shift(_module, _given, output):
            returned = output[0] if isinstance(output, tuple) else output
            returned.view(-1, len(error))[token] += step * error

        handle = place.register_forward_hook(shift)
        logits = model(input_ids=text, use_cache=False).logits[0].double()
        handle.remove()
        return float(torch.nn.functional.cross_entropy(logits, drawn, reduction="sum"))

    for token in range(9):
        slope = (loss_with(size, token) - loss_with(-size, token)) / (2 * size)
        squares += (slope * float(sizes[token])) ** 2
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


@pytest.mark.parametrize(
    ("hidden", "tokens"), [(64, 1024), (576, 9216), (2048, 10_000), (4096, 16_384)]
)
def test_the_backward_pass_reads_16_tokens_for_each_dimension_and_4_where_there_are_many(
    hidden, tokens
):
    texts = [torch.zeros(1, 100)] * 1000
    count = sum(t.numel() for t in enough(texts, [SimpleNamespace(hidden_size=hidden)]))
    assert tokens <= count <= 1.2 * tokens


def test_gradients_that_are_not_finite_are_refused():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.mul_(float("inf"))
    with pytest.raises(ValueError, match="NaN or infinite gradients"):
        curvature(model, IDS, find_glu_mlps(model))


@given(seeds, st.booleans())
@example(20156, True)
def test_the_error_in_nats_is_what_the_loss_minds(seed, by_scores):
    _, down, gram = layer(seed)
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(5, 5, generator=generator)
    scores = torch.rand(24, generator=generator) if by_scores else None
    steps = removed_in_steps(gram, weighted(root, down), [23, 17, 4], scores)
    minded = root.double().T @ root.double()
    for kept, error in steps:
        # Repair does not depend on what the loss minds.
        new = repaired(gram, down, kept)
        torch.testing.assert_close(
            weighted(root, new), repaired(gram, weighted(root, down), kept)
        )
        change = -down.clone()
        change[:, kept] += new
        expected = float((minded @ change @ gram @ change.T).diagonal().sum())
        assert error == pytest.approx(expected, rel=1e-6)


@given(seeds, st.integers(1, 23), st.integers(0, 9))
def test_where_the_loss_minds_all_directions_alike_the_order_is_that_of_the_output(
    seed, width, power
):
    _, down, gram = layer(seed)
    root = 2.0**power * torch.eye(5)
    assert order_by_cost(gram, weighted(root, down), width).equal(
        order_by_cost(gram, down, width)
    )
