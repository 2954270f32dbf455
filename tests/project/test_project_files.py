"""Files and names that prose mentions exist, and workflows may do little."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import pkgutil
import re
from typing import TYPE_CHECKING

import pytest
import yaml

from lm_eval_pruned.pruning import criteria
from tests.helpers.checkpoints import ROOT


if TYPE_CHECKING:
    import pathlib

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
#: A path from the root of the repository, wherever it stands.
PATH = re.compile(
    r"(?<![\w./-])(?:lm_eval_pruned|model_wrappers|tasks|tests|benchmarks|tools|docs|\.github|\.ci)"
    r"/[\w./-]*\w\.(?:py|md|ya?ml|jsonl?|csv|html|sh|cff|svg|ipynb)\b"
)
#: Made by whoever runs a command.
WRITTEN_LATER = {"docs/measurements/gpu-CARD.md"}


def written() -> list[pathlib.Path]:
    """Return what people read: all prose but the changelog, and all source but tests."""
    prose = [*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.*")]
    for folder in ("docs", "tasks"):
        prose += (ROOT / folder).rglob("*.md")
    for folder in ("lm_eval_pruned", "model_wrappers", "tasks", "benchmarks", "tools"):
        prose += (ROOT / folder).rglob("*.py")
    return [path for path in prose if path.is_file() and path.name != "CHANGELOG.md"]


def test_files_that_are_named_or_linked_exist():
    for path in written():
        # It speaks of the harness's repository.
        if "upstream" in str(path.relative_to(ROOT)):
            continue
        text = path.read_text(encoding="utf-8")
        names = {*PATH.findall(text)} - WRITTEN_LATER
        if path.parent == ROOT:
            names |= {*re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)}
        assert not [name for name in names if not (ROOT / name).exists()], path


def test_names_of_the_package_that_are_mentioned_exist():
    mentioned = {
        name
        for path in written()
        for name in re.findall(r"`(lm_eval_pruned(?:\.\w+)+)`", path.read_text("utf-8"))
    }
    assert len(mentioned) > 10
    for name in mentioned - {criteria.GROUP}:  # a group of entry points
        # Modules are found, not imported: some need a package that is not installed here.
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(name) is not None:
                continue
        pkgutil.resolve_name(name)


def test_the_citation_is_of_this_version():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == config["metadata"]["version"]
    assert citation["repository-code"] == config["metadata"]["url"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_hold_no_secrets_and_may_do_little(path):
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert "secrets." not in text
    assert "pull_request_target" not in text
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        # A job that may write runs no code of a pull request.
        if "permissions" in job:
            assert not any("run" in step for step in job["steps"])
