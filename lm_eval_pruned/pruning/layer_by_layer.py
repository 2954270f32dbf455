"""Texts on their way through a model, layer by layer, so that one layer at a time is looked at.

No layer in front runs again. The model itself runs once for each batch, to tell with which
arguments it calls its layers; from then on the layers are called directly.

In memory are the hidden states of the texts, in front of one layer and behind it, and what the
model hands to its layers besides, such as masks: as much as all batches have together. Where the
texts run on another device than the model is on, one layer is there at a time. What lies outside
of the layers is there only while their arguments are noted. Weights return as they were, and
where they were, without being copied back: those of a mapped file stay mapped.
"""

from __future__ import annotations

import contextlib
import logging
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
def lent(modules: Iterable[nn.Module], device: torch.device | None) -> Iterator[None]:
    """Have the tensors of modules on a device, and afterwards where they were.

    Args:
        modules: Those whose tensors go, without those inside them.
        device: None: they stay where they are.
    """
    copies: dict[int, Tensor] = {}
    with contextlib.ExitStack() as undo:
        for module in modules if device is not None else ():
            weights = module.named_parameters(recurse=False)
            for name, tensor in [*weights, *module.named_buffers(recurse=False)]:
                undo.callback(setattr, module, name, tensor)
                if id(tensor) not in copies:
                    data = tensor.detach().to(device)
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
        real: False for padding in the batch that runs, shape (texts, tokens), bool.
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

    def run(
        self, hooks: Mapping[nn.Module, Callable[..., None]] | None = None
    ) -> list[Any]:
        """Run the texts through the next layer and return what it returns, for each batch.

        The forward `hooks` are given arguments by name as well.
        """
        layer, returned = self.layers[self.passed], []
        with watched(self._model, hooks or {}):
            for number, calls in enumerate(self._calls):
                self.real = self._real[number]
                returned.append(calls[0].repeat(layer, self._returned[number]))
        return returned

    def go_on(self, returned: list[Any]) -> None:
        """Let the texts wait in front of the layer after, with what this one `returned`."""
        self._returned, self.passed = returned, self.passed + 1
        for calls in self._calls:
            calls.pop(0)

    def layer_lent(self) -> contextlib.AbstractContextManager[None]:
        """Have the next layer where the texts run, and afterwards where it was; see `lent`."""
        return lent(self.layers[self.passed].modules(), self._moves_to)
