"""`tools/upstream.py`, with a stand-in of a few files for a checkout of the harness."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import lm_eval.models
import pytest

from tests.helpers import checkpoints


TOOLS = checkpoints.ROOT / "tools"
#: A checkout: what our patches look for in it, and a test that needs the network.
STAND_IN = {
    "README.md": "# Harness\n\n### Steered Hugging Face `transformers` models\n\nText.\n",
    "lm_eval/__init__.py": "",
    "lm_eval/models/__init__.py": """\
MODEL_MAPPING = {
    "huggingface": "lm_eval.models.huggingface:HFLM",
}
""",
    "lm_eval/models/huggingface.py": """\
def score(requests, greedy_tokens):
    for chunk in requests:
        for part in chunk:
            if part:
                for cont_toks, logits in part:
                    max_equal = (
                        greedy_tokens[:, -cont_toks.shape[1] :] == cont_toks
                    ).all()
                    yield max_equal, logits
""",
    "tests/test_sum.py": """\
import os
import sys

from lm_eval.models import MODEL_MAPPING


def test_of_the_mapping():
    assert "huggingface" in MODEL_MAPPING


def test_of_the_hub():
    assert "HF_HUB_OFFLINE" not in os.environ


def test_of_a_file_that_only_their_machine_has():
    raise OSError
""",
    "tests/test_left_out.py": "raise OSError\n",
    ".github/workflows/unit_tests.yml": "run: pytest -x --ignore=tests/test_left_out.py\n",
    ".pre-commit-config.yaml": """\
repos:
  - repo: https://github.com/pre-commit/pre-commit-hooks
    rev: v6.0.0
    hooks:
      - id: no-commit-to-branch
      - id: linter-of-another-time
  - repo: https://github.com/astral-sh/ruff-pre-commit
    rev: v0.0.1
    hooks:
      - id: ruff-check
        args: [ --fix ]
        exclude: ^lm_eval/tasks/
      - id: ruff-format
