"""What takes long to measure, kept in the user's cache: one file for each key.

A file holds tensors and facts, and reading it runs nothing. It appears whole or not at all, so any
number of processes may share the folder; whoever deletes it has everything measured anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.util.atomic import appearing


if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from torch import Tensor

    #: Tensors by name, on the CPU, and facts of JSON types by name.
    Measured = tuple[dict[str, Tensor], dict[str, Any]]

# Below the harness's logger, so that its verbosity applies.
logger = logging.getLogger("lm_eval.pruned.cache")

#: Bytes of all entries; beyond them, those that were written first go.
_MOST = 10_000_000_000
#: Seconds after which nobody writes an unfinished file any more.
_ABANDONED = 86_400
#: Raise it when something is measured in another way, so that what was kept before is not used.
_VERSION = 4


def cache_folder() -> Path:
    """Return this package's folder in the user's cache (XDG base directory specification).

    OSError where the user has no home folder, as in a container with the id of nobody.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(root or Path("~/.cache").expanduser(), "lm-eval-pruned")
    except RuntimeError:
        raise OSError(
            "there is no home folder: set XDG_CACHE_HOME to a writable folder."
        ) from None


def measured_once(
    model: Hashable | None, what: Hashable, measure: Callable[[], Measured]
) -> Measured:
    """Return what `measure` says of a model, from the cache if it was measured before.

    Args:
        model: What identifies the model, as its `repr`; None if nothing does, so that nothing is
            kept.
        what: What is measured, on which text and device.
        measure: What takes long.
    """
    import torch
    import transformers
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    if model is None:
        return measure()
    key = (_VERSION, torch.__version__, transformers.__version__, model, what)
    name = hashlib.sha256(repr(key).encode()).hexdigest()

    def file() -> Path:
        return cache_folder() / "measured" / f"{name}.safetensors"

    def kept() -> Measured:
        with safe_open(file(), "pt") as opened:
            about = opened.metadata()
            # Mapped, so that they take no memory.
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        if about["crc32"] != _checksum(tensors, about["facts"]):
            raise ValueError(f"{file()} is damaged")
        return tensors, json.loads(about["facts"])

    with contextlib.suppress(OSError, SafetensorError, ValueError, LookupError):
        return kept()
    tensors, facts = measure()
    try:
        told = json.dumps(facts)
        about = {"facts": told, "crc32": _checksum(tensors, told)}
        with appearing(file()) as unfinished:
            save_file(tensors, unfinished, about)
        measured = kept()
        _tidy(file())
        return measured
    except (OSError, SafetensorError) as error:
        from lm_eval.utils import warning_once

        warning_once(
            logger,
            "The cache cannot be written (%s), so what text says of a model is measured by each load: set "
            "XDG_CACHE_HOME to a writable folder.",
            str(error),
        )
    return tensors, facts


def _checksum(tensors: Mapping[str, Tensor], facts: str) -> str:
    """Return what a damaged file no longer has."""
    import torch

    checksum = zlib.crc32(facts.encode())
    for name in sorted(tensors):
        numbers = tensors[name].contiguous().flatten().view(torch.uint8)
        checksum = zlib.crc32(numbers.numpy().data, checksum)
    return str(checksum)


def _tidy(written: Path) -> None:
    """Remove what killed processes left beside an entry, and the oldest entries beyond `_MOST` bytes."""
    entries, total, now = [], 0, time.time()
    for path in written.parent.iterdir():
        # Another process may tidy up too.
        with contextlib.suppress(OSError):
            about = path.stat()
            entries.append((about.st_mtime, about.st_size, path))
    for at, size, path in sorted(entries, reverse=True):
        unfinished = path.name.startswith(".")
        total += size
        if path != written and (now - at > _ABANDONED if unfinished else total > _MOST):
            # Windows removes no file that is mapped.
            with contextlib.suppress(OSError):
                path.unlink()
