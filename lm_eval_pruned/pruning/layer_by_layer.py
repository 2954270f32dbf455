"""Texts on their way through a model, layer by layer, so that each layer runs once per visit.

Whoever changes the layers one after the other sees each with the inputs that the changed ones
give it, and no layer in front runs again. The model itself runs once for each batch, to tell with
which arguments it calls its layers; from then on the layers are called directly.

In memory are the hidden states of the texts, in front of one layer and behind it, and what the
model hands to its layers besides, such as masks: as much as all batches have together. Where the
texts run on another device than the model is on, one layer is there at a time. What lies outside
of the layers is there only while their arguments are noted. Weights return as they were, and
where they were, without being copied back: those of a mapped file stay mapped.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from lm_eval_pruned.pruning.calibration import watched
from lm_eval_pruned.pruning.layouts import UnsupportedModelError, describe, layers_of


if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Collection,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from torch import Tensor
    from transformers import PreTrainedModel

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.calibration")


@contextlib.contextmanager
def lent(
    modules: Iterable[nn.Module],
    device: torch.device | None = None,
    changed: Collection[Tensor] = (),
) -> Iterator[None]:
    """Have the tensors of modules on a device, and afterwards as they were and where they were.

    Args:
        modules: Those whose tensors go, without those inside them.
        device: Default: each stays where it is.
        changed: Parameters that may be written to meanwhile, and are not afterwards.
    """
    written = {id(tensor) for tensor in changed}
    copies: dict[int, Tensor] = {}
    with contextlib.ExitStack() as undo:
        for module in modules:
            weights = module.named_parameters(recurse=False)
            for name, tensor in [*weights, *module.named_buffers(recurse=False)]:
                if device is None and id(tensor) not in written:
                    continue
                undo.callback(setattr, module, name, tensor)
                if id(tensor) not in copies:
                    data = tensor.detach()
                    data = data.to(device or data.device, copy=id(tensor) in written)
                    if isinstance(tensor, nn.Parameter):
                        data = nn.Parameter(data, tensor.requires_grad)
                    copies[id(tensor)] = data
                setattr(module, name, copies[id(tensor)])
        yield


@contextlib.contextmanager
def moved(model: PreTrainedModel, device: torch.device | None) -> Iterator[None]:
    """Have a whole model on `device`, by default where it is; stay where it does not fit."""
    with contextlib.ExitStack() as stack:
        if device not in (None, model.device):
            try:
                stack.enter_context(lent(model.modules(), device))
            except torch.OutOfMemoryError:
                logger.warning(
                    "The model does not fit on %s, so its text runs on %s.",
                    device,
                    model.device,
                )
        yield


@contextlib.contextmanager
def computing(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules compute with other functions than their own `forward`."""
    with contextlib.ExitStack() as undo:
        for module, forward in forwards.items():
            undo.callback(vars(module).update, dict(vars(module)))
            undo.callback(vars(module).pop, "forward")
            vars(module)["forward"] = forward
        yield


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


@dataclass(frozen=True)
class Handed:
    """Stands for an argument of a layer: what the layer before returned at that position."""

    position: int


class Call:
    """How a model calls one of its layers: the arguments, with `Handed` for those of the layer before."""

    def __init__(self, returned: Any, positional: Sequence[Any], named: dict[str, Any]):
        """Note a call after the layer before `returned` something, of which nothing is kept."""
        handed = {
            id(output): Handed(position)
            for position, output in enumerate(_outputs(returned))
            if isinstance(output, torch.Tensor)
        }
        self._positional = [handed.get(id(value), value) for value in positional]
        self._named = {name: handed.get(id(v), v) for name, v in named.items()}

    @property
    def follows(self) -> bool:
        """Whether the layer is given something that the one before returned."""
        values = (*self._positional, *self._named.values())
        return any(isinstance(value, Handed) for value in values)

    def repeat(self, layer: nn.Module, returned: Any) -> Any:
        """Call `layer` after the one before it `returned` something."""
        outputs = _outputs(returned)

        def filled(value: Any) -> Any:
            return outputs[value.position] if isinstance(value, Handed) else value

        named = {name: filled(value) for name, value in self._named.items()}
        return layer(*map(filled, self._positional), **named)


