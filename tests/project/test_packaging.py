"""What a wheel puts into site-packages, and what it declares."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers.tracked import copy_of_the_tree
from tests.project.test_requirements import required


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_of_the_tree(tmp_path_factory.mktemp("source") / "repository")


def build(kind: str, source: Path, target: Path) -> Path:
    """Build the `kind` (wheel, editable, sdist) of `source` into `target`."""
    subprocess.run(
        [
            *(sys.executable, "-c"),
            f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})",
        ],
        cwd=source,
        capture_output=True,
        check=True,
    )
    (path,) = target.iterdir()
    return path


def unpacked(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    """The file of the regular wheel."""
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheels(tree, wheel, tmp_path_factory):
    """Names and contents of the files in the regular and in the editable wheel."""
    editable = build("editable", tree, tmp_path_factory.mktemp("editable"))
    return {"wheel": unpacked(wheel), "editable": unpacked(editable)}


def test_nothing_but_our_package_lands_in_site_packages(wheels):
    top = {name.split("/")[0] for name in wheels["wheel"]}
    top = {name for name in top if not name.endswith(".dist-info")}
    assert top == {"lm_eval_pruned", "lm_eval_pruned_autoload.pth"}
    assert "lm_eval_pruned_autoload.pth" in wheels["editable"]


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_pth_file_is_recorded_and_cannot_break_a_start(wheels, kind):
    (record,) = (name for name in wheels[kind] if name.endswith("RECORD"))
    assert b"\nlm_eval_pruned_autoload.pth," in b"\n" + wheels[kind][record]
    line = wheels[kind]["lm_eval_pruned_autoload.pth"].decode()
    assert line.startswith("import ")
    assert line.count("\n") == 1, "site executes line by line"
    # Without the package beside it, as after a half-finished removal.
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", line], capture_output=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_the_wheel_holds_the_tree_byte_for_byte(tree, wheels):
    """Data such as py.typed, YAML, JSON Lines and templates included, and nothing else."""
    expected = {}
    for folder, target in (
        ("lm_eval_pruned", "lm_eval_pruned"),
        ("model_wrappers", "lm_eval_pruned/model_wrappers"),
        ("tasks", "lm_eval_pruned/tasks"),
    ):
        for path in (tree / folder).rglob("*"):
            if path.is_file():
                name = path.relative_to(tree / folder).as_posix()
                expected[f"{target}/{name}"] = path.read_bytes()
    shipped = {
        name: content
        for name, content in wheels["wheel"].items()
        if name.startswith("lm_eval_pruned/")
    }
    assert sorted(shipped) == sorted(expected)
    assert shipped == expected
    assert {Path(name).suffix for name in shipped} >= {
        *(".py", ".typed", ".html", ".yaml", ".jsonl", ".md"),
    }
    assert any(name.endswith("/licenses/LICENSE") for name in wheels["wheel"])


@pytest.fixture(scope="module")
def source(tree, tmp_path_factory):
    """The folder that the source distribution unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    archive = build("sdist", tree, folder / "archive")
    shutil.unpack_archive(archive, folder, filter="data")
    (source,) = folder.glob("lm_eval_pruned-*")
    return source


def test_the_source_distribution_holds_the_tests_and_what_they_read(tree, source):
    """All that is tracked, but for what starts with a dot: machines of ours read that."""
    for path in tree.rglob("*"):
        name = path.relative_to(tree)
        made = "build" in name.parts or any(".egg-info" in part for part in name.parts)
        if path.is_file() and not name.parts[0].startswith(".") and not made:
            shipped = (source / name).read_bytes()
            # setuptools writes setup.cfg anew.
            assert shipped == path.read_bytes() or path.name == "setup.cfg", name
    assert (source / "tests" / "conftest.py").is_file()


def test_a_wheel_from_the_source_distribution_is_the_same(source, wheels, tmp_path):
    again = unpacked(build("wheel", source, tmp_path / "wheel"))
    # The archive's order of names is that of the folder that was read.
    records = {name for name in again if name.endswith("/RECORD")}
    assert sorted(again) == sorted(wheels["wheel"])
    for name in set(again) - records:
        assert again[name] == wheels["wheel"][name], name


