"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest

from lm_eval_pruned.util.atomic import (
    appearing_whole,
    check_writable,
    write_atomically,
)


def fail(*_):
    raise OSError(errno.ENOSPC, "no space left")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    file = tmp_path / "new" / "a.txt"
    write_atomically(file, "old")
    file.chmod(0o640)
    write_atomically(file, b"newer")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("newer", 0o640)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"no space left.*a\.txt"):
        write_atomically(file, "newest")
    assert [(each.name, each.read_text()) for each in file.parent.iterdir()] == [
        ("a.txt", "newer")
    ]


def test_a_system_that_opens_no_folder_writes_files(tmp_path, monkeypatch):
    """Windows refuses to open a folder."""
    opened = os.open

    def refusing(path, *args, **named):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **named)

    monkeypatch.setattr(os, "open", refusing)
    write_atomically(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_a_folder_appears_when_its_block_succeeds(tmp_path):
    with pytest.raises(ZeroDivisionError), appearing_whole(tmp_path / "b") as folder:
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with appearing_whole(tmp_path / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "b").exists()
    assert [each.name for each in tmp_path.rglob("*")] == ["b", "file"]


def test_the_folder_of_who_was_first_stays(tmp_path):
    second = appearing_whole(tmp_path / "b")
    (second.__enter__() / "file").write_text("second")
    with appearing_whole(tmp_path / "b") as first:
        (first / "file").write_text("first")
    with pytest.raises(OSError, match=r"/b was written by another process meanwhile"):
        second.__exit__(None, None, None)
    assert [*tmp_path.iterdir()] == [tmp_path / "b"]
    assert (tmp_path / "b" / "file").read_text() == "first"


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    kill = "import os, sys; from pathlib import Path\n"
    kill += "from lm_eval_pruned.util.atomic import appearing_whole\n"
    kill += "with appearing_whole(Path(sys.argv[1])) as folder:\n"
    kill += "    (folder / 'shard').write_text('x'); os.kill(os.getpid(), 9)\n"
    ended = subprocess.run([sys.executable, "-c", kill, tmp_path / "b[1]"], check=False)
    (left,) = tmp_path.iterdir()
    assert ended.returncode == -9 and left.name.startswith(".b[1].unfinished-")
    with appearing_whole(tmp_path / "another"):
        assert left.exists()
    with appearing_whole(tmp_path / "b[1]") as first:
        assert not left.exists()
        with pytest.raises(ZeroDivisionError), appearing_whole(tmp_path / "b[1]"):
            raise ZeroDivisionError
        assert first.exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["another", "b[1]"]


def test_a_folder_is_tried_and_measured_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"out cannot be written .*file: Not a directory"):
        check_writable(tmp_path / "file" / "out")
    usage = shutil.disk_usage(tmp_path)._replace(free=999)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    check_writable(tmp_path / "new" / "out", 999)
    with pytest.raises(OSError, match="needs 1,000 bytes, but only 999 are free"):
        check_writable(tmp_path / "new" / "out", 1000)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