def _outputs(returned: Any) -> tuple[Any, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


def calls_of(
    model: PreTrainedModel, layers: Sequence[nn.Module], tokens: Tensor
) -> list[Call]:
    """Return how a model calls its layers on `tokens`, of shape (texts, tokens), int64.

    Only the first layer computes. What it returns stands for what each of the others returns, and
    is found again among the arguments of the next.

    Raises:
        UnsupportedModelError: The model does not hand what a layer returns to the next as it is.
    """
    calls: list[Call] = []
    returned: Any = None
    compute = layers[0].forward

    def note(*positional, **named) -> Any:
        nonlocal returned
        calls.append(Call(returned, positional, named))
        if returned is None:
            returned = compute(*positional, **named)
        return returned

    with computing(dict.fromkeys(layers, note)):
        # Without the head, whose logits nobody needs.
        model.base_model(input_ids=tokens, use_cache=False)
    if len(calls) != len(layers) or not all(call.follows for call in calls[1:]):
        raise UnsupportedModelError(
            f"{describe(model)} does not hand what each layer returns to the next as it is, so repair "
            "and criterion=obs (recipe=best) cannot be used with it: pass recipe=fast."
        )
    return calls


class LayerByLayer:
    """Texts that wait in front of one layer of a model, at first the first.

    Their hidden states are held once. Texts of similar length run together, padded at their ends,
    where nothing in front can see it.

    Attributes:
        layers: The decoder layers of the model.
        passed: How many of them the texts have passed.
        batch: Number of the batch that runs.
        real: False for padding in that batch, shape (texts, tokens), bool.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: Sequence[Tensor],
        device: torch.device | str | None = None,
        batch_size: int = 1,
    ) -> None:
        """Let `texts`, each of shape (1, tokens), int64, wait in front of the first layer.

        So many run together, on `device`, to which one layer at a time is brought; default: where
        the model is.

        Raises:
            UnsupportedModelError: See `layers_of` and `calls_of`.
        """
        self._model = model
        self._device = torch.device(device or model.device)
        self._moves_to = None if self._device == model.device else self._device
        path, layers = layers_of(model)
        self.layers: list[Any] = list(layers)
        self.passed = 0
        outside = [
            module
            for name, module in model.named_modules()
            if not name.startswith(f"{path}.")
        ]
        ordered = sorted((text[0] for text in texts), key=len)
        self._real: list[Tensor] = []
        # Of each batch, the calls of the layers that its texts have not passed.
        self._calls: list[list[Call]] = []
        needed = [*outside, *self.layers[0].modules()]
        with lent(needed, self._moves_to), watched(model, {}):
            for start in range(0, len(ordered), batch_size):
                together = ordered[start : start + batch_size]
                tokens = pad_sequence(together, batch_first=True).to(self._device)
                lengths = torch.tensor([[len(text)] for text in together])
                real = torch.arange(tokens.shape[1]) < lengths
                self._real.append(real.to(self._device))
                self._calls.append(calls_of(model, self.layers, tokens))
        self._returned: list[Any] = [None] * len(self._calls)

    @property
    def tokens(self) -> int:
        """Number of tokens of all batches, padding included."""
        return sum(real.numel() for real in self._real)

    def run(
        self,
        hooks: Mapping[nn.Module, Callable[..., None]] | None = None,
        known: Callable[[], Mapping[nn.Module, Callable[..., Any]]] = dict,
    ) -> list[Any]:
        """Run the texts through the next layer and return what it returns, for each batch.

        Args:
            hooks: Forward hooks, which are given arguments by name as well.
            known: Asked for each `batch` with which functions modules compute, if not their own.
        """
        layer, returned = self.layers[self.passed], []
        with watched(self._model, hooks or {}):
            for number, calls in enumerate(self._calls):
                self.batch, self.real = number, self._real[number]
                with computing(known()):
                    returned.append(calls[0].repeat(layer, self._returned[number]))
        return returned

    def go_on(self, returned: list[Any]) -> None:
        """Let the texts wait in front of the layer after, with what this one `returned`."""
        self._returned, self.passed = returned, self.passed + 1
        for calls in self._calls:
            calls.pop(0)

    def layer_lent(
        self, changed: Collection[Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Have the next layer where the texts run, and afterwards as it was; see `lent`."""
        layer = self.layers[self.passed]
        return lent(layer.modules(), self._moves_to, changed)


class Replay:
    """What a layer computed, kept to run it again after only down projections changed.

    It holds what the parts in front of the GLU-MLPs returned, and the input of a dense MLP's down
    projection. With it, the layer runs again for the cost of that projection.
    """

    def __init__(
        self, walk: LayerByLayer, modules: Collection[nn.Module], down: nn.Linear | None
    ) -> None:
        """Take the modules of the layer's GLU-MLPs, and the down projection of the only one.

        `down` is None where the layer has several, or where activations take too much memory.
        """
        self._walk, self._modules, self._down = walk, modules, down
        self._returned: dict[int, dict[nn.Module, Any]] = defaultdict(dict)
        self._activations: dict[int, Tensor] = {}
        self._skipped: Tensor | None = None
        #: The batch of which a GLU-MLP has returned.
        self._past = -1
        # Norms are cheap to compute, and as large as what attention returns.
        self._parts = [
            part
            for part in walk.layers[walk.passed].children()
            if not {*part.modules()} & {*modules}
            and any(weight.dim() > 1 for weight in part.parameters())
        ]

    @staticmethod
    def fits(walk: LayerByLayer, model: PreTrainedModel, down: nn.Linear) -> bool:
        """Return whether the activations take no more memory than the weights of the model."""
        size = walk.tokens * down.in_features * down.weight.element_size()
        return size <= model.num_parameters() * down.weight.element_size()

    def run(self, hooks: Mapping[nn.Module, Callable[..., None]]) -> None:
        """Run the texts through the layer for the first time; see `LayerByLayer.run`.

        What it returns is not needed before down projections changed, so the one that stands alone
        does not compute.
        """
        noted: dict[nn.Module, Callable[..., None]] = dict.fromkeys(
            self._parts, self._note_part
        )
        noted |= dict.fromkeys(self._modules, self._note_end)
        skipped: dict[nn.Module, Callable[..., Any]] = {}
        if self._down is not None:
            skipped[self._down] = self._skip_down
        self._walk.run({**hooks, **noted}, lambda: skipped)

    def again(
        self, hooks: Mapping[nn.Module, Callable[..., None]] | None = None
    ) -> list[Any]:
        """Run them once more, and return what the layer returns now."""
        return self._walk.run(hooks, self._known)

    def _note_part(self, part, positional, named, output) -> None:
        batch = self._walk.batch
        if batch != self._past:
            # What ran twice did not return the same.
            again = part in self._returned[batch]
            self._returned[batch][part] = None if again else output

    def _skip_down(self, x: Tensor) -> Tensor:
        assert self._down is not None
        self._activations[self._walk.batch] = x
        self._skipped = x.new_zeros(*x.shape[:-1], self._down.out_features)
        return self._skipped

    def _note_end(self, mlp, positional, named, output) -> None:
        self._past = self._walk.batch
        if self._down is not None and output is not self._skipped:
            # Some models scale what down returns.
            del self._activations[self._past]

    def _known(self) -> Mapping[nn.Module, Callable[..., Any]]:
        batch = self._walk.batch
        returned = self._returned[batch].items()
        known = {part: _constant(out) for part, out in returned if out is not None}
        if batch in self._activations:
            (mlp,) = self._modules
            x, down = self._activations[batch], self._down
            assert down is not None
            known[mlp] = lambda *_, **__: down(x)
        return known
