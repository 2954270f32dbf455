"""How much the loss minds an error in what a layer returns, from one backward pass over text.

After each token of a text, let the model draw the next one. Let g be the gradient of the loss of
what was drawn, at what a GLU-MLP returns for one token, and B the mean of g g' over the tokens. An
error e of that output then moves the model's predictions by about e' B e / 2, in nats: the
second-order term of the KL divergence, which the Fisher information gives, as K-FAC has it for the
outputs of a layer. So errors of different layers are on one scale, on which they add up. With the
tokens of the text in place of drawn ones, B would be large where the text surprises the model.

This takes e and g of a token for independent, as K-FAC does. Where a norm follows the MLP, g is the
smaller the larger the output is, so there e is divided by the size of the output, as in
`lm_eval_pruned.pruning.moments`, and g is multiplied by it.

Source: Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
Curvature", arXiv 1503.05671, section 3; Kunstner et al. 2019, "Limitations of the Empirical Fisher
Approximation for Natural Gradient Descent", arXiv 1905.12558, on drawing.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from lm_eval_pruned.pruning.calibration import progress_bar, watched
from lm_eval_pruned.pruning.layouts import layers_of, norm_follows
from lm_eval_pruned.pruning.lending import float64
from lm_eval_pruned.pruning.moments import size_of


if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.layouts import GluMlp
    from lm_eval_pruned.util.cache import Measured

#: Tokens for each hidden dimension, at most and at least, and how many in all are at most read
#: above the least. With 4 for each, the loss of a cut SmolLM2 is that with 16 to 0.004 nats.
_MOST, _LEAST, _TOKENS = 16, 4, 10_000
#: What a pass with gradients keeps of each token and layer, in hidden sizes H and widths I: what
#: goes into projections, norms and products. It may take the larger of these bytes and so many
#: I x I matrices of float64.
_KEPT_HIDDEN, _KEPT_WIDTHS = 10, 4
_KEPT_BYTES, _MATRICES = 5e8, 4
#: What a smaller probability counts as.
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Curvature:
    """What an error in the outputs of GLU-MLPs costs on some text.

    Attributes:
        loss: Mean loss of the model, in nats per token.
        roots: By name of the MLP a matrix R of shape (H, H), float32, with R' R = B, on the CPU.
            Experts share that of the output of their layer.
    """

    loss: float
    roots: Mapping[str, Tensor]

    def as_measured(self) -> Measured:
        """Return it as `measured_once` keeps it, with each matrix once."""
        first: dict[int, str] = {}
        for name, root in self.roots.items():
            first.setdefault(id(root), name)
        tensors = {name: self.roots[name].contiguous() for name in first.values()}
        same = {name: first[id(root)] for name, root in self.roots.items()}
        return tensors, {"loss": self.loss, "roots": same}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Curvature:
        """Make one of what `as_measured` returned."""
        roots = {name: tensors[first] for name, first in facts["roots"].items()}
        return cls(facts["loss"], roots)


def weighted(root: Tensor, down: Tensor) -> Tensor:
    """Return weights of down whose errors count as the loss minds them: R W, (H, I), float32."""
    dtype = torch.promote_types(root.dtype, down.dtype)
    return root.to(down.device, dtype) @ down.to(dtype)


def enough(texts: Sequence[Tensor], mlps: Sequence[GluMlp]) -> Sequence[Tensor]:
    """Return texts, spread over all, with enough tokens to estimate the directions that matter to the loss."""
    hidden = max(mlp.hidden_size for mlp in mlps)
    tokens = sum(text.numel() for text in texts)
    wanted = max(_LEAST * hidden, min(_MOST * hidden, _TOKENS))
    return texts[:: max(1, tokens // wanted)]


def curvature(
    model: PreTrainedModel, texts: Sequence[Tensor], mlps: Sequence[GluMlp]
) -> Curvature:
    """Run texts, each of shape (1, tokens), int64, through a model and back, where it is.

    Only activations get gradients. Of a text whose activations take more memory than the matrices
    of a cut, each layer computes twice.

    Raises:
        ValueError: A gradient is NaN or infinite.
    """
    outputs = {mlp.name: _output_of(model, mlp) for mlp in mlps}
    hidden = {outputs[mlp.name]: mlp.hidden_size for mlp in mlps}
    sums = {n: torch.zeros(h, h, device=model.device) for n, h in hidden.items()}
    loss, predicted = 0.0, 0
    # On the CPU, so that every device draws alike.
    draws = torch.Generator().manual_seed(0)

    normed = {outputs[mlp.name] for mlp in mlps if norm_follows(model, mlp)}

    def add(module: nn.Module, size: Tensor | None, gradient: Tensor) -> None:
        gradient = gradient.float() if size is None else gradient.float() * size
        rows = gradient.flatten(0, -2)
        sums[module].addmm_(rows.T, rows)

    watch = functools.partial(_watch, add, normed)
    with (
        watched(model, dict.fromkeys(outputs.values(), watch)),
        _differentiable(model),
        progress_bar(len(texts), "curvature", texts) as bar,
    ):
        for text in texts:
            tokens = text.to(model.device)
            again = _takes_much(model, mlps, text.numel())
            with computing(_twice(model) if again else {}):
                logits = model(input_ids=tokens, use_cache=False).logits[0]
                chances = logits.detach().softmax(-1, dtype=torch.float32)
                # Where these are NaN, so are the gradients, which are refused below.
                drawn = torch.multinomial(
                    chances.nan_to_num(1).cpu(), 1, generator=draws
                )
                after = tokens[0, 1:, None]
                right = chances[:-1].gather(1, after).clamp(min=_TINY)
                loss -= float(float64(right.log()).sum())
                predicted += len(after)
                # With it, chances are the gradient of the loss: a vocabulary takes much memory.
                chances.scatter_add_(
                    1, drawn.to(model.device), chances.new_full(drawn.shape, -1.0)
                )
                logits.backward(chances.to(logits.dtype))
            bar.update()
    seen = sum(text.numel() for text in texts)
    roots = {}
    with progress_bar(len(sums), "roots of the curvature", texts, "layer") as bar:
        for module in [*sums]:
            # In place of the sum.
            roots[module] = _root(sums.pop(module) / seen, module)
            bar.update()
    named = {name: roots[module] for name, module in outputs.items()}
    return Curvature(loss / max(predicted, 1), named)


@contextlib.contextmanager
def computing(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules compute with other functions than their own `forward`."""
    with contextlib.ExitStack() as undo:
        for module, forward in forwards.items():
            undo.callback(vars(module).update, dict(vars(module)))
            undo.callback(vars(module).pop, "forward")
            vars(module)["forward"] = forward
        yield


