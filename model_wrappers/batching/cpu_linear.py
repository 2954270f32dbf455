"""Linear layers on a CPU: the faster of two libraries, and weights packed once.

PyTorch sends float32 products on x86 to MKL, which leaves half of the vector width
of AMD's processors from family 26 (Zen 5) on unused: 103 GFLOP/s a thread on such an
EPYC, against 220 through oneDNN. On family 25 with AVX-512 (Zen 4), whose units are half
as wide, oneDNN is faster by a tenth in a layer and by a quarter in an output embedding.
Both are IEEE float32; results differ by the order of summation, so the choice follows
from the processor alone and is the same in every run on a machine.

Either library brings a weight into an order of its own before it multiplies, and does so
in every call. `pack_linears` has it done once for many calls, at the price of a second copy
of the weights.
"""

from __future__ import annotations

import logging
import platform
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
import torch.nn.functional as F


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

eval_logger = logging.getLogger("lm_eval.models.cpu_linear")

_CPUINFO = Path("/proc/cpuinfo")

# Rows of input from which on a packed weight is used: on them MKL's results are the
# same to the bit as those of the plain weight. Those of oneDNN are for two rows or more.
_FEWEST_ROWS = 16
# Rows, over a whole task, from which on packing takes less time than it saves.
_WORTH_PACKING = 2048
# What the libraries are told to expect. Packed for few, MKL is slow at many; packed for
# many, it is as fast at few as packed for these.
_EXPECTED_ROWS = 1024
# Of the memory that is free, the share that packed weights may take.
_SHARE_OF_MEMORY = 1 / 3


def float32_layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Return the linear layers of `model` that lie on a CPU in float32."""
    return [
        layer
        for layer in model.modules()
        if type(layer) is torch.nn.Linear
        # Quantised and distributed tensors call themselves float32 as well.
        and type(layer.weight) in (torch.nn.Parameter, torch.Tensor)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
    ]


def _ours(model: torch.nn.Module) -> list[torch.nn.Linear]:
    # What has a forward of its own has somebody else's, such as accelerate's hook.
    return [layer for layer in float32_layers(model) if "forward" not in vars(layer)]


@dataclass(frozen=True)
class PackedWeight:
    """A weight in the order in which a library multiplies it.

    Attributes:
        weight: As it is in the model.
        packed: For the library.
        onednn: The library is oneDNN; else MKL.
    """

    weight: torch.Tensor
    packed: torch.Tensor
    onednn: bool

    @property
    def fewest_rows(self) -> int:
        """Rows of input from which on it is used."""
        return 2 if self.onednn else _FEWEST_ROWS

    @classmethod
    def of(cls, weight: torch.Tensor, onednn: bool) -> PackedWeight:
        """Pack a float32 weight, [out, in], for any number of rows.

        Raises:
            RuntimeError, AttributeError: PyTorch lacks it, or the memory is too short.
        """
        plain = weight.detach().contiguous()
        if onednn:
            packed = torch.ops.mkldnn._reorder_linear_weight(plain, _EXPECTED_ROWS)
        else:
            packed = torch.ops.mkl._mkl_reorder_linear_weight(plain, _EXPECTED_ROWS)
        return cls(weight, packed, onednn)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return what `torch.nn.functional.linear` does for two rows or more."""
        if self.onednn:
            return _onednn_product(x, self.packed, bias)
        rows = x.numel() // x.shape[-1]
        return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, bias, rows)

    def is_right(self) -> bool:
        """Compare with the plain product, for few rows and for many."""
        generator = torch.Generator().manual_seed(0)
        for rows in (self.fewest_rows, 100):
            x = torch.randn(rows, self.weight.shape[1], generator=generator)
            expected = F.linear(x, self.weight)
            spread = float(expected.abs().amax())
            if not torch.allclose(self(x, None), expected, 1e-4, 1e-4 * spread):
                return False
        return True


# Library and shapes of weights whose products were compared, once in a process: the
# operators are private.
_TRIED: set[tuple[bool, torch.Size]] = set()

#: Packed weights by layer.
Packs = dict[torch.nn.Linear, PackedWeight]


