"""mypy, as `pyproject.toml` configures it, sees every module that is installed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mypy.main import process_options

from tests.helpers import checkpoints
from tests.helpers.tracked import copy_of_the_tree


#: Folders of the repository, and the packages that setup.cfg makes of them.
FOLDERS = {
    "lm_eval_pruned": "lm_eval_pruned",
    "model_wrappers": "lm_eval_pruned.model_wrappers",
    "tasks": "lm_eval_pruned.tasks",
}
#: By file: a line that is wrong because of what another module says.
MISTAKES = {
    "lm_eval_pruned/checkpoints/planning.py": "1 + ''",
    "model_wrappers/hf_prefix.py": "1 + ''",
    # No attribute of a mixin: below HFLM, which is Any to mypy, there may be any.
    "model_wrappers/batching/prefix_sharing.py": "check_flag('a')",
    "tasks/demo/utils.py": "mean_over_instructions(1)",
    "tasks/nltk_resources.py": "punkt_is_installed(1)",
}


def test_every_installed_module_is_checked_under_its_name(monkeypatch):
    monkeypatch.chdir(checkpoints.ROOT)
    sources, _ = process_options([])
    expected = set()
    for folder, package in FOLDERS.items():
        for path in (checkpoints.ROOT / folder).rglob("*.py"):
            inside = path.relative_to(checkpoints.ROOT / folder).with_suffix("")
            names = [part for part in inside.parts if part != "__init__"]
            expected.add(".".join([package, *names]))
    assert {source.module for source in sources} == expected


@pytest.mark.slow
def test_a_mistake_is_found_in_each_folder(tmp_path):
    tree = copy_of_the_tree(tmp_path / "repository")
    for file, mistake in MISTAKES.items():
        with (tree / file).open("a", encoding="utf-8") as module:
            module.write(f"\n{mistake}\n")
    run = subprocess.run(
        [sys.executable, "-m", "mypy"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    found = [line.partition(":")[0] for line in run.stdout.splitlines()[:-1]]
    assert sorted(name.removeprefix(".mypy/lm_eval_pruned/") for name in found) == (
        sorted(MISTAKES)
    )
