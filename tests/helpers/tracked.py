"""A copy of the repository's tracked files, which a test may change and build in."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.helpers.checkpoints import ROOT


if TYPE_CHECKING:
    from pathlib import Path


def copy_of_the_tree(target: Path) -> Path:
    """Copy the tracked files, as they are now, to `target`; skip without git."""
    how = {"cwd": ROOT, "capture_output": True, "text": True}
    listed = subprocess.run(["git", "ls-files", "-z"], check=False, **how)
    if listed.returncode:
        pytest.skip("this is not a clone of the repository")
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() or source.is_file():
            shutil.copy(source, target / name, follow_symlinks=False)
    return target
