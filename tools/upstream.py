"""Apply our patches for lm-evaluation-harness to a checkout of it, and check them there.

``python tools/upstream.py CHECKOUT`` makes a branch of each file in ``docs/upstream/patches`` from the
checkout's HEAD, named as the file is. On each branch it runs ruff on the Python files of the
patch and the test files that the patch adds. The tests of a patch that mends a defect (``fix`` in
its subject) must fail without the rest of it.

Branches are written in a temporary work tree: the files of the checkout stay as they are. ruff, pytest
and what the harness needs must be installed in the environment that runs this; nothing is downloaded.
The exit code is 0 if every patch applies, ruff finds nothing new, and the tests pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path


PATCHES = Path(__file__).resolve().parents[1] / "docs" / "upstream" / "patches"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Return what a program printed, run offline in `folder`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(  # noqa: S603
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        check=False,
        text=True,
    )


def git(folder: Path, *arguments: str) -> str:
    """Return what git printed.

    Raises:
        SystemExit: git failed; the message is git's.
    """
    done = run(folder, "git", *arguments)
    if done.returncode:
        raise SystemExit(f"upstream: git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def complaints(tree: Path, files: list[str]) -> int:
    """Return how many lines ruff has to say about those of the files that exist."""
    there = [name for name in files if (tree / name).is_file()]
    if not there:
        return 0
    check = run(tree, "ruff", "check", "--output-format=concise", "--quiet", *there)
    form = run(tree, "ruff", "format", "--check", "--quiet", *there)
    return len((check.stdout + form.stdout).splitlines())


def failures(tree: Path, tests: list[str]) -> str:
    """Return why pytest did not pass, and nothing if it did."""
    done = run(tree, sys.executable, "-m", "pytest", "-q", "--no-header", *tests)
    return done.stdout[-2000:] + done.stderr[-2000:] if done.returncode else ""


def check(tree: Path, head: str, patch: Path) -> bool:
    """Make the branch of a patch in a work tree, print what was found, and return if it is good."""
    subject = patch.read_text(encoding="utf-8").splitlines()[0]
    git(tree, "checkout", "--quiet", "--force", "-B", patch.stem, head)
    git(tree, "apply", "--index", str(patch))
    files = git(tree, "diff", "--cached", "--name-only", "--diff-filter=d").splitlines()
    tests = [name for name in files if Path(name).name.startswith("test_")]
    sources = [name for name in files if name.endswith(".py")]
    git(tree, "commit", "--quiet", "--no-verify", "--message", subject)
    found = complaints(tree, sources)
    failed = failures(tree, tests) if tests else ""
    git(tree, "checkout", "--quiet", "--detach", head)
    good = found <= complaints(tree, sources) and not failed
    if subject.startswith("fix"):
        git(tree, "checkout", patch.stem, "--", *tests)
        good &= bool(failures(tree, tests))
    print(f"{patch.stem}: {'as it should be' if good else 'NOT as it should be'}")
    print(
        f"  {subject}\n  {len(files)} files, {len(tests)} of them tests; ruff: {found}"
    )
    if failed:
        print(failed)
    return good


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="a git clone of the harness")
    checkout = parser.parse_args().checkout
    if not (checkout / "lm_eval" / "models" / "huggingface.py").is_file():
        parser.error(f"{checkout} is not a checkout of lm-evaluation-harness.")
    head = git(checkout, "rev-parse", "HEAD")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git(checkout, "worktree", "add", "--quiet", "--detach", str(tree), head)
        try:
            good = [check(tree, head, each) for each in sorted(PATCHES.glob("*.patch"))]
        finally:
            git(checkout, "worktree", "remove", "--force", str(tree))
    return 0 if all(good) else 1


if __name__ == "__main__":
    raise SystemExit(main())
