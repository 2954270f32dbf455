"""What a wheel puts into site-packages, and what it declares."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import zipfile

import pytest

from . import checkpoints


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Names and contents of the files in the regular and in the editable wheel."""
    source = tmp_path_factory.mktemp("source") / "repository"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"],
        cwd=checkpoints.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode:
        pytest.skip(
            "this is not a clone of the repository, which tells what belongs to it"
        )
    for name in filter(None, tracked.stdout.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (checkpoints.ROOT / name).is_file():
            shutil.copy(checkpoints.ROOT / name, target)
    built = {}
    for kind in ("wheel", "editable"):
        subprocess.run(
            [
                *(sys.executable, "-c"),
                f"from setuptools import build_meta; build_meta.build_{kind}('dist-{kind}')",
            ],
            cwd=source,
            capture_output=True,
            check=True,
        )
        (path,) = (source / f"dist-{kind}").glob("*.whl")
        with zipfile.ZipFile(path) as archive:
            built[kind] = {name: archive.read(name) for name in archive.namelist()}
    return built


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


def test_the_wheel_is_complete(wheels):
    shipped = set(wheels["wheel"])
    for folder, target in (
        ("lm_eval_pruned", "lm_eval_pruned"),
        ("model_wrappers", "lm_eval_pruned/model_wrappers"),
        ("tasks", "lm_eval_pruned/tasks"),
    ):
        for path in (checkpoints.ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to(checkpoints.ROOT / folder).as_posix()
                assert f"{target}/{name}" in shipped
    assert any(name.endswith("/licenses/LICENSE") for name in shipped)
    assert "lm_eval_pruned/py.typed" in shipped


def test_the_entry_points_are_declared(wheels):
    (name,) = (n for n in wheels["wheel"] if n.endswith("entry_points.txt"))
    declared = configparser.ConfigParser()
    declared.read_string(wheels["wheel"][name].decode())
    assert declared["lm_eval.models"]["pruned-hf"].endswith("pruned_hf:PrunedHFLM")
    assert declared["lm_eval.tasks"]["pruned"] == "lm_eval_pruned.tasks"
    assert declared["console_scripts"]["lm-eval-pruned"] == "lm_eval_pruned.cli:main"
