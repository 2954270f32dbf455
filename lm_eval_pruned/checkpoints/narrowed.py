"""Checkpoint entries of GLU-MLPs that read as if they had been saved narrow.

A `NarrowedMlp` knows the stored tensors of one GLU-MLP. It scores gate and up as they
lie in the file, whatever the target dtype, the first time that one of its
entries is read; from then on only the kept neurons are copied, converted and moved.

Source of the protocol that the entries follow: `transformers.core_model_loading.spawn_materialize`.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.criteria import kept_set
from lm_eval_pruned.pruning.layouts import NEURON_AXIS, GluMlp
from lm_eval_pruned.pruning.regions import Region, assemble
from lm_eval_pruned.pruning.slicing import check_finite, narrow, score


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from lm_eval_pruned.checkpoints.session import Session

_CPU = torch.device("cpu")


def shape_of(projection: str, part: str, width: int, hidden_size: int) -> list[int]:
    """Return the shape of one projection's weight or bias in an MLP of `width` neurons."""
    if part == "bias":
        return [width]
    return [hidden_size, width] if projection == "down_proj" else [width, hidden_size]


class NarrowedMlp:
    """The source tensors of one GLU-MLP, and the kept set once it is known."""

    def __init__(self, session: Session, mlp: GluMlp, width_before: int, width: int):
        self.layer = mlp.layer
        self.name = mlp.name
        self.width = width
        self._width_before = width_before
        self._hidden_size = mlp.hidden_size
        self._session = session
        self._criterion = session.plan.criterion_of(mlp.block)
        self._sources: dict[tuple[str, str], NarrowedTensor] = {}
        self._ready: dict[tuple[str, str], Tensor] = {}
        self._kept: Tensor | None = None
        self._lock = threading.Lock()
        self.following: NarrowedMlp | None = None

    def add(self, projection: str, part: str, source, target):
        """Take the source of one projection and return its narrowed entry."""
        if not source.get_dtype().startswith(("F32", "F16", "BF16", "F64")):
            raise ValueError(
                f"{self.name}.{projection}.{part} is stored as {source.get_dtype()}, which can "
                "be neither ranked nor sliced: use a checkpoint in float32, float16 or bfloat16."
            )
        axis = NEURON_AXIS[projection] if part == "weight" else 0
        tensor = NarrowedTensor(self, projection, part, axis, source, target)
        self._sources[projection, part] = tensor
        return tensor

    def stored_width(self) -> int:
        """Return the number of neurons in the checkpoint.

        Raises:
            ValueError: Its tensors do not fit together.
        """
        gate = self._sources["gate_proj", "weight"].stored_shape()
        stored = gate[0] if len(gate) == 2 and gate[0] >= 1 else self._width_before
        for (projection, part), tensor in self._sources.items():
            shape = tensor.stored_shape()
            if shape != shape_of(projection, part, stored, self._hidden_size):
                says = shape_of(projection, part, self._width_before, self._hidden_size)
                raise ValueError(
                    f"{self.name}.{projection}.{part} has shape {shape} in the checkpoint, but "
                    f"its config.json says {says}."
                )
        return stored

    @property
    def is_untouched(self) -> bool:
        """Whether none of its weights was asked for."""
        return self._kept is None

    def kept(self) -> Tensor:
        """Return the kept neurons, shape (k,), int64, on the CPU."""
        with self._lock:
            return self._kept_set(_CPU)

    def take(self, tensor: NarrowedTensor, device: torch.device) -> Tensor:
        """Return the narrowed weights of `tensor` in its target dtype, new ones on `device`."""
        try:
            with self._locked(device):
                kept = self._kept_set(device)
                key = (tensor.projection, tensor.part)
                if key in self._ready:
                    return self._ready.pop(key)
            weight = tensor.read()
            if tensor.part == "weight":
                self._check(tensor, weight)
            return tensor.narrowed(weight, kept, device)
        except Exception as error:
            self._session.error = self._session.error or error
            raise

    def _check(self, tensor: NarrowedTensor, weight: Tensor) -> None:
        """Refuse NaN and infinity in the target dtype, in which large weights may overflow."""
        dtype = tensor.dtype or weight.dtype
        overflows = torch.finfo(dtype).max < torch.finfo(weight.dtype).max
        # Scores prove it of gate and up as they are stored.
        if tensor.projection != "down_proj" and not overflows:
            return
        name = f"{self.name}.{tensor.projection}.weight"
        finite = self._session.known.finite
        if name not in finite:
            check_finite(name, weight, dtype)
            finite.add(name)

    @contextlib.contextmanager
    def _locked(self, device: torch.device) -> Iterator[None]:
        """Hold the lock; while another thread has it, score an MLP that comes later."""
        if not self._lock.acquire(blocking=False):
            later = self.following
            while later is not None and not later._lock.acquire(blocking=False):
                later = later.following
            if later is not None:
                try:
                    later._kept_set(device)
                finally:
                    later._lock.release()
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def score(self) -> None:
        """Score the neurons, if that was not done, and read nothing but gate and up."""
        scores = self._session.known.scores
        if self.name not in scores:
            gate, up = (self._sources[p, "weight"] for p in ("gate_proj", "up_proj"))
            scores[self.name] = self._score(gate.read(), up.read())

    def _kept_set(self, device: torch.device) -> Tensor:
        if self._kept is None:
            self._kept = self._choose(device)
        return self._kept

    def _choose(self, device: torch.device) -> Tensor:
        if self.width == self._width_before:
            return torch.arange(self.width, device=_CPU)
        scores = self._session.known.scores
        if self.name in scores:
            return kept_set(scores[self.name], self.width)
        gate, up = (self._sources[p, "weight"] for p in ("gate_proj", "up_proj"))
        weights = gate.read(), up.read()
        scores[self.name] = self._score(*weights)
        kept = kept_set(scores[self.name], self.width)
        # The weights are in the processor's cache now.
        for tensor, weight in zip((gate, up), weights, strict=True):
            self._check(tensor, weight)
            ready = tensor.narrowed(weight, kept, device)
            self._ready[tensor.projection, "weight"] = ready
        return kept

    def _score(self, gate: Tensor, up: Tensor) -> Tensor:
        plan = self._session.plan
        with self._session.scoring(self._criterion):
            return score(
                plan, self.name, self.layer, gate, up, criterion=self._criterion
            )


