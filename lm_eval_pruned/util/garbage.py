"""Putting off Python's garbage collector while many objects come into being that stay."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Put off the garbage collector.

    Importing model classes and building models set off collections of everything that
    the process holds. With the harness's task index in memory each of them takes a
    third of a second, as long as reading a small model.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
