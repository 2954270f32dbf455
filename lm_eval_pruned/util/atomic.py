"""Writing a file or a folder whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterator


def write_atomically(file: str | Path, content: str | bytes) -> None:
    """Write `content`, text in UTF-8, to `file`; see `appearing`."""
    with appearing(file) as unfinished:
        unfinished.write_bytes(
            content.encode() if isinstance(content, str) else content
        )


@contextlib.contextmanager
def appearing(file: str | Path) -> Iterator[Path]:
    """Yield the name of a file to write, which becomes `file`, durably, when the block succeeds.

    Readers see the old file or the new one. A missing folder is made.

    Raises:
        OSError: The folder cannot be written to; `file` is then as it was.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}-{uuid.uuid4().hex}")
    try:
        yield unfinished
        sync(unfinished)
        if file.exists():
            shutil.copymode(file, unfinished)
        unfinished.replace(file)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        # A full disk is reported of an open file, without its name.
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(file)
        raise
    sync(file.parent)


#: What a lock raises that another process has, or that the disk or the system does not know.
_UNLOCKABLE = (OSError, NotImplementedError)
#: Bytes that the results and pages of a small run take.
ROOM = 2**24


def check_writable(output: Path, needed: int = ROOM) -> None:
    """Refuse a folder that cannot be written, or that has too little room.

    Args:
        output: The folder; where there is none yet, it would be made.
        needed: Bytes that are going to be written there.

    Raises:
        OSError: It cannot be written, or fewer bytes are free.
    """
    output = output.resolve()
    there = next(path for path in (output, *output.parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=there):
            pass
    except OSError as error:
        raise OSError(
            f"output_path={output} cannot be written ({there}: {error.strerror}): pass a folder that "
            "can."
        ) from None
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OSError(
            f"output_path={output} needs {needed:,} bytes, but only {free:,} are free there: pass a "
            "folder on another disk, or make room."
        )


@contextlib.contextmanager
def appearing_whole(output: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of `output` when the block succeeds.

    Until then it lies in another one beside `output`. What a process that was killed left of the same
    `output` is removed first.

    Raises:
        OSError: The folder, or weights, cannot be written, or there is something in `output` already.
    """
    from filelock import FileLock
    from safetensors import SafetensorError

    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output.name}.unfinished-"
    for lock in output.parent.glob(f"{glob.escape(prefix)}*/lock"):
        with contextlib.suppress(*_UNLOCKABLE):
            # Whoever writes there holds it; the system releases the lock of a process that has died.
            with FileLock(lock, timeout=0):
                pass
            shutil.rmtree(lock.parent, ignore_errors=True)
    around = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, around, ignore_errors=True)
        with contextlib.suppress(*_UNLOCKABLE):
            stack.enter_context(FileLock(around / "lock"))
        unfinished = around / output.name
        unfinished.mkdir()
        try:
            yield unfinished
            for path in unfinished.rglob("*"):
                if path.is_file():
                    sync(path)
            try:
                # Windows renames nothing to a folder that is there, not even to an empty one.
                with contextlib.suppress(FileNotFoundError):
                    output.rmdir()
                unfinished.replace(output)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise OSError(
                    f"{output} was written by another process meanwhile, and stays as it is: pass another folder."
                ) from None
        except SafetensorError as error:
            raise OSError(
                f"The weights cannot be written to {output} ({error}): pass a folder on another disk, "
                "or make room."
            ) from None


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        # Windows opens no folder.
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
