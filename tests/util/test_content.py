"""A file is identified by what it holds, without reading all of it."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from lm_eval_pruned.util.content import content_digest


def _with_size_and_time_kept(file, change):
    before = file.stat()
    change()
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


@pytest.mark.parametrize("changed", range(3))
def test_another_tensor_in_a_large_file_is_another_content(changed, tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = {str(n): torch.full((400_000,), 1.0) for n in range(3)}
    save_file(tensors, file)
    found = content_digest(file)
    assert found == content_digest(file)
    tensors[str(changed)] *= 2
    _with_size_and_time_kept(file, lambda: save_file(tensors, file))
    assert content_digest(file) != found


@pytest.mark.parametrize("size", [100, 5_000_000])
@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_other_bytes_are_another_content(size, name, tmp_path):
    file = tmp_path / name
    file.write_bytes(bytes(size))
    found = content_digest(file)
    _with_size_and_time_kept(file, lambda: file.write_bytes(b"\1" * size))
    assert content_digest(file) != found


def test_little_of_a_large_file_is_read(tmp_path):
    """A file of 1 TB with holes would take minutes to read."""
    file = tmp_path / "model.gguf"
    with file.open("wb") as opened:
        opened.truncate(10**12)
    assert len(content_digest(file)) == 64
