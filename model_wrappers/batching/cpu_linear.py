"""Linear layers on a CPU through the faster of two libraries.

PyTorch sends float32 products on x86 to MKL, which leaves half of the vector width
of AMD's processors from family 26 (Zen 5) on unused: 103 GFLOP/s a thread on such an
EPYC, against 220 through oneDNN. On family 25 with AVX-512 (Zen 4), whose units are half
as wide, oneDNN is faster by a tenth in a layer and by a quarter in an output embedding.
On Intel's, oneDNN took 20 to 40 % longer.
Both are IEEE float32; results differ by the order of summation, so the choice follows
only from the processor and is the same in every run on a machine.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F


if TYPE_CHECKING:
    from collections.abc import Iterator

_CPUINFO = Path("/proc/cpuinfo")


def faster_layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Return the linear layers of `model` that oneDNN computes faster here: in float32, on such a CPU.

    None of a model that lies elsewhere, whatever the processor beside it is, or that compressed-tensors
    made: it unpacks itself in its first pass, and puts functions of its own in place of all forwards.
    """
    packs = any(hasattr(layer, "quantization_scheme") for layer in model.modules())
    if faster_library() != "onednn" or packs:
        return []
    return [
        layer
        for layer in model.modules()
        if type(layer) is torch.nn.Linear and _is_plain(layer)
    ]


def _is_plain(layer: torch.nn.Linear) -> bool:
    # Packed layers have none: those of compressed-tensors until they run for the first time.
    weight: Any = getattr(layer, "weight", None)
    return (
        # A forward in the instance is somebody else's, such as accelerate's hook.
        "forward" not in vars(layer)
        # Quantised and distributed tensors call themselves float32 as well.
        and type(weight) in (torch.nn.Parameter, torch.Tensor)
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
    )


@contextmanager
def fast_cpu_linears(model: torch.nn.Module) -> Iterator[None]:
    """Let the float32 linear layers of `model` run through what is faster here.

    For inference: gradients do not pass. Layers on other devices, of other dtypes or
    of other classes than `torch.nn.Linear`, and models on a CPU where nothing is
    faster, stay as they are. On exit all is as before.
    """
    layers = faster_layers(model)
    forwards = [partial(_linear, layer) for layer in layers]
    for layer, forward in zip(layers, forwards, strict=True):
        layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, forward in zip(layers, forwards, strict=True):
            if layer.forward is forward:
                del layer.forward


def _linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    # A single row waits for the memory, whichever library reads the weights.
    single = x.numel() == x.shape[-1]
    if single or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, layer.weight, layer.bias)
    return F.linear(x.to_mkldnn(), layer.weight, layer.bias).to_dense()


def linear_backend(model: torch.nn.Module) -> str:
    """Return what computes the linear layers of a model in a fast path: ``onednn`` or ``torch``.

    ``torch`` is `torch.nn.functional.linear` with whatever library it was built with.
    """
    return "onednn" if faster_layers(model) else "torch"


@cache
def faster_library() -> str:
    """Return what computes float32 linear layers faster on this CPU, as `linear_backend` names it."""
    vendor, family = processor()
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if vendor == "AuthenticAMD" and family >= 25 and wide:
        return "onednn" if torch.backends.mkldnn.is_available() else "torch"
    return "torch"


def processor() -> tuple[str, int]:
    """Return vendor and family of the CPU, ``("", 0)`` where Linux does not tell."""
    text = _CPUINFO.read_text(errors="replace") if _CPUINFO.exists() else ""
    vendor = re.search(r"^vendor_id\s*: (\S+)", text, re.MULTILINE)
    family = re.search(r"^cpu family\s*: (\d+)", text, re.MULTILINE)
    return (vendor[1], int(family[1])) if vendor and family else ("", 0)
