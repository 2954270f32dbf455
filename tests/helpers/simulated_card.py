"""A device called ``card``, simulated by CPU memory: what CUDA refuses, it refuses.

Importing this registers the device for the rest of the process, so that tests run it in a separate
process (`tests.helpers.on_the_card`). Its operations compute on the CPU, and
raise if a tensor of another device is among their arguments.

Strides are those of contiguous tensors, also where the tensor is a view.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


#: Whether the card refuses float64, as Apple's GPUs do.
without_float64 = False
_lock = threading.RLock()
#: By identity of the storage of a tensor on the card: that storage, and its numbers.
_numbers: dict[int, tuple[StorageWeakRef, torch.Tensor]] = {}


def _is_on_card(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "card"


def _numbers_of(value):
    if not _is_on_card(value):
        return torch.device("cpu") if isinstance(value, torch.device) else value
    with _lock:
        return _numbers[value.untyped_storage()._cdata][1]


def _put(numbers: torch.Tensor) -> torch.Tensor:
    if without_float64 and numbers.dtype == torch.float64:
        raise TypeError("the card has no float64")
    tensor = torch._C._acc.create_empty_tensor(numbers.shape, numbers.dtype)
    storage = tensor.untyped_storage()
    with _lock:
        for key in [k for k, (held, _) in _numbers.items() if held.expired()]:
            del _numbers[key]
        _numbers[storage._cdata] = (StorageWeakRef(storage), numbers)
    return tensor


def _run(operation, *args, **kwargs):
    aten = torch.ops.aten
    if operation in (aten.copy_.default, aten._copy_from.default):
        first, second, *_ = args
        copied = operation is aten._copy_from.default
        source, target = (first, second) if copied else (second, first)
        _numbers_of(target).copy_(_numbers_of(source))
        return target
    flat, structure = pytree.tree_flatten((args, kwargs))
    here = {id(_numbers_of(value)): value for value in flat if _is_on_card(value)}
    for value in flat:
        # Only a number may come from elsewhere.
        other = isinstance(value, torch.Tensor) and not _is_on_card(value)
        if other and value.dim() and operation is not aten._to_copy.default:
            raise RuntimeError(f"{operation} mixes card and {value.device}")
    devices = [value for value in flat if isinstance(value, torch.device)]
    stays = devices[0].type == "card" if devices else bool(here)
    args, kwargs = pytree.tree_unflatten(map(_numbers_of, flat), structure)
    try:
        result = operation(*args, **kwargs)
    except RuntimeError:
        # Because strides are made up, what should be copied asks for a view.
        if operation is not aten.view.default:
            raise
        result = args[0].reshape(args[1])
    if not stays:
        return result
    return pytree.tree_map_only(
        torch.Tensor, lambda t: here[id(t)] if id(t) in here else _put(t), result
    )


def _register() -> list[torch.library.Library]:
    _setup_privateuseone_for_python_backend("card")
    # `torch.utils.checkpoint` asks for it.
    torch.get_device_module("card").get_amp_supported_dtype = lambda: [torch.bfloat16]
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    aten, has = torch.library.Library("aten", "IMPL"), _has_kernel
    for name in torch._C._dispatch_get_all_op_names():
        room, _, own_name = name.partition("::")
        base, _, overload = own_name.partition(".")
        computes = has(name, "CPU") or has(name, "CompositeExplicitAutograd")
        # These share the storage, by which the numbers are found.
        if room != "aten" or not computes or base in ("detach", "alias"):
            continue
        operation = getattr(getattr(torch.ops.aten, base), overload or "default")
        is_out = any(argument.is_out for argument in operation._schema.arguments)
        if not is_out and not has(name, "CompositeImplicitAutograd"):
            aten.impl(own_name, functools.partial(_run, operation), "PrivateUse1")
    return [everything, aten]


_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
_libraries = _register()
