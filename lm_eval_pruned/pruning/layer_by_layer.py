"""Texts on their way through a model, layer by layer, so that each layer runs once per visit.

Whoever changes the layers one after the other sees each with the inputs that the changed ones
give it, and no layer in front runs again.
"""

from __future__ import annotations

import contextlib
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

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


def has_to_compute(named: Mapping[str, Any]) -> bool:
    """Return whether a layer hands keys and values on in a mapping among these arguments."""
    return any(isinstance(each, MutableMapping) for each in named.values())


@contextlib.contextmanager
def returning(known: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Let layers return what is `known` of each, without computing."""
    with contextlib.ExitStack() as undo:
        for layer in known:
            undo.callback(vars(layer).update, dict(vars(layer)))
            undo.callback(vars(layer).pop, "forward")
            vars(layer)["forward"] = lambda *_, layer=layer, **__: known[layer]
        yield


class _ReturnedError(Exception):
    """The layer that was asked for has returned: those behind it need not run."""


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
        """
        self._model = model
        ordered = sorted((text[0] for text in texts), key=len)
        starts = range(0, len(ordered), batch_size)
        together = [ordered[n : n + batch_size] for n in starts]
        self._batches = [pad_sequence(each, batch_first=True) for each in together]
        self._lengths = [torch.tensor([*map(len, each)]) for each in together]
        self._home = model.device
        self._device = self._home if device is None else torch.device(device)
        self._path, layers = layers_of(model)
        self.layers: list[Any] = list(layers)
        self.passed = 0
        self._returned: list[Any] = [None] * len(self._batches)
        self._skips = True

    def run(
        self, hooks: Mapping[nn.Module, Callable[..., None]] | None = None
    ) -> list[Any]:
        """Run the texts through the next layer and return what it returns, for each batch.

        `hooks` are forward hooks, which are given arguments by name as well.
        """
        found: list[Any] = []

        def stop(module, positional, named, output) -> None:
            if has_to_compute(named):
                self._skips = False
            found.append(output)
            raise _ReturnedError

        layer = self.layers[self.passed]
        with watched(self._model, {**(hooks or {}), layer: stop}):
            for number, batch in enumerate(self._batches):
                lengths = self._lengths[number][:, None]
                self.real = (torch.arange(batch.shape[1]) < lengths).to(self._device)
                passed = self.layers[: self.passed] if self._skips else []
                known = dict.fromkeys(passed, self._returned[number])
                with returning(known), contextlib.suppress(_ReturnedError):
                    self._model(input_ids=batch.to(self._device), use_cache=False)
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
