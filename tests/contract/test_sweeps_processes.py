"""What docs/sweeps.md promises of processes: one that ends early, several on one folder, and Ray."""

from __future__ import annotations

import multiprocessing

import pytest

from tests.helpers.sweeping import (
    act_once,
    change,
    errors_of,
    files_of,
    forked,
    full_disk,
    limit_units,
    results_of,
    started,
    write_acting_tasks,
    write_tasks,
)
from tests.sweeps.conftest import quick  # noqa: F401


UNITS = [
    f"{configuration}/{task}"
    for configuration in ("baseline", "prune_percent-20")
    for task in ("tiny_choice", "tiny_sentence")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tasks of which one, tiny_sentence, may end a process."""
    return write_acting_tasks(tmp_path_factory.mktemp("made") / "tasks")


@pytest.fixture
def sweep(tiny_llama, sweep_of, tmp_path):
    """Return the command of a sweep of four units into one folder."""
    both = ("--tasks", "tiny_choice", "tiny_sentence")

    def sweep(*words):
        return sweep_of(tiny_llama, tmp_path / "sweep", *both, *words)

    return sweep


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "sweep"


@pytest.fixture(scope="module")
def undisturbed(tiny_llama, sweep_of, tmp_path_factory):
    """What a sweep found that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = sweep_of(tiny_llama, folder, "--tasks", "tiny_choice", "tiny_sentence")
    assert done.code == 0
    return results_of(folder)


def test_even_after_kill_9_each_unit_is_complete_or_absent(
    sweep, folder, made, undisturbed
):
    act_once(made, "kill")
    assert forked(lambda: sweep().code) == -9
    before = files_of(folder)
    assert [*before] == UNITS[:1]
    # Nothing that was finished is lost or made again, however often it is killed.
    act_once(made, "kill")
    assert forked(lambda: sweep().code) == -9
    assert files_of(folder) == before
    done = sweep()
    assert done.code == 0
    assert "1 done, 0 failed before, 3 to run" in done.out
    # A resumed sweep ends with the scores of an uninterrupted one.
    assert before.items() < files_of(folder).items()
    assert results_of(folder) == undisturbed
    assert not [*folder.glob(".unfinished/*/*")]


def test_130_is_the_exit_code_after_ctrl_c(sweep, folder, made):
    act_once(made, "interrupt")
    done = sweep()
    assert done.code == 130
    assert "1 of 4 units are done. Repeat the command to continue." in done.out
    assert [*files_of(folder)] == UNITS[:1]


@pytest.mark.parametrize(
    ("word", "start", "message"),
    [
        ("wait", "fork", "--unit_timeout 7200"),
        ("kill", "fork", "exit code -9"),
        pytest.param("wait", "spawn", "--unit_timeout 7200", marks=pytest.mark.slow),
    ],
)
def test_a_unit_that_hangs_or_kills_its_process_fails_alone(
    sweep, folder, made, undisturbed, monkeypatch, word, start, message
):
    limit_units(monkeypatch, made, 7200, start)
    act_once(made, word)
    assert sweep("--unit_timeout", 7200).code == 1
    ((unit, error),) = errors_of(folder).items()
    assert (unit, message in error["message"]) == (UNITS[1], True)
    assert sorted(files_of(folder)) == UNITS
    assert not multiprocessing.active_children()
    # Without a limit, it is the same sweep.
    assert sweep("--retry_failed").code == 0
    assert results_of(folder) == undisturbed


def test_a_full_disk_stops_the_sweep_with_1_and_what_is_done_is_kept(sweep, folder):
    with full_disk(folder):
        done = sweep()
    assert done.code == 1
    assert f"Stopped: {folder} cannot be written" in done.out
    assert "No space left on device" in done.out
    assert "1 of 4 units are done and stay" in done.out
    before = files_of(folder)
    assert [*before] == UNITS[:1]
    assert sweep().code == 0
    assert before.items() < files_of(folder).items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("message", "left"),
    [("CUDA error: an assert", 2), ("CUDA error: out of memory", 0)],
)
def test_after_a_device_error_the_sweep_stops_and_the_same_command_continues(
    sweep, folder, made, message, left
):
    act_once(made, message)
    assert sweep().code == 1
    assert [*errors_of(folder)] == UNITS[1:2]
    assert len(files_of(folder)) == 4 - left
    done = sweep()
    assert done.code == 1
    assert f"1 failed before, {left} to run" in done.out
    assert sweep("--retry_failed").code == 0


