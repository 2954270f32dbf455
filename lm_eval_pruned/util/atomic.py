"""Writing a file or a folder whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterator


def write_atomically(file: str | Path, content: str | bytes) -> None:
    """Write `content` to `file`, durably; readers see the old file or the new one.

    Text is written in UTF-8. A missing folder is made.

    Raises:
        OSError: The folder cannot be written to; `file` is then as it was.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
    try:
        with unfinished.open("xb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
        sync(unfinished)
        if file.exists():
            shutil.copymode(file, unfinished)
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(file.parent)


@contextlib.contextmanager
def appearing_whole(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` that takes its name when the block succeeds.

    Raises:
        OSError: The folder cannot be written, or there is something in `output` already.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output.name}.unfinished-"
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file():
                sync(path)
        unfinished.chmod(0o755)
        unfinished.replace(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
