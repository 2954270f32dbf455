"""The modules that setup.cfg installs, and the tracked files they are built from."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

import pytest

from tests.helpers.checkpoints import ROOT


FOLDERS = {
    "lm_eval_pruned": "lm_eval_pruned",
    "model_wrappers": "lm_eval_pruned.model_wrappers",
    "tasks": "lm_eval_pruned.tasks",
}


@cache
def modules() -> dict:
    """Return the files of the installed modules by name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def copy_of_the_tree(target):
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
