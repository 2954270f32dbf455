"""What a wheel puts into site-packages, and what it declares."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.tracked import copy_of_the_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_of_the_tree(tmp_path_factory.mktemp("source") / "repository")


def build(kind: str, source: Path, target: Path) -> Path:
    """Build the `kind` (wheel, editable, sdist) of `source` into `target`."""
    code = (
        f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=source, capture_output=True, check=True)
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
    expected = {"lm_eval_pruned_autoload.pth"}
    for folder in ("lm_eval_pruned", "model_wrappers", "tasks"):
        inside = "" if folder == "lm_eval_pruned" else f"{folder}/"
        for path in filter(Path.is_file, (tree / folder).rglob("*")):
            name = path.relative_to(tree / folder).as_posix()
            expected.add(f"lm_eval_pruned/{inside}{name}")
            shipped = wheels["wheel"][f"lm_eval_pruned/{inside}{name}"]
            assert shipped == path.read_bytes(), name
    shipped = {name for name in wheels["wheel"] if ".dist-info/" not in name}
    assert shipped == expected
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
    for path in filter(Path.is_file, tree.rglob("*")):
        name = path.relative_to(tree)
        made = "build" in name.parts or any(".egg-info" in part for part in name.parts)
        if not name.parts[0].startswith(".") and not made:
            shipped = (source / name).read_bytes()
            # setuptools writes setup.cfg anew.
            assert shipped == path.read_bytes() or path.name == "setup.cfg", name


def test_a_wheel_from_the_source_distribution_is_the_same(source, wheels, tmp_path):
    again = unpacked(build("wheel", source, tmp_path / "wheel"))
    # The archive's order of names is that of the folder that was read.
    first, again = (
        {name: content for name, content in each.items() if "RECORD" not in name}
        for each in (wheels["wheel"], again)
    )
    assert again == first


def test_the_entry_points_are_declared(wheels):
    (name,) = (n for n in wheels["wheel"] if n.endswith("entry_points.txt"))
    declared = configparser.ConfigParser()
    declared.read_string(wheels["wheel"][name].decode())
    assert declared["lm_eval.models"]["pruned-hf"].endswith("pruned_hf:PrunedHFLM")
    assert declared["lm_eval.models"]["pruned-vllm"].endswith("pruned_vllm:PrunedVLLM")
    assert set(declared["vllm.general_plugins"]) == {"lm_eval_pruned"}
    assert declared["lm_eval.tasks"]["pruned"] == "lm_eval_pruned.tasks"
    assert declared["console_scripts"]["lm-eval-pruned"] == "lm_eval_pruned.cli:main"


@pytest.mark.slow
def test_an_installation_that_cannot_be_written_to_works(wheel, tmp_path):
    """As where an administrator installed it: nothing is written beside the code."""
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
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
from lm_eval.tasks import TaskManager
tasks = lm_eval_pruned.tasks.__path__[0]
manager = TaskManager(include_path=tasks, include_defaults=False)
manager.load(["pruned_demo"])
assert len(manager.all_tasks) >= 11
"""
    # Permissions do not stop root.
    before = {path: path.is_file() and path.read_bytes() for path in site.rglob("*")}
    for path in [site, *before]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")},
        check=True,
    )
    for path in filter(Path.is_dir, [site, *site.rglob("*")]):
        path.chmod(0o755)
    after = {path: path.is_file() and path.read_bytes() for path in site.rglob("*")}
    assert after == before
