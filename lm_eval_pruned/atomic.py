"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(file: str | Path, content: str | bytes) -> None:
    """Write `content` to `file`, durably; readers see the old file or the new one.

    Args:
        file: Its folder is made if it is missing.
        content: Text is written in UTF-8.

    Raises:
        OSError: The folder cannot be written to; `file` is then as it was.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(handle, "wb") as unfinished:
            unfinished.write(data)
            unfinished.flush()
            os.fsync(unfinished.fileno())
        # mkstemp makes files that only their owner reads.
        Path(name).chmod(file.stat().st_mode & 0o777 if file.exists() else 0o644)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
