"""Write our patches for lm-evaluation-harness as branches of a checkout of it, and try them.

``python tools/upstream.py CHECKOUT`` makes a branch of each patch in `upstream_patches` from the
checkout's HEAD, out of our own files, and commits there under the name that the checkout's git is
set up with. It then runs the linters of the checkout's ``.pre-commit-config.yaml`` on what the patch
touches, and the offline part of the checkout's tests without and with it: those that
pass with the Hugging Face libraries told to stay offline. What differs is printed.

Linters and tests run as they are installed in the environment that this is started in; nothing is
downloaded or built, and a linter that is not installed is said not to have run. The files of the
checkout's working tree stay as they are: branches are written in temporary work trees.

The exit code is 0 if every patch reached its state: the linters that ran found nothing, no test that
passed before fails, the patch's own tests pass, and fail without it if it mends a defect.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import yaml
from upstream_patches import patches


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from upstream_patches.patch import Patch


#: Programs of hooks that are called otherwise than the hook.
PROGRAMS = {
    "ruff": ["ruff", "check", "--output-format=concise"],
    "ruff-check": ["ruff", "check", "--output-format=concise"],
    "ruff-format": ["ruff", "format"],
    "trailing-whitespace": ["trailing-whitespace-fixer"],
}
#: Endings of the files that a hook looks at; every text file, if it is not named here.
ENDINGS = {
    "ruff": (".py", ".pyi", ".ipynb"),
    "ruff-check": (".py", ".pyi", ".ipynb"),
    "ruff-format": (".py", ".pyi", ".ipynb"),
    "check-ast": (".py",),
    "check-json": (".json",),
    "check-yaml": (".yaml", ".yml"),
    "pymarkdown": (".md",),
    "requirements-txt-fixer": ("requirements.txt",),
}
#: Hooks that look at something else than files: their CI leaves the first one out as well.
NO_LINTERS = {"no-commit-to-branch", "destroyed-symlinks"}
#: What keeps their tests off the network, and from compiled files of another branch.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


class UpstreamError(Exception):
    """A patch cannot be written or tried; the message is for whoever typed the command."""


@dataclass
class Checkout:
    """A checkout of the harness, by the root of its working tree."""

    root: Path

    @classmethod
    def at(cls, path: Path) -> Checkout:
        """Return the checkout at `path`.

        Raises:
            UpstreamError: There is none, or it is not one of the harness.
        """
        if not (path / "lm_eval" / "models" / "huggingface.py").is_file():
            raise UpstreamError(
                f"{path} is no checkout of lm-evaluation-harness: it has no lm_eval/models/huggingface.py."
            )
        checkout = cls(path.resolve())
        if Path(checkout.git("rev-parse", "--show-toplevel")).resolve() != (
            checkout.root
        ):
            raise UpstreamError(f"{path} is not the root of a git repository.")
        return checkout

    def git(self, *arguments: str) -> str:
        """Return what git prints, without the last newline."""
        run = subprocess.run(  # noqa: S603
            ["git", "-C", str(self.root), *arguments],  # noqa: S607
            capture_output=True,
            check=False,
            text=True,
        )
        if run.returncode:
            raise UpstreamError(
                f"git {' '.join(arguments)} failed: {run.stderr.strip() or run.stdout.strip()}"
            )
        return run.stdout.rstrip("\n")

    @contextmanager
    def work_tree(self) -> Iterator[Checkout]:
        """Give a second, temporary work tree, at this one's HEAD and on no branch."""
        with tempfile.TemporaryDirectory(prefix="upstream-") as folder:
            path = Path(folder) / "tree"
            self.git("worktree", "add", "--quiet", "--detach", str(path))
            try:
                yield Checkout(path)
            finally:
                self.git("worktree", "remove", "--force", str(path))

    def go_to(self, commit: str) -> None:
        """Make the files those of a commit or branch, on no branch."""
        self.git("checkout", "--quiet", "--force", "--detach", commit)
        # What tests leave behind.
        self.git("clean", "--quiet", "--force", "-d", "-x")


def write(tree: Checkout, patch: Patch, head: str) -> None:
    """Make the branch of a patch, and commit the patch there.

    Raises:
        UpstreamError: The checkout is not what the patch was made for.
    """
    tree.go_to(head)
    try:
        patch.write(tree.root)
    except (ValueError, OSError) as error:
        raise UpstreamError(f"{patch.branch} cannot be written: {error}") from error
    tree.git("add", "--all")
    # New files get the form that their hooks would give them. Of others, they might change
    # what the patch does not touch.
    lint(tree, changed(tree, head, only="A"))
    tree.git("add", "--all")
    tree.git("commit", "--quiet", "--no-verify", "--message", patch.title)
    tree.git("branch", "--force", patch.branch)