def pack_linears(model: torch.nn.Module, rows: int) -> Packs:
    """Pack the float32 linear layers of `model` where that saves time.

    What is returned holds for the weights as they are now: pack anew for each task.

    Args:
        model: Its layers on other devices, of other dtypes or of other classes than
            `torch.nn.Linear` are left alone.
        rows: Rows of input that each layer is about to see, over all calls.
    """
    layers = [layer for layer in _ours(model) if layer.weight.numel()]
    if rows < _WORTH_PACKING or not layers or not _can_pack():
        return {}
    size = sum(layer.weight.nbytes for layer in layers)
    if size > _SHARE_OF_MEMORY * psutil.virtual_memory().available:
        _say_once(
            f"a second copy of them, {size / 2**20:.0f} MiB, is more than a third of "
            "the memory that is free"
        )
        return {}
    onednn = linear_backend() == "onednn"
    packs: Packs = {}
    try:
        with torch.no_grad():
            for layer in layers:
                pack = packs[layer] = PackedWeight.of(layer.weight, onednn)
                kind = (onednn, layer.weight.shape)
                if kind not in _TRIED and not pack.is_right():
                    raise RuntimeError("a product of theirs is wrong")
                _TRIED.add(kind)
    # AttributeError where a release has other operators.
    except (AttributeError, RuntimeError) as error:
        _say_once(str(error).partition("\n")[0])
        return {}
    return packs


def linear_name(packed: bool) -> str:
    """Return what computes float32 linear layers here, for the results file."""
    if not packed:
        return linear_backend()
    return "onednn packed" if linear_backend() == "onednn" else "mkl packed"


def _can_pack() -> bool:
    """Return whether the library that multiplies here is faster with packed weights."""
    if linear_backend() == "onednn":
        return True
    # Of packed weights, MKL shares out few rows among threads badly: two threads took longer.
    return torch.backends.mkl.is_available() and torch.get_num_threads() == 1


@cache
def _say_once(why: str) -> None:
    eval_logger.warning("Weights of linear layers are not packed: %s.", why)


@contextmanager
def fast_cpu_linears(
    model: torch.nn.Module, packs: Packs | None = None
) -> Iterator[None]:
    """Let the float32 linear layers of `model` run through what is faster here.

    For inference: gradients do not pass. Layers on other devices, of other dtypes or
    of other classes than `torch.nn.Linear`, and models on a CPU where nothing is
    faster, are left alone. On exit all is as before.

    Args:
        model: The model.
        packs: Weights of it that `pack_linears` packed.
    """
    packs = packs or {}
    plain: Callable[..., torch.Tensor]
    if linear_backend() == "onednn":
        layers = _ours(model)
        plain = _onednn
    else:
        # What was packed, unless it got another forward since.
        layers = [layer for layer in packs if "forward" not in vars(layer)]
        plain = F.linear
    for layer in layers:
        layer.forward = partial(  # type: ignore[method-assign]
            _linear, layer, packs.get(layer), plain
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _linear(
    layer: torch.nn.Linear,
    pack: PackedWeight | None,
    plain: Callable[..., torch.Tensor],
    x: torch.Tensor,
) -> torch.Tensor:
    rows = x.numel() // max(1, x.shape[-1])
    # A single row waits for the memory, whichever library reads the weights.
    if rows == 1 or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, layer.weight, layer.bias)
    if pack is not None and rows >= pack.fewest_rows and pack.weight is layer.weight:
        return pack(x, layer.bias)
    return plain(x, layer.weight, layer.bias)


def _onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if _product_is_right():
        return _onednn_product(x, weight, bias)
    # The public way, to the same bits, which copies the input and the output.
    return F.linear(x.to_mkldnn(), weight, bias).to_dense()


def _onednn_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply by a weight, packed or as it lies, of two rows or more."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def _product_is_right() -> bool:
    """Try `_onednn_product` on a weight as it lies, once in a process."""
    weight = torch.randn(48, 40, generator=torch.Generator().manual_seed(0))
    try:
        if PackedWeight(weight, weight, onednn=True).is_right():
            return True
        why = "a product of its is wrong"
    # AttributeError where a release has another operator.
    except (AttributeError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
    eval_logger.warning("What oneDNN multiplies is copied to it and back: %s.", why)
    return False


@cache
def linear_backend() -> str:
    """Return what computes float32 linear layers on this CPU: ``onednn`` or ``torch``.

    ``torch`` is `torch.nn.functional.linear` with whatever library it was built with.
    """
    if torch.backends.mkldnn.is_available() and _mkl_is_slower():
        return "onednn"
    return "torch"


def _mkl_is_slower() -> bool:
    vendor, family = processor()
    return (
        vendor == "AuthenticAMD"
        and family >= 25
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    )


def processor() -> tuple[str, int]:
    """Return vendor and family of the CPU, ``("", 0)`` where the system does not tell."""
    text = _CPUINFO.read_text(errors="replace") if _CPUINFO.exists() else ""
    vendor = re.search(r"^vendor_id\s*: (\S+)", text, re.MULTILINE)
    family = re.search(r"^cpu family\s*: (\d+)", text, re.MULTILINE)
    if vendor is None or family is None:
        # As Windows writes it: AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD.
        text = platform.processor()
        vendor = re.search(r", (\S+)$", text)
        family = re.search(r"Family (\d+)", text)
    if vendor is None or family is None:
        return "", 0
    return vendor[1], int(family[1])
