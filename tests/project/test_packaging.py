"""What a wheel puts into site-packages, and what it declares."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.checkpoints import ROOT
from tests.helpers.installed import FOLDERS, copy_of_the_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_of_the_tree(tmp_path_factory.mktemp("source") / "repository")


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    """Return a function that builds a wheel, an editable wheel or an sdist, of `tree` or another."""

    def built(kind: str, source: Path = tree) -> Path:
        target = tmp_path_factory.mktemp(kind) / "built"
        backend = "from setuptools import build_meta"
        code = f"{backend}; build_meta.build_{kind}({str(target)!r})"
        command = [sys.executable, "-c", code]
        subprocess.run(command, cwd=source, capture_output=True, check=True)
        (path,) = target.iterdir()
        return path

    return built


def unpacked(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(built):
    return built("wheel")


def test_the_pth_file_is_recorded_and_cannot_break_a_start(wheel, built):
    for files in map(unpacked, (wheel, built("editable"))):
        (record,) = (name for name in files if name.endswith("RECORD"))
        assert b"\nlm_eval_pruned_autoload.pth," in b"\n" + files[record]
        line = files["lm_eval_pruned_autoload.pth"].decode()
        assert line.startswith("import ")
        assert line.count("\n") == 1, "site executes line by line"
        # Without the package beside it, as after a half-finished removal.
        command = [sys.executable, "-I", "-S", "-c", line]
        run = subprocess.run(command, capture_output=True, check=False)
        assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_the_wheel_holds_the_tree_byte_for_byte(tree, wheel):
    """Data such as py.typed, YAML, JSON Lines and templates included, and nothing else."""
    files = unpacked(wheel)
    expected = {"lm_eval_pruned_autoload.pth"}
    for folder, package in FOLDERS.items():
        for path in filter(Path.is_file, (tree / folder).rglob("*")):
            inside = path.relative_to(tree / folder).as_posix()
            name = f"{package.replace('.', '/')}/{inside}"
            assert files[name] == path.read_bytes(), name
            expected.add(name)
    assert {name for name in files if ".dist-info/" not in name} == expected
    assert any(name.endswith("/licenses/LICENSE") for name in files)


def test_the_source_distribution_holds_all_and_gives_the_same_wheel(
    tree, wheel, built, tmp_path
):
    """All that is tracked, but for what starts with a dot: machines of ours read that."""
    shutil.unpack_archive(built("sdist"), tmp_path, filter="data")
    (source,) = tmp_path.glob("lm_eval_pruned-*")
    for path in filter(Path.is_file, tree.rglob("*")):
        name = path.relative_to(tree)
        made = "build" in name.parts or any(".egg-info" in part for part in name.parts)
        if not name.parts[0].startswith(".") and not made:
            shipped = (source / name).read_bytes()
            # setuptools writes setup.cfg anew.
            assert shipped == path.read_bytes() or path.name == "setup.cfg", name
    first, again = map(unpacked, (wheel, built("wheel", source)))
    # The archive's order of names is that of the folder that was read.
    different = {name for name in first | again if first.get(name) != again.get(name)}
    assert not {name for name in different if "RECORD" not in name}


@pytest.mark.slow
def test_an_installed_copy_is_not_tested_in_place_of_the_clone(tmp_path):
    copy = tmp_path / "lm_eval_pruned"
    shutil.copytree(ROOT / "lm_eval_pruned", copy)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", __file__]
    settings = {"cwd": ROOT, "capture_output": True, "text": True}
    # As after `pip install .`: the package is imported before pytest puts the clone in front.
    settings["env"] = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, check=False, **settings)
    assert run.returncode == pytest.ExitCode.USAGE_ERROR, run.stdout
    line = run.stderr.strip().splitlines()[-1]
    assert f"would run {copy} instead of this clone: install the clone with" in line
