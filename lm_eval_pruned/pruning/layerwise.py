"""A model that is run one decoder layer at a time.

What a model does around its layers (embeddings, masks, positions, the last norm, the
head) is left to its own ``forward``, in which stand-ins take the place of the layers: they
note what a layer is given besides hidden states, or hand on hidden states that were
computed before. The layers themselves are called in between, each on the hidden states
of whatever texts and variants there are, so that only one of them has to be in memory.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.layouts import GluMlp, describe, find_glu_mlps


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

#: Logits are computed for so many numbers at once (256 MiB in float32).
_LOGITS = 1 << 26
#: Of them, the loss is taken of so many at once: memory of this size is used again, larger blocks
#: are mapped anew each time, which took an eighth of the loss's CPU time.
_LOSSES = 1 << 22
#: The loss of a model is summed over this many hidden states at most, in bytes; with more
#: text it passes over the layers several times.
HIDDEN_BYTES = 1 << 29


class NotLayerByLayer(Exception):
    """The model cannot be run one layer at a time; the message is a clause that says why."""


@dataclass(frozen=True)
class Call:
    """What a layer is given besides hidden states.

    Attributes:
        positional: Its positional arguments, None in place of the hidden states.
        named: Its keyword arguments, likewise.
        slot: Number or name of the argument that holds the hidden states.
    """

    positional: tuple[Any, ...]
    named: dict[str, Any]
    slot: int | str

    @classmethod
    def of(cls, positional: tuple[Any, ...], named: dict[str, Any]):
        """Take the hidden states out of the arguments of a layer; return them and the rest."""
        slot: int | str = 0 if positional else "hidden_states"
        hidden = positional[0] if positional else named.get("hidden_states")
        if not isinstance(hidden, torch.Tensor):
            raise NotLayerByLayer("its layers take no hidden states")
        if positional:
            positional = (None, *positional[1:])
        else:
            named = {**named, "hidden_states": None}
        return hidden, cls(positional, dict(named), slot)

    def with_hidden(self, hidden: Tensor) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of the layer for `hidden`."""
        positional, named = list(self.positional), dict(self.named)
        if isinstance(self.slot, int):
            positional[self.slot] = hidden
        else:
            named[self.slot] = hidden
        return positional, named


