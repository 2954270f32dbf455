"""The folder of a sweep: a unit is there whole or not at all, and one process holds each part."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest

from lm_eval_pruned.sweeps.folder import SweepFolder
from lm_eval_pruned.sweeps.plan import plan_sweep
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers.sweeping import forked


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("step", range(12))
def test_a_kill_at_each_step_of_a_commit_leaves_all_or_nothing(tmp_path, step, stale):
    """Dies at the n-th system call that changes the folder, for a new unit and a stale one."""
    folder, left = SweepFolder(tmp_path), [DEFAULT] * step

    def commit(name):
        made = {"results": {name: {}}}
        with folder.new_unit() as files:
            (files / "results_1.json").write_text(json.dumps(made))
            folder.keep(files, ("c", "t"), 1, made)
        return 0

    def dying():
        def effect(*_, **__):
            return left.pop() if left else os.kill(os.getpid(), signal.SIGKILL)

        for name in ("rename", "fsync", "rmdir", "mkdir"):
            setattr(os, name, Mock(wraps=getattr(os, name), side_effect=effect))
        return commit("new")

    if stale:
        commit("old")
    forked(dying)
    record = folder.read("c", "t")
    if record is None:
        assert len(list(tmp_path.glob("superseded/c/t/*/results_1.json"))) == stale
    else:
        assert json.loads(record.results.read_text()) == record.definition
    with folder.held("sweep"):
        assert not list(tmp_path.glob(".unfinished/sweep/*"))
    commit("new")
    assert "new" in folder.read("c", "t").definition["results"]


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", '{"schema_version": 2}'])
def test_a_damaged_unit_is_not_done(tmp_path, damage):
    folder = SweepFolder(tmp_path)
    for _ in range(3):
        with folder.new_unit() as files:
            (files / "results_1.json").write_text('{"results": {"t": {}}}')
            folder.keep(files, ("c", "t"), 1, {})
        assert folder.read("c", "t") is not None
        (tmp_path / "units" / "c" / "t" / "unit.json").write_text(damage)
        assert folder.read("c", "t") is None
    assert len([*tmp_path.glob("superseded/c/t/*/results_1.json")]) == 2


def test_a_folder_is_held_by_one_process_for_each_part(options):
    folder = Path(options["output_path"])
    for shard, part in ((None, "sweep"), ((0, 2), "shard0of2")):
        with (
            SweepFolder(folder).held(part),
            SweepFolder(folder).held("shard1of2"),
            pytest.raises(ValueError, match=f"{folder} is in use by another sweep"),
        ):
            run_sweep(plan_sweep(options), shard=shard)
    assert not (folder / "units").exists()
    other = SweepFolder(folder)
    with other.held("a"), other.new_unit() as files, SweepFolder(folder).held("b"):
        assert files.is_dir()
