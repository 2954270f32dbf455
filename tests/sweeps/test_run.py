"""Sweeps that run: what survives being killed, what counts as done, what fails alone."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.loggers import EvaluationTracker

from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.pruning import measuring
from lm_eval_pruned.report.report import write_report
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.groups import series_name
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.sweeps.folder import SweepFolder
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.run import run_sweep
from tests.helpers import evaluations
from tests.helpers.results_files import write_run
from tests.helpers.sweeping import files_of, forked, results_of, sweep_options


UNITS = [
    f"{c}/{t}"
    for c in ("baseline", "ratio-1.5")
    for t in ("tiny_choice", "tiny_sentence")
]


@pytest.fixture
def folder(options):
    return Path(options["output_path"])


@pytest.fixture(scope="module")
def undisturbed(tiny_llama, tasks, tmp_path_factory):
    """Folder of one sweep that nothing disturbed, and the number of its Python calls."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = sweep_options(tiny_llama, tasks, folder / "sweep")
    # Here first, so that forked processes find the modules imported.
    assert run_sweep(options) == 0

    def counting():
        calls = 0

        def count(frame, event, argument):
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        code = run_sweep({**options, "output_path": str(folder / "counted")})
        sys.setprofile(None)
        (folder / "calls").write_text(str(calls))
        return code

    assert forked(counting) == 0
    return folder / "sweep", int((folder / "calls").read_text())


class Loaded(list):
    """The ratio of each model that is loaded; those that are failing cannot be."""

    failing = ()


@pytest.fixture
def loaded(monkeypatch):
    ratios, create = Loaded(), PrunedHFLM.create_from_arg_obj.__func__

    def counted(cls, arguments, more=None):
        ratios.append(arguments.get("ratio"))
        if ratios[-1] in ratios.failing:
            raise torch.OutOfMemoryError("no memory left")
        return create(cls, arguments, more)

    monkeypatch.setattr(PrunedHFLM, "create_from_arg_obj", classmethod(counted))
    return ratios


