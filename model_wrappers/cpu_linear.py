"""Linear layers on a CPU through the faster of the two libraries PyTorch carries.

PyTorch sends float32 products on x86 to MKL, which leaves half of the vector width
of processors other than Intel's unused (measured on an AMD EPYC of family 26: 103
GFLOP/s a thread, against 220 through oneDNN). Both are IEEE float32; results differ
by the order of summation.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Below this advantage the library that everything else uses is used here, too.
_WORTH_IT = 1.2


@contextmanager
def fast_cpu_linears(model: torch.nn.Module) -> Iterator[None]:
    """Let the float32 linear layers of `model` run through oneDNN where that is faster.

    For inference: gradients do not pass. Layers on other devices, of other dtypes or
    of other classes than `torch.nn.Linear`, and models on a CPU where oneDNN is no
    faster, are left alone. On exit all is as before.
    """
    layers = [
        layer
        for layer in model.modules()
        if type(layer) is torch.nn.Linear
        # Somebody else's replacement, such as accelerate's hook.
        and "forward" not in vars(layer)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
    ]
    if not layers or not onednn_is_faster(torch.get_num_threads()):
        yield
        return
    for layer in layers:
        layer.forward = partial(_linear, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, layer.weight, layer.bias)
    return _onednn(x, layer.weight, layer.bias)


def _onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def onednn_is_faster(threads: int) -> bool:
    """Measure, for some ten milliseconds, once per process and number of `threads`."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.randn(128, 512), torch.randn(1024, 512)
    try:
        _onednn(x, weight, None)
    except (AttributeError, RuntimeError):
        # The operator is not part of PyTorch's documented interface.
        return False
    with torch.no_grad():
        contestants: list[Callable[..., torch.Tensor]] = [F.linear, _onednn]
        seconds = [
            min(_seconds(contestant, x, weight) for _ in range(7))
            for contestant in contestants
        ]
    return seconds[0] > _WORTH_IT * seconds[1]


def _seconds(
    linear: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor
) -> float:
    begin = time.perf_counter()
    linear(x, weight, None)
    return time.perf_counter() - begin
