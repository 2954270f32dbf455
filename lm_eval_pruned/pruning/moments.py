"""What the neurons of GLU-MLPs do over calibration text, as the matrices that repair solves with.

The model runs on the text as it is, and hooks see what goes into the down projections of some of its
MLPs: of as many as their matrices, of I x I entries each, fit a bound. For others, the text runs again.
The last MLPs of the model come first, and the text goes no further than they are. So layers can be cut
as soon as they were looked at: all those that the text still meets are whole.

Where a norm follows an MLP, the size of what the MLP returns for a token does not count, but its
direction does. So the neurons' values at a token are divided by that size, and errors are those of
an output of size 1.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from lm_eval_pruned.pruning.calibration import check_observable, progress_bar, watched
from lm_eval_pruned.pruning.layouts import find_glu_mlps, layers_of, norm_follows
from lm_eval_pruned.pruning.lending import float64_device, free_bytes, lent, moved
from lm_eval_pruned.pruning.stacked import StackedInputs, one_by_one


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from lm_eval_pruned.pruning.layouts import GluMlp

#: Bytes of matrices that are measured together, at least and as a share of the memory that is free.
_LEAST, _SHARE = 1e9, 0.25
#: Tokens that are added together: so many are copied in float64.
_BLOCK = 2048
#: Rows of a symmetric matrix that are computed together, up to their last column on the diagonal.
_ROWS = 512
#: So many texts run together.
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
        mean: Mean of x, shape (I,), float64, where the weights are, or on the CPU where those have no
            float64.
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
            torch.zeros(width, device=float64_device(device), dtype=torch.float64),
        )

    def to(self, device: torch.device) -> Moments:
        """Return them on a device."""
        mean = self.mean.to(float64_device(device))
        return Moments(self.scatter.to(device), mean, self.tokens)

    def gram(self, centred: bool) -> Tensor:
        """Return the sum over tokens of x x', or of (x - mean) (x - mean)', (I, I), float32."""
        gram = self.scatter.clone()
        if not centred:
            mean = self.mean.float().to(gram.device)
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
        x = x.to(self.mean.device)
        mean = x.mean(0, dtype=torch.float64)
        moved = mean - self.mean
        self.mean += len(x) / self.tokens * moved
        # What the mean moved counts as one more token.
        moved *= math.sqrt(before * len(x) / self.tokens)
        # A rounded mean would be all there is where tokens are alike.
        deviations = torch.cat([(x - mean).float(), moved[None].float()])
        deviations = deviations.to(self.scatter.device)
        for start, stop in block_rows(x.shape[1]):
            rows = self.scatter[start:stop, :stop]
            rows.addmm_(deviations[:, start:stop].T, deviations[:, :stop])


class _Passed(Exception):
    """The text has passed the last layer that is looked at."""


@dataclass(frozen=True)
class TextMoments:
    """The moments of the GLU-MLPs of a model over some texts: stored ones, or those of a run.

    Attributes:
        model: The model, with all its neurons.
        texts: Each of shape (1, tokens), int64.
        device: Where texts run and matrices are; default: where the model is.
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

        self.visit(mlps, store, "matrices", chosen=False)
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
        """Look at some GLU-MLPs, those of the last layer first.

        Args:
            mlps: Those to look at, in the order of the model.
            visit: Given each of them and its moments, while its layer is where the texts run.
            what: What the progress bar is of.
            leave: Given the MLPs of a layer, when no text needs the layer any more.
            chosen: Whether activations choose neurons: then all MLPs that hold any have to be
                observable.

        Raises:
            ValueError: An activation is NaN or infinite.
            UnsupportedModelError: See `layers_of` and `check_observable`.
        """
        if chosen:
            check_observable(self.model, stacked=True)
        # Where layers run more than once, text must not stop behind one.
        layers_of(self.model)
        by_layer: dict[str, list[GluMlp]] = defaultdict(list)
        for mlp in mlps:
            by_layer[mlp.layer_path].append(mlp)
        moves_to = None if self.device == self.model.device else self.device
        tokens: Counter[str] = Counter()
        with torch.no_grad(), progress_bar(len(mlps), what, unit="MLP") as bar:
            for group in self._groups(mlps):
                moments = {mlp.name: self.stored.get(mlp.name) for mlp in group}
                if not self.stored:
                    moments |= self._run(group)
                for path, rows in itertools.groupby(group, lambda mlp: mlp.layer_path):
                    here, layer = by_layer[path], self.model.get_submodule(path)
                    with lent(layer.modules(), moves_to):
                        for mlp in rows:
                            seen = moments.pop(mlp.name)
                            device = mlp.weight("down_proj").device
                            seen = seen or Moments.none(mlp.width, device)
                            tokens[path] += seen.tokens
                            visit(mlp, seen.to(device))
                            # Its matrix goes before there is another.
                            del seen
                            bar.update()
                    # The first of a layer is the last that is looked at.
                    if mlp is here[0]:
                        if chosen and not tokens[path]:
                            check_observable(self.model)
                        leave(here)

    def _groups(self, mlps: Sequence[GluMlp]) -> Iterator[list[GluMlp]]:
        """Yield MLPs, the last ones first, as many together as their matrices fit the memory."""
        device = self.device or self.model.device
        most = max(_LEAST, _SHARE * free_bytes(device))
        group: list[GluMlp] = []
        for mlp in reversed(mlps):
            if group and sum(4 * m.width**2 for m in (*group, mlp)) > most:
                yield group
                group = []
            group.append(mlp)
        if group:
            yield group

    def _run(self, mlps: Sequence[GluMlp]) -> dict[str, Moments]:
        """Run the texts, up to the last layer of `mlps`, and return the moments by name.

        Those that no token reaches have none.
        """
        sums: dict[str, Moments] = {}
        names = {mlp.name for mlp in mlps}
        real: Tensor

        def add(mlp: GluMlp, x: Tensor) -> None:
            if mlp.name not in names:
                return
            x = x.flatten(0, -2)
            if len(x) == real.numel():
                x = x[real.flatten()]
            if mlp.name not in sums:
                sums[mlp.name] = Moments.none(mlp.width, x.device)
            sums[mlp.name].add(x)

        def observe(mlp, normed, module, positional, named, output) -> None:
            x = positional[0]
            add(mlp, x / size_of(output) if normed else x)

        def stop(*_) -> None:
            raise _Passed

        hooks: dict[nn.Module, Callable[..., None]] = {
            down: functools.partial(observe, mlp, norm_follows(self.model, mlp))
            for mlp in mlps
            if (down := mlp.projection("down_proj")) is not None
        }
        last = max(mlps, key=lambda mlp: mlp.layer)
        hooks[self.model.get_submodule(last.layer_path)] = stop
        # What experts are given does not tell padding apart.
        all_mlps = find_glu_mlps(self.model)
        dense = all(mlp.kind == "dense" for mlp in all_mlps)
        together = _TOGETHER if dense else 1
        ordered = sorted((text[0] for text in self.texts), key=len)
        with (
            moved(self.model, self.device),
            watched(self.model, hooks),
            one_by_one(self.model, all_mlps),
            # A product of all experts is known by the first, which need not be among `mlps`.
            StackedInputs(all_mlps, add),
            progress_bar(len(ordered), "activations", ordered) as bar,
        ):
            for start in range(0, len(ordered), together):
                batch = ordered[start : start + together]
                tokens = pad_sequence(batch, batch_first=True)
                lengths = torch.tensor([[len(text)] for text in batch])
                real = torch.arange(tokens.shape[1]) < lengths
                real = real.to(self.model.device)
                with contextlib.suppress(_Passed):
                    # Without the head, whose logits nobody needs.
                    self.model.base_model(
                        input_ids=tokens.to(self.model.device), use_cache=False
                    )
                bar.update(len(batch))
        for name, moments in sums.items():
            if not moments.scatter.isfinite().all():
                raise ValueError(
                    f"The calibration text makes {name} produce NaN or infinite activations: use "
                    "another dtype, such as dtype=float32, or other text."
                )
        return sums
