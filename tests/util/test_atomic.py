"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from lm_eval_pruned.util.atomic import appearing_whole, write_atomically


def fail(*_):
    raise OSError("no space left")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    file = tmp_path / "new" / "a.txt"
    write_atomically(file, "old")
    file.chmod(0o640)
    write_atomically(file, b"newer")
    assert (file.read_text(), file.stat().st_mode & 0o777) == ("newer", 0o640)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="space"):
        write_atomically(file, "newest")
    assert [(each.name, each.read_text()) for each in file.parent.iterdir()] == [
        ("a.txt", "newer")
    ]


def test_a_folder_appears_when_its_block_succeeds(tmp_path):
    with pytest.raises(ZeroDivisionError), appearing_whole(tmp_path / "b") as folder:
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with appearing_whole(tmp_path / "b") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "b").exists()
    assert [each.name for each in tmp_path.rglob("*")] == ["b", "file"]