def changed(tree: Checkout, head: str, only: str = "d") -> list[str]:
    """Return the files that are not as in `head`: those that still exist; ``A``: new ones."""
    return tree.git("diff", "--name-only", f"--diff-filter={only}", head).splitlines()


@dataclass
class Linted:
    """What one hook said.

    Attributes:
        hook: Its name.
        state: ``passed``, ``failed``, or ``not run``.
        remark: What else is to know about it.
        output: The lines that its program printed.
    """

    hook: str
    state: str
    remark: str = ""
    output: tuple[str, ...] = ()

    def beyond(self, before: Sequence[Linted]) -> Linted:
        """Return the same, passed if it finds nothing that was not found `before`."""
        known = Counter(
            re.sub(r"\d+", "0", line)
            for each in before
            if each.hook == self.hook and each.state == "failed"
            for line in each.output
        )
        new = []
        for line in self.output:
            # Lines move.
            unnumbered = re.sub(r"\d+", "0", line)
            if known[unnumbered]:
                known[unnumbered] -= 1
            else:
                new.append(line)
        if self.state != "failed" or new == list(self.output):
            return self
        state = "failed" if new else "passed"
        remark = f"{self.remark}; " if self.remark else ""
        remark += "beyond what it finds at HEAD"
        return Linted(self.hook, state, remark, tuple(new))


def lint(tree: Checkout, files: Sequence[str]) -> list[Linted]:
    """Run the hooks of the checkout's ``.pre-commit-config.yaml`` on `files`.

    A hook fails, as for pre-commit, if its program does or if it changes a file.
    """
    config_file = tree.root / ".pre-commit-config.yaml"
    if not config_file.is_file():
        return []
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    results = []
    for repo in config["repos"]:
        for hook in repo["hooks"]:
            name = hook["id"]
            chosen = [
                file
                for file in files
                if (tree.root / file).is_file()
                and _selects(config, file)
                and _selects(hook, file)
                and file.endswith(ENDINGS.get(name, ""))
            ]
            if chosen and name not in NO_LINTERS:
                results.append(_run_hook(tree, hook, repo["rev"], chosen))
    return results


def _selects(rules: dict, file: str) -> bool:
    """Return whether the patterns ``files`` and ``exclude`` leave a file in."""
    excluded = "exclude" in rules and re.search(rules["exclude"], file)
    return not excluded and re.search(rules.get("files", ""), file) is not None


def _run_hook(tree: Checkout, hook: dict, rev: str, files: list[str]) -> Linted:
    name = hook["id"]
    program, *first = PROGRAMS.get(name, [name])
    path = shutil.which(program, path=_programs())
    if path is None:
        return Linted(name, "not run")
    paths = [tree.root / file for file in files]
    before = [each.read_bytes() for each in paths]
    run = subprocess.run(  # noqa: S603
        [path, *first, *hook.get("args", []), *files],
        cwd=tree.root,
        capture_output=True,
        check=False,
        text=True,
    )
    same = before == [each.read_bytes() for each in paths]
    state = "passed" if run.returncode == 0 and same else "failed"
    wanted, installed = rev.lstrip("v"), _version(path)
    remark = "" if installed in ("", wanted) else f"{installed}; they use {wanted}"
    output = (run.stdout + run.stderr).splitlines()
    return Linted(name, state, remark, tuple(line for line in output if line))


