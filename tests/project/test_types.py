"""mypy, as `pyproject.toml` configures it, sees every module that is installed."""

from __future__ import annotations

from mypy.main import process_options

from tests.helpers.checkpoints import ROOT


#: Folders of the repository, and the packages that setup.cfg makes of them.
FOLDERS = {
    "lm_eval_pruned": "lm_eval_pruned",
    "model_wrappers": "lm_eval_pruned.model_wrappers",
    "tasks": "lm_eval_pruned.tasks",
}


def modules() -> dict:
    """Return the files of the installed modules by name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def test_every_installed_module_is_checked_under_its_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    sources, _ = process_options([])
    assert {source.module for source in sources} == modules().keys()