def failing_once(monkeypatch, number, error):
    """Have evaluation `number` fail; return what all were called with."""
    evaluate, calls = lm_eval.simple_evaluate, []

    def fails(**arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise error
        return evaluate(**arguments)

    monkeypatch.setattr("lm_eval.simple_evaluate", fails)
    return calls


def results_file(folder, unit):
    (file,) = (folder / "units" / unit).glob("results_*.json")
    return json.loads(file.read_text())


@pytest.mark.smoke
def test_units_are_results_of_the_harness(undisturbed):
    folder, _ = undisturbed
    units = files_of(folder)
    assert sorted(units) == UNITS
    for unit, names in units.items():
        task = unit.rpartition("/")[2]
        starts = ("results_2", f"samples_{task}_2", "unit.json")
        assert all(map(str.startswith, names, starts))
    # What it computed on, where nothing was asked for.
    assert results_file(folder, UNITS[0])["config"]["device"] == "cpu"
    definition = json.loads((folder / "sweep.json").read_text())
    assert definition["schema_version"] == 1
    sizes = [
        (c["id"], c["arguments"], c["kept_width"]) for c in definition["configurations"]
    ]
    assert sizes == [("baseline", {}, 88), ("ratio-1.5", {"ratio": 1.5}, 48)]
    assert not list(folder.glob(".unfinished/*/*"))


def test_same_as_the_stock_command(options, undisturbed, tmp_path, monkeypatch):
    words = ["lm_eval", "run", "--model", "pruned-hf", "--tasks", "tiny_sentence"]
    words += [
        "--model_args",
        f"pretrained={options['model_args']['pretrained']},ratio=1.5",
    ]
    words += ["--include_path", options["include_path"], "--device", "cpu"]
    words += ["--log_samples", "--output_path", str(tmp_path / "stock")]
    monkeypatch.setattr(sys, "argv", words)
    cli_evaluate()
    (stock,) = (tmp_path / "stock").rglob("results_*.json")
    expected = json.loads(stock.read_text())
    found = results_file(undisturbed[0], "ratio-1.5/tiny_sentence")
    for results in (expected, found):
        # A group may set what the task leaves open.
        results["configs"]["tiny_sentence"]["custom_dataset"] = None
        for name in ("date", "start_time", "end_time", "total_evaluation_time_seconds"):
            results.pop(name, None)
    assert found["config"].pop("weight_bytes") > 0
    assert found == expected
    (samples,) = (tmp_path / "stock").rglob("samples_*.jsonl")
    unit = results_of(undisturbed[0])["ratio-1.5/tiny_sentence"]
    (ours,) = unit["samples"].values()
    assert ours == [json.loads(line) for line in samples.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 1), *((12, 100 + n) for n in range(8))]
)
def test_a_killed_sweep_goes_on(options, folder, undisturbed, kills, seed):
    whole, calls = undisturbed
    chance, killed = random.Random(seed), 0
    run = functools.partial(run_sweep, options)
    for _ in range(kills):
        before = files_of(folder)
        code = forked(run, chance.randrange(1, calls))
        killed += code == -9
        # Nothing that was finished is lost or made again.
        assert before.items() <= files_of(folder).items()
        if code == 0:
            assert results_of(folder) == results_of(whole)
            shutil.rmtree(folder)
    before = files_of(folder)
    assert killed
    assert forked(run) == 0
    assert before.items() <= files_of(folder).items()
    assert results_of(folder) == results_of(whole)
    assert not list(folder.glob(".unfinished/*/*"))


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
        left = step

        def counted(function):
            def call(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
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


def test_a_unit_with_results_is_done_for_all_who_read_it(tmp_path):
    folder = SweepFolder(tmp_path)
    folder.write_definition({"configurations": [{"id": "c"}]})
    with folder.new_unit() as files:
        write_run(files, {"t": {"acc,none": {"values": [1.0, 0.0]}}})
        (files / "error.json").write_text('{"message": "left over"}')
        folder.keep(files, ("c", "t"), 1, {})
    assert folder.read("c", "t").error is None
    sweep = read_sweep(tmp_path)
    assert (sweep.runs[0].tasks(), sweep.failures) == (["t"], ())


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", '{"schema_version": 2}'])
def test_a_damaged_unit_is_not_done(tmp_path, damage):
    folder = SweepFolder(tmp_path)
    for _ in range(2):
        with folder.new_unit() as files:
            (files / "results_1.json").write_text("{}")
            folder.keep(files, ("c", "t"), 1, {})
        assert folder.read("c", "t") is not None
        (tmp_path / "units" / "c" / "t" / "unit.json").write_text(damage)
        assert folder.read("c", "t") is None
    assert (tmp_path / "superseded" / "c" / "t" / "unreadable").is_dir()


@pytest.mark.parametrize("content", ["{}", '{"configurations": [{"name": "c"}]}'])
def test_a_sweep_that_was_edited_by_hand_is_named(tmp_path, content):
    content = {"schema_version": 1, **json.loads(content)}
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(ResultsError, match=r"sweep\.json does not list"):
        read_sweep(tmp_path)


@pytest.mark.slow
def test_a_second_start_evaluates_what_changed_and_keeps_the_old(
    options, folder, monkeypatch, capsys
):
    assert run_sweep(options) == 0
    old = files_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr("lm_eval.simple_evaluate", lambda **_: pytest.fail("again"))
        assert run_sweep({**options, "batch_size": "2"}) == 0
    assert files_of(folder) == old
    assert "4 done, 0 failed before, 0 to run" in capsys.readouterr().out
    assert run_sweep({**options, "limit": 2.0}) == 0
    assert "4 finished units" in (said := capsys.readouterr().out)
    assert "another definition (settings)" in said
    kept = folder.glob("superseded/*/*/*")
    assert sorted(
        tuple(sorted(map(os.path.basename, k.iterdir()))) for k in kept
    ) == sorted(old.values())
    assert results_file(folder, UNITS[0])["n-samples"]["tiny_choice"]["effective"] == 2


@pytest.mark.slow
def test_a_second_sweep_says_which_sizes_of_the_first_it_leaves_out(options, capsys):
    folder = options["output_path"]
    assert run_sweep({**options, "tasks": ["tiny_choice"]}) == 0
    second = {**options, "ratios": ["1"], "tasks": ["tiny_sentence"]}
    assert run_sweep(second) == 0
    assert f"{folder} also holds ratio-1.5, which" in capsys.readouterr().out
    assert [run.name for run in read_sweep(folder).runs] == ["baseline", "ratio-1"]
    assert run_sweep({**second, "ratios": ["1.5", "1"]}) == 0
    assert "also holds" not in capsys.readouterr().out
    both = ["tiny_choice", "tiny_sentence"]
    found = {run.name: run.tasks() for run in read_sweep(folder).runs}
    assert found == {"baseline": both, "ratio-1.5": both, "ratio-1": both[1:]}


def test_a_failed_unit_is_recorded_and_the_rest_goes_on(
    options, folder, tasks, tmp_path, capsys
):
    broken = shutil.copytree(tasks, tmp_path / "tasks")
    text = (broken / "choice.yaml").read_text().replace(".load", ".cannot_be_had")
    (broken / "choice.yaml").write_text(text)
    options = {**options, "include_path": str(broken)}
    assert run_sweep(options) == 1
    failed = ("error.json", "unit.json")
    for unit, names in files_of(folder).items():
        assert (names == failed) == unit.endswith("tiny_choice")
    error = json.loads((folder / "units" / UNITS[0] / "error.json").read_text())
    assert (error["type"], error["message"]) == (
        "ConnectionError",
        "the data set cannot be had",
    )
    assert "cannot_be_had" in error["traceback"]
    for retry, said in (False, "2 failed before, 0 to run"), (True, "2 to run"):
        capsys.readouterr()
        assert run_sweep(options, retry_failed=retry) == 1
        assert (
            f"2 done, {said if not retry else '0 failed before, ' + said}"
            in capsys.readouterr().out
        )
    # A task that was mended has another definition: no option is needed.
    assert run_sweep({**options, "include_path": str(tasks)}) == 0
    assert not list(folder.glob("units/*/*/error.json"))
    assert not (folder / "superseded").exists()


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_sweep_whose_device_fails_ends(options, folder, monkeypatch, capsys, wrapped):
    error = getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: an assert")
    if wrapped:
        cause, error = error, ValueError("it cannot be evaluated")
        error.__cause__ = cause
    calls = failing_once(monkeypatch, 2, error)
    assert run_sweep(options) == 1
    assert "Stopped: after an error of its device" in capsys.readouterr().out
    assert len(calls) == 2
    # The same command goes on, behind the unit that may be to blame.
    assert run_sweep(options) == 1
    assert len(calls) == 4
    assert run_sweep(options, retry_failed=True) == 0


@pytest.mark.slow
def test_ctrl_c_stops_and_the_next_start_goes_on(options, folder, monkeypatch, capsys):
    failing_once(monkeypatch, 2, KeyboardInterrupt())
    assert run_sweep(options) == 130
    assert "1 of 4 units are done" in capsys.readouterr().out
    assert len(files_of(folder)) == 1
    assert run_sweep(options) == 0
    assert len(files_of(folder)) == 4


@pytest.mark.parametrize("repository", [False, True])
def test_git_says_nothing_outside_a_repository(
    options, folder, tmp_path, monkeypatch, capfd, repository
):
    monkeypatch.chdir(tmp_path)
    if repository:
        me = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for words in (["init"], [*me, "commit", "--allow-empty", "-m", "first"]):
            subprocess.run(["git", *words], check=True, capture_output=True)
    assert run_sweep({**options, "ratios": [], "tasks": ["tiny_choice"]}) == 0
    assert "fatal" not in capfd.readouterr().err
    assert bool(results_file(folder, UNITS[0])["git_hash"]) == repository


def test_a_model_is_loaded_once(options, loaded):
    assert run_sweep(options) == 0
    assert loaded == [None, 1.5]


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_fails_its_units_only(options, folder, loaded):
    loaded.failing = (None,)
    assert run_sweep(options) == 1
    assert len(list(folder.glob("units/baseline/*/error.json"))) == 2
    assert len(list(folder.glob("units/ratio-1.5/*/results_*.json"))) == 2
    assert loaded == [None, 1.5]


@pytest.mark.slow
def test_an_engine_that_died_is_started_again(options, folder, loaded, monkeypatch):
    closed = []

    def dying(self, requests, **kwargs):
        self.engine_died = True
        raise RuntimeError("the engine ended")

    monkeypatch.setattr(PrunedHFLM, "loglikelihood", dying)

    def close(self):
        closed.append(self)

    monkeypatch.setattr(PrunedHFLM, "close", close, raising=False)
    assert run_sweep(options) == 1
    assert len(list(folder.glob("units/*/tiny_choice/error.json"))) == 2
    assert len(list(folder.glob("units/*/tiny_sentence/results_*.json"))) == 2
    assert loaded == [None, None, 1.5, 1.5]
    assert len(closed) == 4


@pytest.mark.slow
def test_neurons_are_scored_once_for_all_sizes(options, folder, monkeypatch):
    scored = []

    def counted(*args, name, score=measuring.score_neurons, **kwargs):
        scored.append(name)
        return score(*args, name=name, **kwargs)

    monkeypatch.setattr(measuring, "score_neurons", counted)
    sizes = {
        "ratios": ["1", "1.5", "2"],
        "drop_layers": ["1"],
        "tasks": ["tiny_choice"],
    }
    assert run_sweep({**options, **sizes}) == 0
    assert sorted(scored) == [f"model.layers.{layer}.mlp" for layer in range(3)]
    assert not [f for f in folder.rglob("*.json") if "known_scores" in f.read_text()]
    pruning = results_file(folder, "drop_layers-1/tiny_choice")["config"]["pruning"]
    assert pruning["layers_kept"] == "0,2"


@pytest.mark.slow
def test_losses_are_measured_once_and_every_model_is_told_apart(
    options, folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "texts.jsonl"
    text.write_text(
        '{"text": "the quick brown fox jumps"}\n{"text": "a second text"}\n'
    )
    measured: Counter[str] = Counter()
    losses = measuring.LoadedModel.losses

    def counting(self, text, criterion, removed):
        measured[criterion] += 1
        return losses(self, text, criterion, removed)

    monkeypatch.setattr(measuring.LoadedModel, "losses", counting)
    options["model_args"] |= {"calibration": str(text)}
    more = {"allocations": ["uniform", "sensitivity"], "criteria": ["maw", "best"]}
    assert run_sweep({**options, **more, "tasks": ["tiny_choice"]}) == 0
    # By maw for two configurations, and among maw and act for two more.
    assert measured == {"maw": 1, "act": 1}
    _, *runs = read_sweep(folder).runs
    names = [
        "maw",
        "best",
        "maw, allocation sensitivity",
        "best, allocation sensitivity",
    ]
    assert [series_name(run) for run in runs] == names
    for run in runs[2:]:
        assert sum(run.pruning["layer_widths"].values()) == 3 * 48
    write_report(folder)
    assert all(name in (folder / "report" / "report.md").read_text() for name in names)


def test_a_full_disk_is_a_failure_and_not_a_result(options, folder, monkeypatch):
    monkeypatch.setattr(
        EvaluationTracker, "save_results_samples", lambda *_, **__: None
    )
    assert run_sweep({**options, "ratios": [], "tasks": ["tiny_choice"]}) == 1
    error = (folder / "units" / UNITS[0] / "error.json").read_text()
    assert "0 of 4 samples" in json.loads(error)["message"]


def test_a_folder_is_held_by_one_process_for_each_part(options, folder):
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


@pytest.mark.slow
def test_shards_together_are_the_sweep(options, folder, undisturbed):
    definitions = set()
    for part in range(3):
        assert run_sweep(options, shard=(part, 3)) == 0
        definitions.add((folder / "sweep.json").read_bytes())
    assert len(definitions) == 1
    assert results_of(folder) == results_of(undisturbed[0])


@pytest.mark.slow
def test_processes_take_the_next_open_unit(options, folder, undisturbed, capsys):
    """One holds a unit and dies, two go on side by side."""
    with SweepFolder(folder, shared=True).claimed(("baseline", "tiny_choice")) as mine:
        assert mine
        assert run_sweep(options, shard="next") == 0
        assert "Other processes have 1 of 4 units." in capsys.readouterr().out
        assert sorted(results_of(folder)) == sorted(results_of(undisturbed[0]))[1:]
    before = files_of(folder)
    assert run_sweep(options, shard="next") == 0
    assert results_of(folder) == results_of(undisturbed[0])
    assert before.items() <= files_of(folder).items()


def test_the_next_unit_is_for_one_process_at_a_time(options):
    with pytest.raises(ValueError, match=r"--shard next .* leave out --ray"):
        run_sweep({**options, "ray": True}, shard="next")


@pytest.mark.slow
def test_answers_are_kept_for_one_model_each(options, folder, undisturbed, tmp_path):
    options = {**options, "use_cache": str(tmp_path / "cache" / "responses")}
    for _ in range(2):
        assert run_sweep(options) == 0
        assert results_of(folder) == results_of(undisturbed[0])
        names = [file.name.split("_")[1] for file in (tmp_path / "cache").glob("*.db")]
        assert sorted(names) == ["baseline", "ratio-1.5"]
        shutil.rmtree(folder)


def test_groups_with_a_score_are_one_unit_and_keep_their_settings(options, folder):
    options = {**options, "tasks": ["tiny_nested"], "ratios": []}
    assert [task.name for task in Sweep(options).tasks] == [
        "tiny_scored",
        "tiny_sentence",
    ]
    assert run_sweep(options) == 0
    results = results_file(folder, "baseline/tiny_scored")
    assert set(results["groups"]) == {"tiny_scored"}
    assert results["n-shot"]["tiny_choice"] == 1


def in_two_processes(options, tmp_path):
    words = ["--model_args", f"pretrained={options['model_args']['pretrained']}"]
    words += ["--ratios", "1.5", "--tasks", "tiny_choice", "--device", "cpu"]
    words += ["--floors", "no"]
    words += [
        "--include_path",
        options["include_path"],
        "--output_path",
        options["output_path"],
    ]
    command = [*evaluations.TWO_PROCESSES, "-m", "lm_eval_pruned.cli", "sweep", *words]
    return evaluations.run(command, tmp_path, ACCELERATE_USE_CPU="true")


@pytest.mark.slow
def test_two_processes_share_each_unit(options, folder, undisturbed, tmp_path):
    done = in_two_processes(options, tmp_path)
    assert done.returncode == 0, done.stderr
    found, whole = results_of(folder), results_of(undisturbed[0])
    assert sorted(found) == UNITS[::2]
    for unit, results in found.items():
        assert results["scores"] == whole[unit]["scores"]
        (samples,), (expected,) = (
            r["samples"].values() for r in (results, whole[unit])
        )
        # Samples are gathered by rank, and batches, whose size decides how sums round, are smaller.
        samples.sort(key=lambda sample: sample["doc_id"])
        for sample, known in zip(samples, expected, strict=True):
            for one, other in zip(sample["resps"], known["resps"], strict=True):
                assert float(one[0][0]) == pytest.approx(float(other[0][0]), rel=1e-5)
            for name in ("doc_id", "prompt_hash", "acc"):
                assert sample[name] == known[name]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_whose_device_fails_ends_both(
    options, folder, tasks, tmp_path, rank
):
    broken = shutil.copytree(tasks, tmp_path / "tasks")
    text = (broken / "utils.py").read_text()
    failing = f"""(**kwargs):
    import os
    if os.environ["RANK"] == "{rank}":
        raise RuntimeError("CUDA error: unspecified launch failure")
"""
    (broken / "utils.py").write_text(text.replace("(**kwargs):\n", failing, 1))
    done = in_two_processes({**options, "include_path": str(broken)}, tmp_path)
    assert done.returncode != 0
    assert "unspecified launch failure" in done.stderr
    assert not list(folder.glob("units/*/*/results_*.json"))


def test_processes_that_do_not_see_each_other_are_refused(options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2.*ACCELERATE_USE_CPU=true"):
        run_sweep(options)