def test_the_entry_points_are_declared(wheels):
    (name,) = (n for n in wheels["wheel"] if n.endswith("entry_points.txt"))
    declared = configparser.ConfigParser()
    declared.read_string(wheels["wheel"][name].decode())
    assert declared["lm_eval.models"]["pruned-hf"].endswith("pruned_hf:PrunedHFLM")
    assert declared["lm_eval.models"]["pruned-vllm"].endswith("pruned_vllm:PrunedVLLM")
    assert set(declared["vllm.general_plugins"]) == {"lm_eval_pruned"}
    assert declared["lm_eval.tasks"]["pruned"] == "lm_eval_pruned.tasks"
    assert declared["console_scripts"]["lm-eval-pruned"] == "lm_eval_pruned.cli:main"


class Installation:
    """An empty environment, and an index that is a folder of stub distributions."""

    def __init__(self, folder: Path) -> None:
        self.index = folder / "index"
        self.index.mkdir()
        self.environment = folder / "environment"
        venv.create(self.environment, with_pip=False)

    def offer(self, name: str, version: str, *extras: str) -> Path:
        """Put a wheel without code on the index."""
        stem = f"{name.replace('-', '_')}-{version}"
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        files = {
            "METADATA": "\n".join(lines) + "\n",
            "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        path = self.index / f"{stem}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for file, content in files.items():
                archive.writestr(f"{stem}.dist-info/{file}", content)
        return path

    def pip(self, *arguments: str | Path) -> None:
        run = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "--python", self.environment),
                *("--isolated", "--disable-pip-version-check", "--no-cache-dir"),
                *arguments,
            ],
            env={**os.environ, "PIP_CONFIG_FILE": os.devnull},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr

    def install(self, *what: str | Path) -> None:
        self.pip("install", "--no-index", "--find-links", self.index, *what)

    def version(self, name: str) -> str:
        site = [str(path) for path in self.environment.rglob("site-packages")]
        (found,) = metadata.distributions(name=name, path=site)
        return found.version


@pytest.fixture
def installation(tmp_path):
    """What our wheel needs is on the index, at its lowest versions."""
    installation = Installation(tmp_path)
    for requirement in required().values():
        (lowest,) = (c.version for c in requirement.specifier if c.operator == ">=")
        if requirement.name != "lm-eval":
            installation.offer(requirement.name, lowest)
    for version in ("0.4.13", "0.5.0.dev3", "0.5.0"):
        installation.offer("lm_eval", version, "hf", "ifeval")
    return installation


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "0.4.13"),
        ("0.4.12", "0.4.13"),
        # What a checkout of the harness's main branch calls itself.
        ("0.4.13.dev0", "0.4.13.dev0"),
        # What its branch next0.5 calls itself.
        ("0.5.0.dev2", "0.4.13"),
    ],
)
def test_a_harness_is_replaced_only_if_it_cannot_be_used(
    before, after, installation, wheel
):
    if before:
        own = installation.offer("lm_eval", before, "hf", "ifeval")
        installation.install("--no-deps", own)
        own.unlink()
    installation.install(wheel)
    assert installation.version("lm_eval") == after
    installation.pip("check")


@pytest.mark.slow
def test_an_installation_that_cannot_be_written_to_works(wheel, tmp_path):
    """As where an administrator installed it: nothing is written beside the code."""
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    before = state(site)
    program = f"""
import sys
sys.dont_write_bytecode = True
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path.insert(0, {str(site)!r})
sys.modules.pop("lm_eval_pruned", None)
import importlib, pkgutil
import lm_eval_pruned
assert lm_eval_pruned.__path__ == [{str(site / "lm_eval_pruned")!r}]
for module in pkgutil.walk_packages(lm_eval_pruned.__path__, "lm_eval_pruned."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as missing:
        # The one extra that the tests run without; `tox -e vllm` has it.
        assert missing.name == "vllm", missing
from pathlib import Path
from lm_eval.tasks import TaskManager
tasks = Path(lm_eval_pruned.tasks.__file__).parent
manager = TaskManager(include_path=tasks, include_defaults=False)
manager.load(["pruned_demo"])
print(len(manager.all_tasks))
"""
    for path in [site, *site.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        run = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        for path in [site, *site.rglob("*")]:
            if path.is_dir():
                path.chmod(0o755)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) >= 11
    # Permissions do not stop root.
    assert state(site) == before


def state(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
