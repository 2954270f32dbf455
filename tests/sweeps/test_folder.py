"""The folder of a sweep: a unit is there whole or not at all, and one process holds each part."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.sweeps.folder import SweepFolder
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers.sweeping import forked


@pytest.mark.parametrize("step", range(12))
def test_a_kill_at_each_step_of_a_commit_leaves_all_or_nothing(tmp_path, step):
    """Dies at the n-th system call that changes the folder, for a new unit and a stale one."""
    place = tmp_path / "sweep"

    def commit(name):
        folder, made = SweepFolder(place), {"made": name}
        with folder.new_unit() as files:
            (files / "results_1.json").write_text(json.dumps(made))
            folder.keep(files, ("c", "t"), 1, made)
        return 0

    def dying():
        left = [None] * step

        def counted(function):
            def call(*args, **kwargs):
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left.pop()
                return function(*args, **kwargs)

            return call

        for name in ("rename", "fsync", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        return commit("new")

    for stale in (False, True):
        shutil.rmtree(place, ignore_errors=True)
        if stale:
            commit("old")
        forked(dying)
        record = SweepFolder(place).read("c", "t")
        if record is None:
            assert len(list(place.glob("superseded/c/t/*/results_1.json"))) == stale
        else:
            assert json.loads(record.results.read_text()) == record.definition
        with SweepFolder(place).held():
            pass
        commit("new")
        assert SweepFolder(place).read("c", "t").definition == {"made": "new"}


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", '{"schema_version": 2}'])
def test_a_damaged_unit_is_not_done(tmp_path, damage):
    folder = SweepFolder(tmp_path)
    for _ in range(3):
        with folder.new_unit() as files:
            (files / "results_1.json").write_text("{}")
            folder.keep(files, ("c", "t"), 1, {})
        assert folder.read("c", "t") is not None
        (tmp_path / "units" / "c" / "t" / "unit.json").write_text(damage)
        assert folder.read("c", "t") is None
    kept = {path.name for path in tmp_path.glob("superseded/c/t/*")}
    assert kept == {"unreadable", "unreadable-1"}


@pytest.mark.parametrize("content", ["{}", '{"configurations": [{"name": "c"}]}'])
def test_a_sweep_that_was_edited_by_hand_is_named(tmp_path, content):
    content = {"schema_version": 1, **json.loads(content)}
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(ResultsError, match=r"sweep\.json does not list"):
        read_sweep(tmp_path)


def test_a_folder_is_held_by_one_process_for_each_part(options):
    folder = Path(options["output_path"])
    for shard in (None, (0, 2)):
        with (
            SweepFolder(folder, shard).held(),
            SweepFolder(folder, (1, 2)).held(),
            pytest.raises(ValueError, match=f"{folder} is in use by another sweep"),
        ):
            run_sweep(options, shard=shard)
    assert not (folder / "units").exists()
    other = SweepFolder(folder, (1, 2))
    with other.held(), other.new_unit() as files, SweepFolder(folder, (0, 2)).held():
        assert files.is_dir()