""",
    "pyproject.toml": '[tool.ruff.lint]\nselect = ["F"]\n',
}


@pytest.fixture
def upstream(monkeypatch):
    """The driver, as a module."""
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("upstream", TOOLS / "upstream.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "upstream", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def patch_module(upstream):
    """`upstream_patches.patch`, once the folder it is in can be imported from."""
    from upstream_patches import patch

    return patch


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "harness"
    for name, text in STAND_IN.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    git(tmp_path, "init", "--quiet", "--initial-branch=main", "harness")
    git(root, "config", "user.name", "Somebody")
    git(root, "config", "user.email", "somebody@example.org")
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message", "HEAD")
    return root


@pytest.fixture
def run(upstream, patch_module, checkout, monkeypatch, capsys):
    """Return a function that runs the driver for a patch; it returns exit code and output."""
    # The stand-in's tests need none of them.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(files, *options, mends=False, tests=("tests/test_new.py",)):
        def write(root):
            for name, text in files.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text, encoding="utf-8")

        patch = patch_module.Patch("new", "What is new", write, tests, mends)
        monkeypatch.setattr(upstream, "patches", lambda: {"new": patch})
        code = upstream.main([str(checkout), *options])
        out, err = capsys.readouterr()
        return code, out + err

    return run


NEW = {
    "lm_eval/new.py": "def one():\n    return   1\n",
    "tests/test_new.py": "from lm_eval.new import one\n\n\ndef test_one():\n    assert one() == 1\n",
}


def test_a_patch_becomes_a_branch_and_the_checkout_stays_as_it_is(run, checkout):
    (checkout / "notes.txt").write_text("mine")
    code, output = run(NEW)
    assert code == 0, output
    assert git(checkout, "log", "--format=%an %s", "main..new") == (
        "Somebody What is new\n"
    )
    # In the form that their hooks would have given it.
    assert "return 1" in git(checkout, "show", "new:lm_eval/new.py")
    assert git(checkout, "branch", "--show-current") == "main\n"
    assert git(checkout, "status", "--porcelain") == "?? notes.txt\n"
    assert git(checkout, "worktree", "list").count("\n") == 1


def test_what_ran_and_what_did_not_is_said(run):
    _, output = run(NEW)
    assert "not run, because not installed: linter-of-another-time" in output
    assert "no-commit-to-branch" not in output
    # Their configuration names a version that nobody has.
    assert "they use 0.0.1" in output
    assert "tests that pass offline: 1 before, 2 after" in output
    assert "its own tests: 1 passed" in output


def test_a_test_that_passes_no_more_is_named(run):
    code, output = run({**NEW, "lm_eval/models/__init__.py": "MODEL_MAPPING = {}\n"})
    assert code == 1
    assert "no longer: tests.test_sum::test_of_the_mapping" in output
    assert "test_of_the_hub" not in output
    assert "NOT in its state" in output


def test_a_test_of_its_own_that_fails_is_named(run):
    failing = NEW["tests/test_new.py"].replace("== 1", "== 2")
    code, output = run({**NEW, "tests/test_new.py": failing})
    assert code == 1
    assert "failed: tests.test_new::test_one" in output


def test_what_linters_find_in_the_patch_counts(run):
    unknown = NEW["tests/test_new.py"].replace("== 1", "== 1 or nothing_like_it")
    code, output = run({**NEW, "tests/test_new.py": unknown})
    assert code == 1
    assert "nothing_like_it" in output


def test_what_linters_find_at_head_does_not_count(run, checkout):
    model = checkout / "lm_eval" / "models" / "huggingface.py"
    text = f"{model.read_text()}\n\ndef old():\n    return undefined\n"
    model.write_text(text)
    git(checkout, "commit", "--quiet", "--all", "--message", "HEAD, with a finding")
    changed = f"# A line more.\n{text}"
    code, output = run({**NEW, "lm_eval/models/huggingface.py": changed})
    assert code == 0, output
    assert "beyond what it finds at HEAD" in output
    worse = f"{text}\n\ndef new():\n    return undefined\n"
    code, output = run({**NEW, "lm_eval/models/huggingface.py": worse}, "--replace")
    assert code == 1, output


def test_a_mended_defect_shows_without_the_patch(run):
    code, output = run(NEW, mends=True)
    assert code == 0
    assert "they fail without it: yes" in output
    nothing = {"tests/test_new.py": "def test_nothing():\n    pass\n"}
    code, output = run(nothing, "--replace", mends=True)
    assert code == 1
    assert "they fail without it: no" in output


def test_a_branch_is_written_anew_only_if_asked(run, checkout):
    run(NEW)
    first = git(checkout, "rev-parse", "new")
    code, output = run({**NEW, "more.txt": "more\n"})
    assert code == 2
    assert "has a branch new: pass --replace" in output
    assert git(checkout, "rev-parse", "new") == first
    code, _ = run({**NEW, "more.txt": "more\n"}, "--replace")
    assert code == 0
    assert git(checkout, "show", "new:more.txt") == "more\n"


def test_what_is_no_checkout_is_refused(upstream, checkout, tmp_path, capsys):
    assert upstream.main([str(tmp_path)]) == 2
    assert "is no checkout of lm-evaluation-harness" in capsys.readouterr().err
    shutil.rmtree(checkout / ".git")
    assert upstream.main([str(checkout)]) == 2
    assert "not a git repository" in capsys.readouterr().err


OURS = ("logits-cache-right-aligned", "hf-shared-context", "hf-prefix")


def written(upstream, checkout: Path, branch: str) -> dict[str, str]:
    """Write a patch of ours into the stand-in; return what it added and changed."""
    upstream.patches()[branch].write(checkout)
    git(checkout, "add", "--all")
    names = git(checkout, "diff", "--cached", "--name-only").split()
    return {name: (checkout / name).read_text(encoding="utf-8") for name in names}


@pytest.mark.parametrize("branch", OURS)
def test_our_patches_hold_what_upstream_can_take(upstream, checkout, branch):
    files = written(upstream, checkout, branch)
    for name, text in files.items():
        if name.endswith(".py"):
            compile(text, name, "exec")
        for word in ("lm_eval_pruned", "mkldnn", "hypothesis", "energy", "answer_path"):
            assert word not in text, f"{name} speaks of {word}"
    patch = upstream.patches()[branch]
    assert set(patch.tests) <= set(files)


def test_a_patch_says_where_the_checkout_is_another(upstream, checkout, capsys):
    (checkout / "README.md").write_text("# Harness\n")
    git(checkout, "commit", "--quiet", "--all", "--message", "HEAD")
    assert upstream.main([str(checkout), "--patches", "hf-prefix"]) == 2
    assert "README.md holds 0 times what is to be replaced" in capsys.readouterr().err
    assert git(checkout, "branch", "--list") == "* main\n"


def test_the_mending_of_the_cache_is_one_line(upstream, checkout):
    written(upstream, checkout, "logits-cache-right-aligned")
    changes = git(checkout, "diff", "--cached", "--numstat", "--", "lm_eval")
    assert changes.split()[:2] == ["1", "0"]


def test_the_small_version_is_read_in_ten_minutes(upstream, checkout):
    written(upstream, checkout, "hf-shared-context")
    changes = git(checkout, "diff", "--cached", "--numstat", "--", "lm_eval")
    assert sum(int(line.split()[0]) for line in changes.splitlines()) <= 200


def test_older_transformers_are_refused(upstream, checkout, monkeypatch):
    import transformers

    files = written(upstream, checkout, "hf-prefix")
    monkeypatch.setattr(transformers, "__version__", "4.54.1")
    helper = compile(files["lm_eval/models/utils_prefix.py"], "helper", "exec")
    with pytest.raises(ImportError, match=r"transformers 4\.55 or newer.*4\.54\.1 is"):
        exec(helper, {})  # noqa: S102 - written from our own sources


@pytest.mark.slow
@pytest.mark.parametrize("branch", OURS)
def test_the_tests_for_upstream_pass_on_the_installed_harness(
    upstream, checkout, tmp_path, branch
):
    """Its models, the patch among them, in place of those that are installed."""
    models = checkout / "lm_eval" / "models"
    for path in Path(lm_eval.models.__file__).parent.glob("*.py"):
        if path.name != "__init__.py":
            shutil.copy(path, models)
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--message", "HEAD, as it is installed")
    patch = upstream.patches()[branch]
    written(upstream, checkout, branch)

    def passes() -> bool:
        tests = tmp_path / "tests"
        tests.mkdir(exist_ok=True)
        (tests / "conftest.py").write_text(
            # Our own model type of a name that a patch brings stays out.
            "from lm_eval_pruned import _autoload\n\n_autoload._COMPLETIONS.clear()\n"
            f"import lm_eval.models\n\nlm_eval.models.__path__.insert(0, {str(models)!r})\n"
        )
        for name in patch.tests:
            shutil.copy(checkout / name, tests)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        run = subprocess.run([*command, str(tests)], cwd=tests, check=False)
        return run.returncode == 0

    assert passes()
    if patch.mends:
        git(checkout, "checkout", "HEAD", "--", "lm_eval")
        assert not passes()
