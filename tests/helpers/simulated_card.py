"""A device called ``card``, simulated by CPU memory: what CUDA refuses, it refuses.

Importing this registers the device for the rest of the process, so that tests run it
in a process of its own (`tests.helpers.on_the_card`). Its operations compute on the CPU,
raise if a tensor of another device is among their arguments, and count the bytes that
the device holds, in all threads. A copy to it that is asked for with ``non_blocking``
reads its source no sooner than someone waits for it, the latest moment that CUDA allows.

Strides are those of contiguous tensors, also where the tensor is a view.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend


_lock = threading.RLock()
#: By identity of the storage of a tensor on the card: that storage, and its numbers.
_numbers: dict[int, tuple[StorageWeakRef, torch.Tensor]] = {}
_waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
_peak = 0


def held_bytes() -> int:
    """Return the bytes that tensors on the card hold."""
    with _lock:
        for key in [k for k, (storage, _) in _numbers.items() if storage.expired()]:
            del _numbers[key]
        storages = [numbers.untyped_storage() for _, numbers in _numbers.values()]
        return sum({s._cdata: s.nbytes() for s in storages}.values())


def peak_bytes() -> int:
    """Return the most bytes that the card has held since `forget_peak`."""
    return _peak


def forget_peak() -> None:
    global _peak
    _peak = held_bytes()


def _wait() -> None:
    """Carry out the copies that nobody waited for yet."""
    with _lock:
        for target, source in _waiting:
            target.copy_(source)
        _waiting.clear()


def _is_on_card(value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "card"


def _numbers_of(value):
    if not _is_on_card(value):
        return torch.device("cpu") if isinstance(value, torch.device) else value
    with _lock:
        return _numbers[value.untyped_storage()._cdata][1]


def _put(numbers: torch.Tensor) -> torch.Tensor:
    global _peak
    tensor = torch._C._acc.create_empty_tensor(numbers.shape, numbers.dtype)
    storage = tensor.untyped_storage()
    with _lock:
        _numbers[storage._cdata] = (StorageWeakRef(storage), numbers)
        _peak = max(_peak, held_bytes())
    return tensor


def _copy(target, source, non_blocking=False):
    numbers, source_numbers = _numbers_of(target), _numbers_of(source)
    if non_blocking and _is_on_card(target) and not _is_on_card(source):
        with _lock:
            _waiting.append((numbers, source_numbers))
        return target
    if _is_on_card(source):
        _wait()
    numbers.copy_(source_numbers)
    return target


def _run(operation, *args, **kwargs):
    aten = torch.ops.aten
    if operation is aten.copy_.default:
        return _copy(*args, **kwargs)
    if operation is aten._copy_from.default:
        source, target, *non_blocking = args
        return _copy(target, source, *non_blocking, **kwargs)
    flat, structure = pytree.tree_flatten((args, kwargs))
    here = {id(_numbers_of(value)): value for value in flat if _is_on_card(value)}
    if here and not any(r.alias_info for r in operation._schema.returns):
        _wait()
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