class LayeredModel:
    """A model whose decoder layers are called one by one.

    Attributes:
        model: The model, in evaluation mode.
        mlps: The GLU-MLPs of each layer.
    """

    def __init__(self, model: PreTrainedModel):
        """Find the layers of a decoder-only model.

        Args:
            model: The model.

        Raises:
            NotLayerByLayer: Its GLU-MLPs do not lie in one list of layers.
        """
        self.model = model.eval()
        self.path, self._layers = layer_list(model)
        self.mlps: list[list[GluMlp]] = [[] for _ in self._layers]
        for mlp in find_glu_mlps(model):
            self.mlps[mlp.block].append(mlp)
        self._wraps = [False] * len(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def device(self) -> torch.device:
        """The device of the hidden states."""
        return self.model.get_input_embeddings().weight.device

    @torch.no_grad()
    def enter(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """Return the hidden states before the first layer, and what each layer gets besides.

        Args:
            tokens: Shape (texts, tokens), int64.

        Returns:
            Hidden states, shape (texts, tokens, H), and one `Call` for each layer.
        """
        calls: dict[int, Call] = {}
        entered: list[Tensor] = []

        def stand_in(layer: int, *positional, **named):
            hidden, call = Call.of(positional, named)
            if layer in calls:
                raise NotLayerByLayer("its layers are called several times")
            calls[layer] = call
            entered.append(hidden)
            return self._as_output(layer, hidden)

        with self._in_place_of_layers(stand_in):
            self._forward(tokens, positions=slice(0, 1))
        if list(calls) != list(range(len(self))):
            raise NotLayerByLayer("its layers are not called one after the other")
        return entered[0], list(calls.values())

    def blocks(self, texts: Sequence[Tensor], variants: int = 1) -> list[list[Tensor]]:
        """Part texts so that the hidden states of a part fit into `HIDDEN_BYTES`.

        Args:
            texts: Tokens, each of shape (texts, tokens).
            variants: How many hidden states there are of each token.
        """
        embedding = self.model.get_input_embeddings().weight
        size = variants * embedding.shape[1] * embedding.element_size()
        parts: list[list[Tensor]] = []
        room = 0
        for text in texts:
            if not parts or text.numel() * size > room:
                parts.append([])
                room = HIDDEN_BYTES
            parts[-1].append(text)
            room -= text.numel() * size
        return parts

    def enter_all(
        self, texts: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[list[Call]]]:
        """Return what `enter` does for each of `texts`."""
        entered = [self.enter(tokens.to(self.device)) for tokens in texts]
        return [hidden for hidden, _ in entered], [calls for _, calls in entered]

    @torch.no_grad()
    def run(self, layer: int, hidden: Tensor, call: Call) -> Tensor:
        """Run one layer, whose weights must be in memory; shapes as in `enter`."""
        positional, named = call.with_hidden(hidden)
        output = self._layers[layer](*positional, **named)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def logits(self, tokens: Tensor, hidden: Tensor, positions: slice) -> Tensor:
        """Return the logits at some positions, given what the last layer returned.

        Args:
            tokens: Shape (texts, tokens), int64.
            hidden: Shape (texts, tokens, H).
            positions: Which of the tokens.
        """
        last = len(self) - 1

        def stand_in(layer: int, *positional, **named):
            given, _ = Call.of(positional, named)
            return self._as_output(layer, hidden if layer == last else given)

        with self._in_place_of_layers(stand_in):
            return self._forward(tokens, positions)

    def loss(self, tokens: Tensor, hidden: Tensor) -> float:
        """Return the summed loss of all tokens but the first of each text, in nats.

        Each token is predicted from those before it. Logits are computed for blocks of
        tokens, 256 MiB at once at most; the loss of a token is float32, its sum float64.

        Args:
            tokens: Shape (texts, tokens), int64.
            hidden: What the last layer returned, shape (texts, tokens, H).
        """
        count = tokens.shape[1] - 1
        step = max(1, _LOGITS // (tokens.shape[0] * self.model.vocab_size))
        total = 0.0
        for start in range(0, count, step):
            stop = min(start + step, count)
            total += loss_of(
                self.logits(tokens, hidden, slice(start, stop)),
                tokens[:, start + 1 : stop + 1],
            )
        return total

    @torch.no_grad()
    def check(self, tokens: Tensor) -> None:
        """Compare with the model's own forward pass on one text.

        The layers have to be given the same, bit by bit, whether they or their stand-ins
        are called, each has to take what the one before returned, and the logits have to
        be the same.

        Args:
            tokens: Shape (1, tokens), int64.

        Raises:
            NotLayerByLayer: They are not.
        """
        calls: list[Call] = []
        outputs: list[Tensor] = []
        forwards = [layer.forward for layer in self._layers]

        def watched(layer: int, *positional, **named):
            hidden, call = Call.of(positional, named)
            if layer != len(calls) or (outputs and not _same(hidden, outputs[-1])):
                raise NotLayerByLayer("its layers are not called one after the other")
            output = forwards[layer](*positional, **named)
            self._wraps[layer] = isinstance(output, tuple)
            if self._wraps[layer] and any(each is not None for each in output[1:]):
                raise NotLayerByLayer("its layers return more than hidden states")
            calls.append(call)
            outputs[:] = [output[0] if self._wraps[layer] else output]
            return output

        everywhere = slice(0, tokens.shape[1])
        with self._in_place_of_layers(watched):
            expected = self._forward(tokens, everywhere)
        _, found = self.enter(tokens)
        if len(calls) != len(self) or not all(map(_same_call, calls, found)):
            raise NotLayerByLayer(
                "what its layers are given depends on the layers before"
            )
        logits = self.logits(tokens, outputs[-1], everywhere)
        # Products round by the address of their operands.
        distance = (logits - expected).double().norm() / expected.double().norm()
        if logits.shape != expected.shape or not distance <= 1e-3:
            raise NotLayerByLayer("its logits depend on more than its last layer")

    def _as_output(self, layer: int, hidden: Tensor) -> Any:
        return (hidden,) if self._wraps[layer] else hidden

    def _forward(self, tokens: Tensor, positions: slice) -> Tensor:
        """Run the model and return its logits at `positions`."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise NotLayerByLayer("it has no output embedding")

        def keep(module, arguments):
            return (arguments[0][:, positions], *arguments[1:])

        handle = head.register_forward_pre_hook(keep)
        try:
            return self.model(input_ids=tokens, use_cache=False).logits
        finally:
            handle.remove()

    @contextlib.contextmanager
    def _in_place_of_layers(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Let the layers compute ``forward(number, ...)`` for a while."""
        own = [vars(layer).get("forward") for layer in self._layers]
        for number, layer in enumerate(self._layers):
            layer.forward = _with_number(forward, number)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer, before in zip(self._layers, own, strict=True):
                del layer.forward
                if before is not None:
                    layer.forward = before  # type: ignore[method-assign]


def layer_list(model: PreTrainedModel) -> tuple[str, Sequence[nn.Module]]:
    """Return the list of layers that holds the GLU-MLPs of a model, and its path.

    Args:
        model: A model, possibly on the meta device.

    Raises:
        NotLayerByLayer: There is no such list, or there are several.
    """
    if model.config.is_encoder_decoder:
        raise NotLayerByLayer("it has an encoder")
    paths = {mlp.stack.rpartition(".")[0] for mlp in find_glu_mlps(model)}
    found = model.get_submodule(min(paths))
    if len(paths) > 1 or not isinstance(found, torch.nn.ModuleList):
        raise NotLayerByLayer(
            f"the GLU-MLPs of {describe(model)} lie in no list of layers"
        )
    return min(paths), found  # type: ignore[return-value]


def loss_of(logits: Tensor, targets: Tensor) -> float:
    """Return the summed cross-entropy in nats, float32 for a token, float64 for the sum.

    Args:
        logits: Shape (texts, tokens, vocabulary).
        targets: Shape (texts, tokens), int64.
    """
    rows = max(1, _LOSSES // logits.shape[-1])
    total = 0.0
    for each, target in zip(
        logits.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True
    ):
        losses = torch.nn.functional.cross_entropy(
            each.float(), target, reduction="none"
        )
        total += float(losses.double().sum())
    return total


def _with_number(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    return lambda *positional, **named: forward(number, *positional, **named)


def _same_call(one: Call, other: Call) -> bool:
    return one.slot == other.slot and _same(
        [one.positional, one.named], [other.positional, other.named]
    )


def _same(one: Any, other: Any) -> bool:
    """Return whether two arguments of layers are equal, tensors bit by bit."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, (bool, int, float, str)) and one == other
