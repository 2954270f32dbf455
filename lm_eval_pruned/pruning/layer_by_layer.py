"""Texts on their way through a model, layer by layer, so that each layer runs once per visit.

Whoever changes the layers one after the other sees each with the inputs that the changed ones
give it, and no layer in front runs again.
"""

from __future__ import annotations

import contextlib
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.calibration import watched
from lm_eval_pruned.pruning.depth import layers_of


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel


def _move(modules: Iterable[nn.Module], device: torch.device) -> None:
    for module in modules:
        # As `nn.Module.to` does, but for the module without those inside it.
        module._apply(lambda weight: weight.to(device), recurse=False)


class _ReturnedError(Exception):
    """The layer that was asked for has returned: those behind it need not run."""


class LayerByLayer:
    """Texts that wait in front of one layer of a model, at first the first.

    Their hidden states are held once, of shape (1, tokens, H) for each text.

    Attributes:
        layers: The decoder layers of the model.
        passed: How many of them the texts have passed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        texts: Sequence[Tensor],
        device: torch.device | str | None = None,
    ) -> None:
        """Let `texts`, each of shape (1, tokens), int64, wait in front of the first layer.

        They run on `device`, to which one layer at a time is brought; default: where the model is.
        """
        self._model, self._texts = model, texts
        self._home = model.device
        self._device = self._home if device is None else torch.device(device)
        self._path, layers = layers_of(model)
        self.layers: list[Any] = list(layers)
        self.passed = 0
        self._returned: list[Any] = []
        self._skips = True

    def run(
        self, hooks: Mapping[nn.Module, Callable[..., None]] | None = None
    ) -> list[Any]:
        """Run the texts through the next layer and return what it returns, for each text.

        `hooks` are forward hooks, which are given arguments by name as well.
        """
        found: list[Any] = []

        def stop(module, positional, named, output) -> None:
            # Layers that share keys and values hand them on in a mapping: they have to compute.
            if any(isinstance(each, MutableMapping) for each in named.values()):
                self._skips = False
            found.append(output)
            raise _ReturnedError

        layer = self.layers[self.passed]
        with watched(self._model, {**(hooks or {}), layer: stop}):
            for number, text in enumerate(self._texts):
                with self._waiting(number), contextlib.suppress(_ReturnedError):
                    self._model(input_ids=text.to(self._device), use_cache=False)
        return found

    def go_on(self, returned: list[Any]) -> None:
        """Let the texts wait in front of the layer after, with what this one `returned`."""
        self._returned, self.passed = returned, self.passed + 1

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Have the next layer, and what lies outside of all layers, where the texts run."""
        if self._device == self._home:
            yield
            return
        layer = self.layers[self.passed]
        modules = [
            *layer.modules(),
            *(
                module
                for name, module in self._model.named_modules()
                if not name.startswith(f"{self._path}.")
            ),
        ]
        try:
            _move(modules, self._device)
            yield
        finally:
            _move(modules, self._home)

    @contextlib.contextmanager
    def _waiting(self, text: int) -> Iterator[None]:
        """Let the layers that were passed return what is known, without computing."""
        passed = self.layers[: self.passed] if self._skips else []
        with contextlib.ExitStack() as undo:
            for layer in passed:
                undo.callback(vars(layer).pop, "forward")
                vars(layer)["forward"] = lambda *_, **__: self._returned[text]
            yield
