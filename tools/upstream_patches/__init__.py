"""The patches for lm-evaluation-harness that `tools/upstream.py` writes, one module each.

A module holds `PATCH`, a `Patch`. It is listed in `PATCHES`, in the order of the pull requests.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .patch import Patch


#: Modules of this package that hold a `PATCH`, in the order of the pull requests.
MODULES = (
    "logits_cache",
    "hf_prefix_small",
    "hf_prefix",
    "task_groups",
    "paired_comparison",
)


def patches() -> dict[str, Patch]:
    """Return all patches by the name of their branch."""
    found = [import_module(f"{__name__}.{name}").PATCH for name in MODULES]
    return {patch.branch: patch for patch in found}
