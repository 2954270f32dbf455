"""The patches for lm-evaluation-harness that `tools/upstream.py` writes, one module each."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .patch import Patch


def patches() -> dict[str, Patch]:
    """Return by the name of its branch the ``PATCH`` of every module that holds one."""
    modules = [import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__)]
    found = [module.PATCH for module in modules if hasattr(module, "PATCH")]
    return {patch.branch: patch for patch in found}
