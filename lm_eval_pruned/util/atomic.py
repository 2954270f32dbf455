"""Writing a file or a folder whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterator


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
        Path(name).chmod(
            file.stat().st_mode & 0o777 if file.exists() else 0o666 & ~umask()
        )
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(file.parent)


@contextlib.contextmanager
def appearing_whole(output: Path) -> Iterator[Path]:
    """Yield a folder beside `output` that takes its name when the block succeeds.

    Args:
        output: Path of a folder that is not there yet, or empty.

    Raises:
        OSError: The folder cannot be written, or `output` has come into being.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(
        tempfile.mkdtemp(prefix=f".{output.name}.unfinished-", dir=output.parent)
    )
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
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


def umask() -> int:
    """Return the mode bits that new files of this process must not have."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