def _output_of(model: PreTrainedModel, mlp: GluMlp) -> nn.Module:
    """Return the module that returns what the MLP does, or, of experts, their layer."""
    down: Any = mlp.projection("down_proj")
    return down if mlp.kind == "dense" else model.get_submodule(mlp.layer_path)


def _watch(
    add: Callable[..., None],
    normed: Collection[nn.Module],
    module: nn.Module,
    _positional,
    _named,
    output,
) -> None:
    """Have `add` called with the gradient at what a module returns."""
    returned = output[0] if isinstance(output, tuple) else output
    if not returned.requires_grad:
        # No parameter requires a gradient, so nothing before the first such module does.
        returned.requires_grad_()
    size = size_of(returned.detach()) if module in normed else None
    returned.register_hook(functools.partial(add, module, size))


def _root(curvature: Tensor, module: nn.Module) -> Tensor:
    if not curvature.isfinite().all():
        raise ValueError(
            f"The calibration text gives the output of {module} NaN or infinite gradients: use "
            "another dtype, such as dtype=float32, or other text."
        )
    values, vectors = torch.linalg.eigh(curvature)
    return (values.clamp(min=0).sqrt()[:, None] * vectors.T).cpu()


def _takes_much(model: PreTrainedModel, mlps: Sequence[GluMlp], tokens: int) -> bool:
    dense = {mlp.layer_path: mlp for mlp in mlps}.values()
    a_token = sum(
        _KEPT_HIDDEN * mlp.hidden_size + _KEPT_WIDTHS * mlp.width for mlp in dense
    )
    widest = max(mlp.width for mlp in dense)
    most = max(_KEPT_BYTES, _MATRICES * 8 * widest**2)
    return tokens * a_token * model.dtype.itemsize > most


def _twice(model: PreTrainedModel) -> dict[nn.Module, Callable[..., Any]]:
    """Return functions of the layers that keep only what they are given, and compute the rest again."""
    return {
        layer: functools.partial(checkpoint, layer.forward, use_reentrant=False)
        for layer in layers_of(model)[1]
    }


@contextlib.contextmanager
def _differentiable(model: PreTrainedModel) -> Iterator[None]:
    """Have a model whose activations alone get gradients."""
    before = {weight: weight.requires_grad for weight in model.parameters()}
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
