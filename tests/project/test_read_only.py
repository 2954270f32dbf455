"""An installation that cannot be written to, as where an administrator made it, works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.installed import FOLDERS, copy_of_the_tree


PROGRAM = """
import importlib, pkgutil, sys
sys.dont_write_bytecode = True
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path.insert(0, sys.argv[1])
sys.modules.pop("lm_eval_pruned", None)
import lm_eval_pruned
assert lm_eval_pruned.__path__ == [sys.argv[1] + "/lm_eval_pruned"]
for module in pkgutil.walk_packages(lm_eval_pruned.__path__, "lm_eval_pruned."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as missing:
        # The one extra that the tests run without.
        assert missing.name == "vllm", missing
from lm_eval.tasks import TaskManager
tasks = lm_eval_pruned.tasks.__path__[0]
manager = TaskManager(include_path=tasks, include_defaults=False)
manager.load(["pruned_demo"])
"""


@pytest.mark.slow
def test_an_installation_that_cannot_be_written_to_works(tmp_path):
    tree, site = copy_of_the_tree(tmp_path / "tree"), tmp_path / "site"
    for folder, package in FOLDERS.items():
        shutil.copytree(tree / folder, site / package.replace(".", "/"))

    def content():
        return {p: p.is_file() and p.read_bytes() for p in site.rglob("*")}

    before = content()
    for path in [site, *before]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    command = [sys.executable, "-c", PROGRAM, str(site)]
    home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **home}, check=True)
    # Permissions do not stop root.
    assert content() == before