def test_a_sweep_is_refused_while_it_runs_on_the_folder_and_not_once_it_was_killed(
    sweep, folder, made
):
    act_once(made, "wait")
    with started(lambda: sweep().code, made):
        assert f"{folder} is in use by another sweep" in sweep().sentence
        assert [*files_of(folder)] == UNITS[:1]
    assert sweep().code == 0


@pytest.mark.slow
def test_shard_next_takes_the_next_unit_that_no_other_process_has(
    sweep, folder, made, undisturbed
):
    """One process holds a unit and is killed."""
    act_once(made, "wait")
    with started(lambda: sweep("--shard", "next").code, made):
        done = sweep("--shard", "next")
        assert done.code == 0
        assert "Other processes have taken 1 of 4 units." in done.out
        before = files_of(folder)
        assert len(before) == 3
    # Its unit is open again.
    assert sweep("--shard", "next").code == 0
    assert before.items() < files_of(folder).items()
    assert results_of(folder) == undisturbed


@pytest.mark.slow
def test_shards_together_are_the_sweep(sweep, folder, undisturbed):
    definitions = set()
    for part in range(3):
        assert sweep("--shard", f"{part}/3").code == 0
        definitions.add((folder / "sweep.json").read_bytes())
    assert len(definitions) == 1
    assert results_of(folder) == undisturbed


def test_accelerate_and_torchrun_are_refused(sweep, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--shard next or --ray" in sweep().sentence
    assert not folder.exists()


@pytest.mark.slow
def test_ray_gives_the_same_results_and_the_sweep_may_go_on_without_it(
    cluster, sweep, folder, undisturbed, one_thread
):
    assert sweep("--ray").code == 0
    assert results_of(folder) == undisturbed
    before = files_of(folder)
    assert sweep().code == 0
    assert files_of(folder) == before


@pytest.fixture
def other_tasks(tmp_path):
    return write_tasks(tmp_path / "tasks")


class Other:
    """Another program on the cluster."""

    def there(self):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("taken", "statement"),
    [
        (0, "os.kill(os.getpid(), signal.SIGKILL)"),
        (1, "raise RuntimeError('CUDA error: an assert')"),
        # It waits until the other worker, without a unit, has given its CPU back.
        (
            0,
            "import ray, time\n        while not ray.available_resources().get('CPU'): time.sleep(1)",
        ),
    ],
    ids=["worker", "device", "released"],
)
def test_lost_units_start_again_elsewhere(
    cluster, taken, statement, sweep, folder, other_tasks, tmp_path
):
    """The process that first loads a task runs a statement whenever it loads one."""
    other = cluster.remote(num_cpus=taken)(Other).remote()
    cluster.get(other.there.remote())
    load = "def load(**kwargs):\n"
    first = f"""{load}    import os, signal
    mark = Path({str(tmp_path / "first")!r})
    if not mark.exists():
        mark.write_text(str(os.getpid()))
    if mark.read_text() == str(os.getpid()):
        {statement}
"""
    change(other_tasks, "utils.py", load, first)
    assert sweep("--include_path", other_tasks, "--ray").code == 0
    assert len(files_of(folder)) == 4
    cluster.kill(other)


@pytest.mark.slow
def test_a_unit_that_kills_each_worker_fails_alone(cluster, sweep, folder, other_tasks):
    statement = "import os; os.kill(os.getpid(), 9) #("
    change(other_tasks, "utils.py", "raise ConnectionError(", statement)
    change(other_tasks, "choice.yaml", "utils.load", "utils.cannot_be_had")
    more = ("--include_path", other_tasks, "--prune_percents", "0")
    assert sweep(*more, "--ray").code == 1
    ((unit, error),) = errors_of(folder).items()
    assert unit == "baseline/tiny_choice"
    assert error["type"].startswith("ray.exceptions")
    assert len(files_of(folder)) == 2


@pytest.mark.slow
def test_more_cpus_than_a_node_has_are_refused(cluster, sweep):
    said = sweep("--ray", "--cpus_per_unit", 64).sentence
    assert "cpus_per_unit=64 and gpus_per_unit=0" in said
