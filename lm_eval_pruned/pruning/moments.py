"""What the neurons of GLU-MLPs do over calibration text, as the matrices that repair solves with.

A layer may hold many experts, and the matrix of each has I x I entries. One exists at a time.

Where a norm follows an MLP, the size of what the MLP returns for a token does not count, but its
direction does. So the neurons' values at a token are divided by that size, and errors are those of
an output of size 1.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.calibration import check_observable, progress_bar
from lm_eval_pruned.pruning.layer_by_layer import LayerByLayer, lent
from lm_eval_pruned.pruning.layouts import norm_follows
from lm_eval_pruned.pruning.stacked import StackedInputs, one_by_one


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.layouts import GluMlp

    #: Gives the moments of an MLP of the layer that is looked at.
    MomentsOf = Callable[[GluMlp], "Moments"]

#: Bytes of activations that are kept, for each byte of a layer's down projections: together they
#: are no larger than the gate, up and down projections.
_KEPT = 3
#: Tokens that are added together: so many are copied in float64.
_BLOCK = 2048
#: Rows of a symmetric matrix that are computed together, up to their last column on the diagonal.
_ROWS = 512
#: So many texts run through a layer together.
_TOGETHER = 8


def block_rows(size: int) -> list[tuple[int, int]]:
    """Return first row and end of each block of rows of a matrix of `size` rows."""
    return [(start, min(start + _ROWS, size)) for start in range(0, size, _ROWS)]


def size_of(output: Tensor) -> Tensor:
    """Return the root mean square of what an MLP returns for each token, shape (..., 1), float32."""
    size = output.float().square().mean(-1, keepdim=True).sqrt()
    return size.clamp(min=torch.finfo(torch.float32).tiny)


@dataclass
class Moments:
    """What the neurons of a GLU-MLP did over some tokens.

    Deviations are squared, never activations: where a mean is large beside them, the difference of
    two large sums in float32 would be noise.

    Attributes:
        scatter: Sum of (x - mean) (x - mean)', shape (I, I), float32, where the weights are; of
            it, the lower triangle alone holds.
        mean: Mean of x, shape (I,), float64.
        tokens: Number of tokens.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance", The
    American Statistician 37(3), equation 2.1b.
    """

    scatter: Tensor
    mean: Tensor
    tokens: int = 0

    @classmethod
    def none(cls, width: int, device: torch.device) -> Moments:
        """Return those of no token."""
        return cls(
            torch.zeros(width, width, device=device),
            torch.zeros(width, device=device, dtype=torch.float64),
        )

    def to(self, device: torch.device) -> Moments:
        """Return them on a device."""
        return Moments(self.scatter.to(device), self.mean.to(device), self.tokens)

    def gram(self, centred: bool) -> Tensor:
        """Return the sum over tokens of x x', or of (x - mean) (x - mean)', (I, I), float32."""
        gram = self.scatter.clone()
        if not centred:
            mean = self.mean.float()
            gram.addr_(mean, mean, alpha=self.tokens)
        for start, stop in block_rows(len(gram)):
            square = gram[start:stop, start:stop]
            square.copy_(square.tril() + square.tril(-1).T)
            gram[:start, start:stop] = gram[start:stop, :start].T
        return gram

    def add(self, x: Tensor) -> None:
        """Take in more tokens, of shape (tokens, I)."""
        # No token of a text may reach an expert.
        for block in x.split(_BLOCK) if len(x) else ():
            self._add(block)

    def _add(self, x: Tensor) -> None:
        before, self.tokens = self.tokens, self.tokens + len(x)
        mean = x.mean(0, dtype=torch.float64)
        moved = mean - self.mean
        self.mean += len(x) / self.tokens * moved
        # What the mean moved counts as one more token.
        moved *= math.sqrt(before * len(x) / self.tokens)
        # A rounded mean would be all there is where tokens are alike.
        deviations = torch.cat([(x - mean).float(), moved[None].float()])
        for start, stop in block_rows(x.shape[1]):
            rows = self.scatter[start:stop, :stop]
            rows.addmm_(deviations[:, start:stop].T, deviations[:, :stop])


class LayerMoments:
    """The moments of the GLU-MLPs of a layer, one after the other.

    While texts run through the layer, the moments of the first are added up. Activations of the
    others are kept, as a token reaches few of many experts, but no more of them than these MLPs
    have weights. The texts run through the layer again for those that did not fit.

    Attributes:
        observed: Whether the activations of any MLP could be seen.
        returned: What the layer returns, for each batch.
    """

    def __init__(
        self, walk: LayerByLayer, mlps: Sequence[GluMlp], normed: bool = False
    ) -> None:
        """Run the texts of `walk` through the layer that holds `mlps`.

        `normed` is whether a norm follows, for the only one.
        """
        self._walk, self._mlps, self._normed = walk, mlps, normed
        self._most = _KEPT * sum(mlp.weight("down_proj").nbytes for mlp in mlps)
        self.observed = False
        self._sum: Moments | None = None
        self.returned = self._see(mlps)

    def of(self, mlp: GluMlp) -> Moments:
        """Return the moments of an MLP, once.

        Ask for the MLPs in their order, and let go of each result before the next.

        Raises:
            ValueError: An activation is NaN or infinite.
        """
        if mlp.name not in (*self._first, *self._kept):
            self._see(self._mlps[self._mlps.index(mlp) :])
        for x in self._kept.pop(mlp.name, ()):
            self._add_to_sum(mlp, x)
            self._bytes -= x.nbytes
        moments, self._sum = self._sum, None
        if moments is None:
            return Moments.none(mlp.width, mlp.weight("down_proj").device)
        if not moments.scatter.isfinite().all():
            raise ValueError(
                f"The calibration text makes {mlp.name} produce NaN or infinite activations: use "
                "another dtype, such as dtype=float32, or other text."
            )
        return moments

    def _see(self, mlps: Sequence[GluMlp]) -> list[Any]:
        names = [mlp.name for mlp in mlps]
        self._first, self._sum, self._bytes = names[:1], None, 0
        self._kept: dict[str, list[Tensor]] = {name: [] for name in names[1:]}
        hooks = {
            down: functools.partial(self._observe, mlp)
            for mlp in mlps
            if (down := mlp.projection("down_proj")) is not None
        }
        with StackedInputs(self._mlps, self._take):
            return self._walk.run(hooks)

    def _observe(self, mlp, module, positional, named, output) -> None:
        x = positional[0]
        self._take(mlp, x / size_of(output) if self._normed else x)

    def _take(self, mlp: GluMlp, x: Tensor) -> None:
        self.observed = True
        x = x.flatten(0, -2)
        if len(x) == self._walk.real.numel():
            x = x[self._walk.real.flatten()]
        if mlp.name in self._first:
            self._add_to_sum(mlp, x)
        elif mlp.name in self._kept:
            self._kept[mlp.name].append(x)
            self._bytes += x.nbytes
            while self._bytes > self._most:
                _, dropped = self._kept.popitem()
                self._bytes -= sum(x.nbytes for x in dropped)

    def _add_to_sum(self, mlp: GluMlp, x: Tensor) -> None:
        self._sum = self._sum or Moments.none(mlp.width, x.device)
        self._sum.add(x)


@dataclass(frozen=True)
class TextMoments:
    """The moments of the GLU-MLPs of a model over some texts: stored ones, or those of a run.

    Attributes:
        model: The model, with all its neurons.
        texts: Each of shape (1, tokens), int64.
        device: Where texts run and matrices are; see `LayerByLayer`.
        stored: What `measure` returned of all GLU-MLPs; empty: the texts run for each use.
    """

    model: PreTrainedModel
    texts: Sequence[Tensor]
    device: torch.device | None = None
    stored: Mapping[str, Moments] = field(default_factory=dict)

    def measure(self, mlps: Sequence[GluMlp]) -> dict[str, Moments]:
        """Return the moments of GLU-MLPs by name, on the CPU.

        Raises:
            ValueError: An activation is NaN or infinite.
        """
        measured: dict[str, Moments] = {}

        def store(mlp: GluMlp, moments: Moments) -> None:
            measured[mlp.name] = moments.to(torch.device("cpu"))

        self.visit(mlps, store, "activations", chosen=False)
        return measured

    def visit(
        self,
        mlps: Sequence[GluMlp],
        visit: Callable[[GluMlp, Moments], None],
        what: str,
        *,
        leave: Callable[[Sequence[GluMlp]], object] = len,
        chosen: bool = True,
    ) -> None:
        """Look at one GLU-MLP after the other.

        Args:
            mlps: Those to look at.
            visit: Given each of them and its moments, while its layer is where the texts run.
            what: What the progress bar is of.
            leave: Given the MLPs of a layer, when no text needs the layer any more.
            chosen: Whether activations choose neurons: then all MLPs that hold any have to be
                observable.

        Raises:
            ValueError: An activation is NaN or infinite.
            UnsupportedModelError: See `check_observable`.
        """
        if chosen:
            check_observable(self.model, stacked=True)
        by_layer: dict[nn.Module, list[GluMlp]] = defaultdict(list)
        for mlp in mlps:
            by_layer[self.model.get_submodule(mlp.layer_path)].append(mlp)
        texts: Sequence[Tensor] = ()
        if self._serves(by_layer.values(), chosen):
            layers = [(here, self._reading(l, here)) for l, here in by_layer.items()]
        else:
            texts = self.texts
            # What experts are given does not tell padding apart.
            together = _TOGETHER if all(mlp.kind == "dense" for mlp in mlps) else 1
            walk = LayerByLayer(self.model, self.texts, self.device, together)
            last = max(walk.layers.index(layer) for layer in by_layer)
            layers = [
                (here := by_layer.get(layer, []), self._running(walk, here, chosen))
                for layer in walk.layers[: last + 1]
            ]
        drawn = progress_bar(len(layers), what, texts, "layer")
        with torch.no_grad(), one_by_one(self.model, mlps), drawn as bar:
            for here, looking in layers:
                with looking as moments_of:
                    for mlp in here:
                        visit(mlp, moments_of(mlp))
                leave(here)
                bar.update()

    def _serves(self, layers: Iterable[Sequence[GluMlp]], chosen: bool) -> bool:
        """Return whether the texts need not run again.

        A layer of which nothing was seen is looked at again, and refused if that is why.
        """
        return bool(self.stored) and all(
            not chosen or any(self.stored[mlp.name].tokens for mlp in mlps)
            for mlps in layers
        )

    @contextlib.contextmanager
    def _reading(self, layer: nn.Module, mlps: Sequence[GluMlp]) -> Iterator[MomentsOf]:
        moves_to = None if self.device == self.model.device else self.device
        with lent(layer.modules(), moves_to):
            yield lambda mlp: self.stored[mlp.name].to(mlp.weight("down_proj").device)

    @contextlib.contextmanager
    def _running(
        self, walk: LayerByLayer, mlps: Sequence[GluMlp], chosen: bool
    ) -> Iterator[MomentsOf]:
        # The one MLP of a layer where that counts.
        normed = any(norm_follows(self.model, mlp) for mlp in mlps[:1])
        with walk.layer_lent():
            seen = LayerMoments(walk, mlps, normed)
            if mlps and chosen and not seen.observed:
                check_observable(self.model)
            yield seen.of
            walk.go_on(seen.returned)