def _programs() -> str:
    """Return where programs are searched: beside this Python first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def _version(program: str) -> str:
    """Return the version that a program tells, or nothing."""
    run = subprocess.run(  # noqa: S603
        [program, "--version"], capture_output=True, check=False, text=True
    )
    found = re.search(r"\d+(\.\d+)+", run.stdout + run.stderr)
    return found[0] if found and run.returncode == 0 else ""


def outcomes(tree: Checkout, tests: Sequence[str]) -> dict[str, str]:
    """Run tests of a checkout offline; return ``passed``, ``failed`` or ``skipped`` by name.

    Raises:
        UpstreamError: pytest did not get to the end.
    """
    workflow = tree.root / ".github" / "workflows" / "unit_tests.yml"
    text = workflow.read_text(encoding="utf-8") if workflow.is_file() else ""
    with tempfile.TemporaryDirectory(prefix="upstream-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        # Left out by their CI, which has not installed what these need.
        command += re.findall(r"--ignore=\S+", text)
        command += ["--continue-on-collection-errors", f"--junitxml={report}", *tests]
        run = subprocess.run(  # noqa: S603
            command,
            cwd=tree.root,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(tree.root)},
            capture_output=True,
            check=False,
            text=True,
        )
        if not report.is_file():
            raise UpstreamError(
                f"pytest wrote no report: {(run.stdout + run.stderr).strip()[-2000:]}"
            )
        found: dict[str, str] = {}
        for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - just written
            tags = {child.tag for child in case}
            outcome = (
                "failed"
                if tags & {"failure", "error"}
                else "skipped"
                if "skipped" in tags
                else "passed"
            )
            name = f"{case.get('classname')}::{case.get('name')}"
            if found.get(name) != "failed":
                found[name] = outcome
        return found


@dataclass
class Tried:
    """What became of a patch.

    Attributes:
        branch: Its branch.
        size: Files and lines, as git counts them.
        linted: What the linters said.
        passed: Number of tests that passed before, and with the patch.
        broken: Tests that passed before and do not pass any more.
        own: Outcomes of the tests that belong to the patch.
        mends: Whether these fail without the patch; None where that is not claimed.
    """

    branch: str
    size: str
    linted: list[Linted]
    passed: tuple[int, int]
    broken: list[str]
    own: dict[str, str]
    mends: bool | None = None

    @property
    def reached(self) -> bool:
        """Whether the patch is as it should be, as far as that was tried."""
        return (
            all(each.state != "failed" for each in self.linted)
            and not self.broken
            and "failed" not in self.own.values()
            and self.mends is not False
        )

    def __str__(self) -> str:
        before, after = self.passed
        own = sorted(self.own.values())
        lines = [f"{self.branch}: {self.size}"]
        missing = [each.hook for each in self.linted if each.state == "not run"]
        if missing:
            lines.append(f"  not run, because not installed: {', '.join(missing)}")
        for each in self.linted:
            if each.state != "not run":
                remark = f" ({each.remark})" if each.remark else ""
                lines.append(f"  {each.hook}: {each.state}{remark}")
            if each.state == "failed":
                lines += [f"    {line}" for line in each.output]
        lines.append(f"  tests that pass offline: {before} before, {after} after")
        lines += [f"    no longer: {name}" for name in self.broken]
        counts = ", ".join(f"{own.count(o)} {o}" for o in dict.fromkeys(own))
        lines.append(f"  its own tests: {counts or 'none'}")
        lines += [f"    failed: {n}" for n, o in self.own.items() if o == "failed"]
        if self.mends is not None:
            lines.append(f"  they fail without it: {'yes' if self.mends else 'no'}")
        lines.append(f"  {'in its state' if self.reached else 'NOT in its state'}")
        return "\n".join(lines)


def attempt(
    tree: Checkout,
    patch: Patch,
    head: str,
    before: dict[str, str],
    tests: Sequence[str],
) -> Tried:
    """Run linters and tests on the branch of a patch."""
    tree.go_to(patch.branch)
    size = tree.git("diff", "--shortstat", head).strip()
    files = changed(tree, head)
    linted = lint(tree, files)
    tree.go_to(head)
    before_it = lint(tree, files)
    tree.go_to(patch.branch)
    after = outcomes(tree, [*tests, *patch.tests])
    modules = tuple(test.removesuffix(".py").replace("/", ".") for test in patch.tests)
    own = {n: o for n, o in after.items() if modules and n.startswith(modules)}
    mends = None
    if patch.mends:
        tree.go_to(head)
        tree.git("checkout", patch.branch, "--", *patch.tests)
        mends = "failed" in outcomes(tree, patch.tests).values()
    passing = {name for name, outcome in before.items() if outcome == "passed"}
    return Tried(
        patch.branch,
        size,
        [each.beyond(before_it) for each in linted],
        (len(passing), sum(outcome == "passed" for outcome in after.values())),
        sorted(name for name in passing if after.get(name) != "passed"),
        own,
        mends,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    known = patches()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="a git clone of the harness")
    parser.add_argument(
        "--patches",
        nargs="+",
        choices=known,
        default=list(known),
        metavar="BRANCH",
        help=f"which patches: {', '.join(known)} (default: all)",
    )
    parser.add_argument(
        "--tests",
        nargs="*",
        default=["tests"],
        metavar="PATH",
        help="their tests to run before and after, beside the patch's own (default: all)",
    )
    parser.add_argument(
        "--replace", action="store_true", help="write branches anew that exist"
    )
    args = parser.parse_args(arguments)
    try:
        checkout = Checkout.at(args.checkout)
        head = checkout.git("rev-parse", "HEAD")
        print(f"HEAD is {checkout.git('log', '-1', '--format=%h of %cs')}", flush=True)
        for name in args.patches:
            if checkout.git("branch", "--list", name) and not args.replace:
                raise UpstreamError(
                    f"the checkout has a branch {name}: pass --replace to write it anew."
                )
        reached = True
        with checkout.work_tree() as tree:
            for name in args.patches:
                write(tree, known[name], head)
            tree.go_to(head)
            before = outcomes(tree, args.tests) if args.tests else {}
            for name in args.patches:
                tried = attempt(tree, known[name], head, before, args.tests)
                print(tried, flush=True)
                reached &= tried.reached
    except UpstreamError as error:
        print(f"upstream: {error}", file=sys.stderr)
        return 2
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
