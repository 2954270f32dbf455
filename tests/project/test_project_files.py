"""What stands in files about the project agrees with setup.cfg and with the tree."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import pathlib
import pkgutil
import re

import pytest
import yaml

from lm_eval_pruned.pruning import criteria
from tests.helpers import checkpoints
from tests.project.test_requirements import extras


ROOT = checkpoints.ROOT
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROSE = ("CONTRIBUTING.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md")
#: Folders of the root, and what files that prose names there end in.
FOLDERS = (
    *("lm_eval_pruned", "model_wrappers", "tasks", "tests", "benchmarks", "tools"),
    *("docs", r"\.github", r"\.ci"),
)
ENDINGS = "py|md|ya?ml|jsonl?|csv|html|sh|cff|svg|ipynb"
#: By page: files that somebody makes who runs a command.
WRITTEN_LATER = {
    (page, "docs/measurements/gpu-CARD.md")
    for page in ("benchmarks/gpu_check.py", "benchmarks/gpu_check.sh")
}


def written() -> list[pathlib.Path]:
    """Return what people read: all prose but the changelog, and all source but tests."""
    prose = [*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.*")]
    for folder in ("docs", "tasks"):
        prose += (ROOT / folder).rglob("*.md")
    for folder in ("lm_eval_pruned", "model_wrappers", "tasks", "benchmarks", "tools"):
        prose += (ROOT / folder).rglob("*.py")
    return [path for path in prose if path.is_file() and path.name != "CHANGELOG.md"]


def metadata() -> configparser.SectionProxy:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config["metadata"]


def load(name: str):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version_and_of_the_study():
    citation = load("CITATION.cff")
    assert citation["title"] == metadata()["name"]
    assert citation["version"] == metadata()["version"]
    assert citation["license"] == metadata()["license"]
    assert citation["repository-code"] == metadata()["url"]
    (study,) = citation["references"]
    assert study["url"] == "https://arxiv.org/abs/2512.22671"
    assert study["url"] in metadata()["project_urls"]


def test_tests_lie_in_folders_that_bear_the_names_of_what_they_test():
    tests = ROOT / "tests"
    folders = {
        path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")
    }
    for folder in folders - {"project", "golden"}:
        assert (ROOT / folder).is_dir() or (ROOT / "lm_eval_pruned" / folder).is_dir()
    assert not any(
        path.name.startswith("test_") for path in (tests / "helpers").iterdir()
    )


def test_one_address_of_the_repository():
    name = metadata()["name"]
    for path in [ROOT / "CITATION.cff", *(ROOT / ".github").rglob("*.*")]:
        text = path.read_text(encoding="utf-8")
        for address in re.findall(rf"https://github\.com/[\w-]+/{name}", text):
            assert address == metadata()["url"], path


def test_every_supported_python_is_tested():
    supported = re.findall(r"Python :: (3\.\d+)", metadata()["classifiers"])
    matrix = load(".github/workflows/tests.yml")["jobs"]["fast"]["strategy"]["matrix"]
    assert matrix["python"] == supported


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_hold_no_secrets_and_may_do_little(path):
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert "secrets." not in text
    assert "pull_request_target" not in text
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        # A job that may write runs no code of a pull request.
        if "permissions" in job:
            assert not any("run" in step for step in job["steps"])


def test_the_hooks_take_the_ruff_that_the_tests_take():
    hooks = load(".pre-commit-config.yaml")["repos"][0]["hooks"]
    wanted = {
        requirement
        for hook in hooks
        if hook["entry"].startswith("ruff")
        for requirement in hook["additional_dependencies"]
    }
    assert wanted == {str(extras()["test"]["ruff"])}


@pytest.mark.parametrize("name", PROSE)
def test_links_lead_to_files(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert not [path for path in linked if not (ROOT / path).exists()]


def test_files_that_are_named_exist():
    """In prose, docstrings and comments, wherever a path starts at the root of the repository."""
    named = re.compile(
        rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w\.(?:{ENDINGS})\b"
    )
    missing = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in written()
        # They speak of the harness's repository.
        if "upstream" not in str(path.relative_to(ROOT))
        for name in named.findall(path.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert missing <= WRITTEN_LATER, missing - WRITTEN_LATER


def test_names_of_the_package_that_are_mentioned_exist():
    groups = {criteria.GROUP}  # of entry points
    mentioned = {
        name
        for path in written()
        for name in re.findall(
            r"`(lm_eval_pruned(?:\.\w+)+)`", path.read_text(encoding="utf-8")
        )
    }
    assert len(mentioned) > 10
    for name in mentioned - groups:
        # Modules are found, not imported: some need a package that is not installed here.
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(name) is not None:
                continue
        pkgutil.resolve_name(name)


def test_no_release_is_installed_where_there_is_none():
    """Until the package is on PyPI, what installs it anew names the repository."""
    for path in (ROOT / "docs" / "examples").iterdir():
        for line in re.findall(r"pip install .*lm-eval-pruned.*", path.read_text()):
            assert f"@ git+{metadata()['url']}" in line, path.name


def test_the_workflow_to_copy_uses_actions_of_the_versions_that_ours_do():
    example = ROOT / "docs" / "examples" / "pruning-gate.yml"
    ours, copied = (
        set(
            re.findall(
                r"uses: (\S+)@(\S+)", "\n".join(map(pathlib.Path.read_text, paths))
            )
        )
        for paths in (WORKFLOWS, [example])
    )
    names = {name for name, _ in ours}
    shared = {(name, version) for name, version in copied if name in names}
    assert len(shared) >= 3
    assert shared <= ours
