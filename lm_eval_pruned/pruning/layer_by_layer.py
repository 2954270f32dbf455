"""Texts on their way through a model, layer by layer, so that each layer runs once per visit.

Whoever changes the layers one after the other sees each with the inputs that the changed ones
give it, and no layer in front runs again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import defaultdict
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from lm_eval_pruned.pruning.calibration import watched
from lm_eval_pruned.pruning.depth import layers_of


if TYPE_CHECKING:
    from collections.abc import (
        Callable,
        Collection,
        Iterable,
        Iterator,
        Mapping,
        Sequence,
    )

    from torch import Tensor, nn
    from transformers import PreTrainedModel

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.calibration")


def _move(modules: Iterable[nn.Module], device: torch.device) -> None:
    for module in modules:
        # As `nn.Module.to` does, but for the module without those inside it.
        module._apply(lambda weight: weight.to(device), recurse=False)


@contextlib.contextmanager
def moved(model: PreTrainedModel, device: torch.device | None) -> Iterator[None]:
    """Have a whole model on `device`, by default where it is; stay where it does not fit."""
    home = model.device
    try:
        try:
            if device not in (None, home):
                _move(model.modules(), device)
        except torch.OutOfMemoryError:
            _move(model.modules(), home)
            logger.warning(
                "The unpruned model does not fit on %s, so its text runs on %s.",
                device,
                home,
            )
        yield
    finally:
        if model.device != home:
            _move(model.modules(), home)


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


class ReturnedError(Exception):
    """Ends a pass as soon as the wanted layer has returned."""


class LayerByLayer:
    """Texts that wait in front of one layer of a model, at first the first.

    Their hidden states are held once. Texts of similar length run together, padded at their ends,
    where nothing in front can see it.

    Attributes:
        layers: The decoder layers of the model.
        passed: How many of them the texts have passed.
        batch: Number of the batch that runs.
        real: False for padding in that batch, shape (texts, tokens), bool.
        skips: Whether layers that the texts have passed need not compute.
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
        self.skips = True

    @property
    def tokens(self) -> int:
        """Number of tokens of all batches, padding included."""
        return sum(batch.numel() for batch in self._batches)

    def run(
        self,
        hooks: Mapping[nn.Module, Callable[..., None]] | None = None,
        known: Callable[[], Mapping[nn.Module, Any]] = dict,
    ) -> list[Any]:
        """Run the texts through the next layer and return what it returns, for each batch.

        Args:
            hooks: Forward hooks, which are given arguments by name as well. One that raises
                `ReturnedError` ends the batch, which returns nothing.
            known: Asked for each `batch` which modules need not compute, and what they return.
        """
        found: list[Any] = []

        def stop(module, positional, named, output) -> None:
            if has_to_compute(named):
                self.skips = False
            found.append(output)
            raise ReturnedError

        layer = self.layers[self.passed]
        with watched(self._model, {**(hooks or {}), layer: stop}):
            for number, batch in enumerate(self._batches):
                lengths = self._lengths[number][:, None]
                self.batch = number
                self.real = (torch.arange(batch.shape[1]) < lengths).to(self._device)
                passed = self.layers[: self.passed] if self.skips else []
                returned = dict.fromkeys(passed, self._returned[number]) | dict(known())
                with returning(returned), contextlib.suppress(ReturnedError):
                    self._model(input_ids=batch.to(self._device), use_cache=False)
        return found

    def finish(self, run: Callable[[Tensor], Any]) -> list[Any]:
        """Return what `run`, which runs the model, returns of each batch.

        The layers that the texts have passed do not compute, where that is possible.
        """
        with watched(self._model, {}):
            found = []
            for batch, returned in zip(self._batches, self._returned, strict=True):
                passed = self.layers[: self.passed] if self.skips else []
                with returning(dict.fromkeys(passed, returned)):
                    found.append(run(batch.to(self._device)))
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
        self._given: dict[int, Tensor] = {}
        self._output: Tensor | None = None
        self._ends_with_down = False
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
        own = walk.tokens * down.in_features * down.weight.element_size()
        return own <= model.num_parameters() * down.weight.element_size()

    def run(self, hooks: Mapping[nn.Module, Callable[..., None]]) -> None:
        """Run the texts through the layer for the first time; see `LayerByLayer.run`."""
        own: dict[nn.Module, Callable[..., None]] = dict.fromkeys(
            self._parts, self._keep
        )
        own |= dict.fromkeys(self._modules, self._end)
        if self._down is not None:
            own[self._down] = functools.partial(self._take, hooks.get(self._down))
        self._walk.run({**hooks, **own}, self._without_down)

    def again(
        self, hooks: Mapping[nn.Module, Callable[..., None]] | None = None
    ) -> list[Any]:
        """Run them once more, and return what the layer returns now."""
        return self._walk.run(hooks, self._known)

    def _keep(self, module, positional, named, output) -> None:
        if self._walk.batch == self._past:
            return
        found = self._returned[self._walk.batch]
        # What ran twice did not return the same.
        found[module] = None if module in found or has_to_compute(named) else output

    def _take(self, hook, module, positional, named, output) -> None:
        if hook is not None:
            hook(module, positional, named, output)
        self._output = output
        if self._ends_with_down or self._walk.batch == 0:
            self._given[self._walk.batch] = positional[0]
        if self._ends_with_down:
            raise ReturnedError

    def _end(self, module, positional, named, output) -> None:
        self._past = self._walk.batch
        # Some models scale what down returns.
        self._ends_with_down = self._output is not None and output is self._output

    def _without_down(self) -> Mapping[nn.Module, Any]:
        return {self._down: None} if self._down and self._ends_with_down else {}

    def _known(self) -> Mapping[nn.Module, Any]:
        known: dict[nn.Module, Any] = {}
        if self._walk.skips:
            returned = self._returned[self._walk.batch].items()
            known |= {part: each for part, each in returned if each is not None}
        if self._down is not None and self._ends_with_down:
            (mlp,) = self._modules
            known[mlp] = self._down(self._given[self._walk.batch])
        return known
