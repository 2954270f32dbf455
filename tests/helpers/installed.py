"""The modules that are installed, by the folders of the repository that setup.cfg maps."""

from __future__ import annotations

from functools import cache

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
