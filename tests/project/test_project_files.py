"""Files and names that prose mentions exist, and workflows may do little."""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import pkgutil
import re

import yaml

from lm_eval_pruned.pruning import criteria
from tests.helpers.checkpoints import ROOT


#: A path from the root of the repository, wherever it is written.
PATH = re.compile(
    r"(?<![\w./-])(?:lm_eval_pruned|model_wrappers|tasks|tests|benchmarks|tools|docs|\.github|\.ci)"
    r"/[\w./-]*\w\.(?:py|md|ya?ml|jsonl?|csv|html|sh|cff|svg|ipynb)\b"
)
#: What people read but the changelog; pages on upstream speak of the harness's repository.
PROSE = [
    path
    for pattern in ("*.md", ".github/**/*.*", "docs/**/*.md", "tasks/**/*.md")
    for path in ROOT.glob(pattern)
    if path.is_file()
    and not path.name.startswith("CHANGELOG")
    and "upstream" not in path.parts
]


def test_what_prose_names_or_links_exists():
    for path in PROSE:
        text = path.read_text(encoding="utf-8")
        # Whoever runs a benchmark on a card writes this one.
        files = {*PATH.findall(text)} - {"docs/measurements/gpu-CARD.md"}
        assert not [name for name in files if not (ROOT / name).exists()], path
        names = {*re.findall(r"`(lm_eval_pruned(?:\.\w+)+)`", text)}
        for name in names - {criteria.GROUP}:  # a group of entry points
            # Modules are found, not imported: some need a package that is not installed here.
            with contextlib.suppress(ModuleNotFoundError):
                if importlib.util.find_spec(name) is not None:
                    continue
            pkgutil.resolve_name(name)


def test_a_relative_link_names_a_file_of_the_repository():
    found = ("*.md", "docs/**/*.md", "docs/*.ipynb", "tasks/**/*.md", ".github/**/*.md")
    for path in (path for pattern in found for path in ROOT.glob(pattern)):
        links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text("utf-8"))
        assert not [to for to in links if not (path.parent / to).is_file()], path


def test_only_the_metadata_says_where_the_repository_lives():
    address = re.compile(r"lm-eval-pruned/lm-eval-pruned|lm-eval-pruned\.github\.io")
    found = (
        "*.*",
        "docs/**/*.*",
        "tasks/**/*.*",
        ".github/**/*.*",
        "lm_eval_pruned/**/*.py",
    )
    files = {path for pattern in found for path in ROOT.glob(pattern) if path.is_file()}
    text = {".cff", ".cfg", ".ini", ".ipynb", ".md", ".py", ".toml", ".yaml", ".yml"}
    named = {
        path.name
        for path in files
        if path.suffix in text and address.search(path.read_text("utf-8"))
    }
    assert named == {"setup.cfg"}


def test_runners_install_pytorch_for_the_processor():
    for name in ("action.yml", "docs/examples/pruning-gate.yml", "docs/verdict.md"):
        text = (ROOT / name).read_text("utf-8")
        [line] = re.findall(
            r"(?m)^ *(?:- )?run:.* pip install .*|^ *- run: pip .*", text
        )
        assert "--extra-index-url https://download.pytorch.org/whl/cpu" in line


def test_the_citation_is_of_this_version():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == config["metadata"]["version"]


def test_workflows_hold_no_secrets_and_may_do_little():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        workflow = yaml.safe_load(text)
        assert "secrets." not in text
        assert "pull_request_target" not in text
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            # A job that may write runs no code of a pull request.
            if "permissions" in job:
                assert not any("run" in step for step in job["steps"])


def test_workflows_pin_the_code_of_others_by_commit():
    paths = [ROOT / "action.yml", *(ROOT / ".github" / "workflows").glob("*.yml")]
    uses = [line for p in paths for line in re.findall(r"uses: (.*)", p.read_text())]
    assert len(uses) > 10
    for line in uses:
        assert re.fullmatch(r"\./.*|[\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line