class NarrowedTensor:
    """A checkpoint entry that reads as if it had been saved with the kept width.

    It follows the protocol of a safetensors slice: `get_shape`, `get_dtype` and
    indexing. ``entry[...]`` is the entry itself and ``.to`` reads it, because
    that is how transformers materialises an entry on a device.
    """

    def __init__(
        self,
        mlp: NarrowedMlp,
        projection: str,
        part: str,
        axis: int,
        source,
        target: tuple[torch.device, torch.dtype],
    ):
        self.projection = projection
        self.part = part
        self.axis = axis
        self.mlp = mlp
        self._source = source
        self.device, self.dtype = target
        #: Returns the part of a larger parameter that this tensor fills.
        self.place: Callable[[torch.device, torch.dtype], Tensor] | None = None

    def get_shape(self) -> list[int]:
        """Return the narrowed shape."""
        shape = self.stored_shape()
        shape[self.axis] = self.mlp.width
        return shape

    def stored_shape(self) -> list[int]:
        """Return the unpruned shape."""
        return list(self._source.get_shape())

    def get_dtype(self) -> str:
        """Return the stored dtype in safetensors' notation, such as ``BF16``."""
        return self._source.get_dtype()

    def __getitem__(self, index):
        if index is Ellipsis:
            return self
        # A shard, which must not hold on to those of the other ranks.
        return self.mlp.take(self, _CPU)[index].clone()

    def to(self, device=None, dtype=None, **kwargs) -> Tensor:
        """Read, narrow and move the weights."""
        return self.mlp.take(self, self.device).to(device=device, dtype=dtype)

    def read(self) -> Tensor:
        """Return the unpruned weights as they lie in the file, without a copy if it can be."""
        # safetensors follows torch's default device.
        with _CPU:
            return self._source[...]

    def narrowed(self, weight: Tensor, kept: Tensor, device: torch.device) -> Tensor:
        """Return the kept neurons of `weight` in the target dtype, on `device` or in their place."""
        out, dtype = None, self.dtype or weight.dtype
        if self.place is not None:
            out = self.place(device, dtype)
        elif device.type != "cpu":
            out = torch.empty(self.get_shape(), dtype=dtype, device=device)
        return narrow(weight, kept, self.axis, self.dtype, out)


class RegionOfSource:
    """The part of a checkpoint entry that holds one projection, as an entry."""

    def __init__(self, region: Region, source):
        self._region = region
        self._source = source

    def get_shape(self) -> list[int]:
        with torch.device("meta"):
            whole = torch.empty(self._source.get_shape())
            try:
                return list(self._region.view(whole).shape)
            except (IndexError, RuntimeError):
                return list(whole.shape)

    def get_dtype(self) -> str:
        return self._source.get_dtype()

    def __getitem__(self, index):
        return self._region.read(self._source).contiguous()[index]


class AssembledTensor:
    """A checkpoint entry made of the `NarrowedTensor`s of several projections.

    It is allocated once, and each projection is gathered into its place.
    """

    def __init__(self, pieces: Mapping[Region, NarrowedTensor]):
        self.pieces = pieces
        self._whole: Tensor | None = None
        self._lock = threading.Lock()
        for region, piece in pieces.items():
            piece.place = functools.partial(self._place, region)

    def get_shape(self) -> list[int]:
        """Return the narrowed shape."""
        with torch.device("meta"):
            return list(
                assemble(
                    {s: torch.empty(p.get_shape()) for s, p in self.pieces.items()}
                ).shape
            )

    def get_dtype(self) -> str:
        """Return the stored dtype in safetensors' notation, such as ``BF16``."""
        return next(iter(self.pieces.values())).get_dtype()

    def __getitem__(self, index):
        return self if index is Ellipsis else self._filled(_CPU)[index].clone()

    def to(self, device=None, dtype=None, **kwargs) -> Tensor:
        """Read, narrow, assemble and move the weights."""
        target = next(iter(self.pieces.values())).device
        return self._filled(target).to(device=device, dtype=dtype)

    def _place(
        self, region: Region, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        with self._lock:
            if self._whole is None:
                self._whole = torch.empty(self.get_shape(), dtype=dtype, device=device)
            return region.view(self._whole)

    def _filled(self, device: torch.device) -> Tensor:
        for piece in self.pieces.values():
            piece.mlp.take(piece, device)
        with self._lock:
            whole, self._whole = self._whole, None
        assert whole is not None
        return whole


def layer_by_layer(entries: dict[str, Any]) -> list[str]:
    """Order the keys so that an MLP is read in one go and can be dropped."""
    members: dict[int, list[str]] = {}
    for key, entry in entries.items():
        members.setdefault(_owner(entry), []).append(key)
    return [key for keys in members.values() for key in keys]


def _owner(entry: Any) -> int:
    """Identify the MLP to which an entry belongs; other entries stand for themselves."""
    if isinstance(entry, AssembledTensor):
        entry = next(iter(entry.pieces.values()))
    return id(entry.mlp if isinstance(entry, NarrowedTensor) else entry)
