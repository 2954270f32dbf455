"""Sweeps: what survives being killed, what counts as done, what is kept apart."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
import torch

from lm_eval_pruned.cli import main
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.sweeps.folder import SweepFolder
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.run import run_sweep
from lm_eval_pruned.sweeps.tasks import fingerprint
from tests.helpers import evaluations
from tests.helpers.evaluations import TWO_PROCESSES
from tests.helpers.results_files import write_run
from tests.helpers.sweeping import (
    files_of,
    forked,
    results_of,
    sweep_options,
    write_tasks,
)


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def options(tiny_llama, tasks, tmp_path):
    return sweep_options(tiny_llama, tasks, tmp_path / "sweep")


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


@pytest.mark.smoke
def test_units_are_results_of_the_harness(undisturbed):
    folder, _ = undisturbed
    units = files_of(folder)
    assert set(units) == {
        f"{configuration}/{task}"
        for configuration in ("baseline", "ratio-1.5")
        for task in ("tiny_choice", "tiny_sentence")
    }
    for unit, names in units.items():
        task = unit.rpartition("/")[2]
        results, samples, ours = names
        assert results.startswith("results_2")
        assert samples.startswith(f"samples_{task}_2")
        assert ours == "unit.json"
    definition = json.loads((folder / "sweep.json").read_text())
    assert definition["schema_version"] == 1
    assert [
        (each["id"], each["arguments"], each["kept_width"])
        for each in definition["configurations"]
    ] == [("baseline", {}, 88), ("ratio-1.5", {"ratio": 1.5}, 48)]
    assert not list(folder.glob(".unfinished/*/*"))


def _resume_after_kills(options, undisturbed, kills, seed):
    whole, calls = undisturbed
    chance = random.Random(seed)
    folder = Path(options["output_path"])
    killed = 0
    for _ in range(kills):
        before = files_of(folder)
        code = forked(functools.partial(run_sweep, options), chance.randrange(1, calls))
        killed += code == -9
        after = files_of(folder)
        # Nothing that was finished is lost or made again.
        assert {unit: after.get(unit) for unit in before} == before
        if code == 0:
            assert results_of(folder) == results_of(whole)
            shutil.rmtree(folder)
    assert killed
    before = files_of(folder)
    assert forked(functools.partial(run_sweep, options)) == 0
    assert {unit: files_of(folder)[unit] for unit in before} == before
    assert results_of(folder) == results_of(whole)
    assert not list(folder.glob(".unfinished/*/*"))


@pytest.mark.slow
def test_killed_sweep_ends_with_the_scores_of_an_undisturbed_one(options, undisturbed):
    _resume_after_kills(options, undisturbed, kills=3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_many_kills_lose_nothing(options, undisturbed, seed):
    _resume_after_kills(options, undisturbed, kills=12, seed=100 + seed)


@pytest.mark.parametrize("step", range(12))
def test_kill_at_each_step_of_a_commit_leaves_all_or_nothing(tmp_path, step):
    """Dies at the n-th system call that changes the folder, for a new unit and a stale one."""
    place = tmp_path / "sweep"

    def commit(name):
        folder = SweepFolder(place)
        with folder.new_unit() as files:
            made = {"made": name}
            (files / "results_1.json").write_text(json.dumps(made))
            folder.keep(files, ("c", "t"), 1, made)
        return 0

    def dying():
        import signal

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
            aside = list(place.glob("superseded/c/t/*/results_1.json"))
            assert len(aside) == stale
        else:
            assert json.loads(record.results.read_text()) == record.definition
        with SweepFolder(place).held():
            pass
        commit("new")
        assert SweepFolder(place).read("c", "t").definition == {"made": "new"}


def test_a_unit_with_results_is_done_for_all_who_read_it(tmp_path):
    """`results` and `sweeps` have one rule for an error that lies beside results."""
    folder = SweepFolder(tmp_path)
    folder.write_definition({"configurations": [{"id": "c"}]})
    with folder.new_unit() as files:
        write_run(files, {"t": {"acc,none": {"values": [1.0, 0.0]}}})
        (files / "error.json").write_text('{"message": "left over"}')
        folder.keep(files, ("c", "t"), 1, {})
    assert folder.read("c", "t").error is None
    sweep = read_sweep(tmp_path)
    assert (sweep.runs[0].tasks(), sweep.failures) == (["t"], ())


@pytest.mark.slow
def test_second_start_evaluates_nothing(options, monkeypatch, capsys):
    assert run_sweep(options) == 0
    before = files_of(Path(options["output_path"]))
    monkeypatch.setattr(
        "lm_eval.simple_evaluate", lambda **_: pytest.fail("evaluated again")
    )
    assert run_sweep({**options, "batch_size": "2", "device": "cpu"}) == 0
    assert files_of(Path(options["output_path"])) == before
    assert "4 done, 0 failed before, 0 to run" in capsys.readouterr().out


def test_results_name_the_device_that_computed(options):
    options = {**options, "ratios": [], "device": None}
    assert run_sweep(options) == 0
    folder = Path(options["output_path"], "units", "baseline", "tiny_choice")
    (results,) = folder.glob("results_*.json")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    # Without a card, the harness's own word is the cuda:0 of its defaults.
    assert json.loads(results.read_text())["config"]["device"].startswith(here)


def _copy(source, target):
    shutil.copytree(source, target)
    return target


def _prints(options):
    sweep = Sweep(options)
    return {
        (configuration.id, task.name): fingerprint(
            sweep.definition(configuration, task)
        )
        for configuration, task in sweep.units()
    }


@pytest.mark.parametrize(
    "change",
    [
        {"limit": 2.0},
        {"num_fewshot": 1},
        {"apply_chat_template": True},
        {"system_instruction": "Be brief."},
        {"gen_kwargs": {"max_gen_toks": 2}},
        {"seed": "7"},
        {"log_samples": False},
        {"metadata": {"answer": 1}},
        {"predict_only": True},
        {"samples": {"tiny_choice": [0]}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_option_that_decides_scores_changes_every_unit(options, change):
    before, after = _prints(options), _prints({**options, **change})
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": "8"},
        {"device": "cuda:1"},
        {"use_cache": "c"},
        {"ratios": ["1.50"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_option_that_says_how_changes_no_unit(options, change):
    assert _prints({**options, **change}) == _prints(options)


def test_dtype_and_weights_belong_to_the_definition(options, tiny_llama, tmp_path):
    model = _copy(tiny_llama, tmp_path / "model")
    here = {**options, "model_args": {"pretrained": str(model)}}
    # The content counts, not the place.
    assert _prints(here) == _prints(options)
    other = {**options, "model_args": {"pretrained": str(model), "dtype": "bfloat16"}}
    assert not set(_prints(other).values()) & set(_prints(here).values())
    before = _prints(here)
    (model / "checkpoint-500").mkdir()
    (model / "checkpoint-500" / "model.safetensors").touch()
    assert _prints(here) == before
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert not set(_prints(here).values()) & set(before.values())


def test_task_version_code_and_data_belong_to_the_definition(options, tasks, tmp_path):
    before = _prints(options)
    for name, old, new, changed in (
        ("choice.yaml", "version: 1.0", "version: 2.0", {"tiny_choice"}),
        ("utils.py", "import json", "import json  #", {"tiny_choice", "tiny_sentence"}),
        ("questions.jsonl", "even", "odd", {"tiny_choice", "tiny_sentence"}),
        ("both.yaml", "num_fewshot: 0", "num_fewshot: 2", {"tiny_sentence"}),
        ("README.md", "", "", set()),
    ):
        copy = _copy(tasks, tmp_path / name)
        text = (copy / name).read_text() if (copy / name).exists() else "read me"
        (copy / name).write_text(text.replace(old, new))
        after = _prints({**options, "include_path": str(copy)})
        assert {
            task
            for (_, task) in before
            if before["baseline", task] != after["baseline", task]
        } == changed, name


@pytest.mark.slow
def test_changed_definition_is_evaluated_again_and_the_old_results_kept(options):
    folder = Path(options["output_path"])
    assert run_sweep(options) == 0
    old = files_of(folder)
    assert run_sweep({**options, "limit": 2.0}) == 0
    new = files_of(folder)
    assert all(new[unit] != old[unit] for unit in old)
    assert {
        tuple(sorted(file.name for file in kept.iterdir()))
        for kept in folder.glob("superseded/*/*/*")
    } == set(old.values())
    (results,) = folder.glob("units/baseline/tiny_choice/results_*.json")
    assert json.loads(results.read_text())["n-samples"]["tiny_choice"]["effective"] == 2


@pytest.mark.slow
def test_a_second_sweep_says_which_sizes_of_the_first_it_leaves_out(options, capsys):
    folder = options["output_path"]
    assert run_sweep({**options, "tasks": ["tiny_choice"]}) == 0
    second = {**options, "ratios": ["1"], "tasks": ["tiny_sentence"]}
    for dry_run in (True, False):
        capsys.readouterr()
        assert run_sweep(second, dry_run=dry_run) == 0
        assert f"{folder} also holds ratio-1.5, which" in capsys.readouterr().out
    assert {run.name: run.tasks() for run in read_sweep(folder).runs} == {
        "baseline": ["tiny_choice", "tiny_sentence"],
        "ratio-1": ["tiny_sentence"],
    }
    assert run_sweep({**second, "ratios": ["1.5", "1"]}) == 0
    assert "also holds" not in capsys.readouterr().out
    assert {run.name: run.tasks() for run in read_sweep(folder).runs} == {
        "baseline": ["tiny_choice", "tiny_sentence"],
        "ratio-1.5": ["tiny_choice", "tiny_sentence"],
        "ratio-1": ["tiny_sentence"],
    }


@pytest.mark.slow
def test_another_dtype_of_all_units_is_said_before_they_are_evaluated_again(
    options, capsys
):
    options = {**options, "tasks": ["tiny_choice"]}
    assert run_sweep(options) == 0
    capsys.readouterr()
    model_args = {**options["model_args"], "dtype": "bfloat16"}
    assert run_sweep({**options, "model_args": model_args}) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    folder = Path(options["output_path"])
    assert first == (
        f"2 finished units in {folder} have another definition (model_args): they are evaluated "
        f"again, and their results move to {folder / 'superseded'}."
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "foreign", "future", "no results"]
)
def test_damaged_unit_is_evaluated_again(options, damage):
    options = {**options, "ratios": [], "tasks": ["tiny_choice"]}
    folder = Path(options["output_path"])
    assert run_sweep(options) == 0
    unit = folder / "units" / "baseline" / "tiny_choice"
    text = (unit / "unit.json").read_text()
    if damage == "no results":
        next(unit.glob("results_*")).unlink()
    else:
        damaged = {
            "truncated": text[: len(text) // 2],
            "empty": "",
            "foreign": "[1, 2]",
            "future": text.replace('"schema_version": 1', '"schema_version": 2'),
        }[damage]
        (unit / "unit.json").write_text(damaged)
    assert run_sweep(options) == 0
    assert len(list(unit.glob("results_*.json"))) == 1


def test_failed_unit_is_recorded_and_the_rest_goes_on(options, tasks, tmp_path, capsys):
    broken = _copy(tasks, tmp_path / "tasks")
    text = (broken / "choice.yaml").read_text()
    (broken / "choice.yaml").write_text(
        text.replace("utils.load", "utils.cannot_be_had")
    )
    options = {**options, "include_path": str(broken)}
    folder = Path(options["output_path"])
    assert run_sweep(options) == 1
    for configuration in ("baseline", "ratio-1.5"):
        unit = folder / "units" / configuration
        assert {file.name for file in (unit / "tiny_choice").iterdir()} == {
            "error.json",
            "unit.json",
        }
        error = json.loads((unit / "tiny_choice" / "error.json").read_text())
        assert error["type"] == "ConnectionError"
        assert error["message"] == "the data set cannot be had"
        assert "cannot_be_had" in error["traceback"]
        assert list((unit / "tiny_sentence").glob("results_*.json"))
    assert "2 of 4 units failed" in capsys.readouterr().out

    assert run_sweep(options) == 1
    assert "2 done, 2 failed before, 0 to run" in capsys.readouterr().out
    assert run_sweep(options, retry_failed=True) == 1
    assert "2 done, 0 failed before, 2 to run" in capsys.readouterr().out
    # A task that was mended has another definition: no option is needed.
    assert run_sweep({**options, "include_path": str(tasks)}) == 0
    assert not list(folder.glob("units/*/*/error.json"))
    assert not list(folder.glob("superseded/*/tiny_choice"))


def test_retry_failed_mends(options, monkeypatch):
    folder = Path(options["output_path"])
    with monkeypatch.context() as patch:
        patch.setattr(
            "lm_eval.simple_evaluate",
            lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory left")),
        )
        assert run_sweep(options) == 1
    errors = [json.loads(f.read_text()) for f in folder.glob("units/*/*/error.json")]
    assert {error["type"] for error in errors} == {"torch.OutOfMemoryError"}
    assert len(errors) == 4
    assert run_sweep(options, retry_failed=True) == 0
    assert not list(folder.glob("units/*/*/error.json"))


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_sweep_whose_device_fails_ends_with_one_sentence(
    options, monkeypatch, capsys, wrapped
):
    evaluate, failing = lm_eval.simple_evaluate, []
    kind = getattr(torch, "AcceleratorError", RuntimeError)

    def fails_second(**arguments):
        failing.append(arguments)
        if len(failing) != 2:
            return evaluate(**arguments)
        error = kind("CUDA error: device-side assert triggered")
        if wrapped:
            raise ValueError("it cannot be evaluated") from error
        raise error

    monkeypatch.setattr("lm_eval.simple_evaluate", fails_second)
    assert run_sweep(options) == 1
    out = capsys.readouterr().out
    assert "Stopped: after an error of its device this process" in out
    assert len(failing) == 2
    folder = Path(options["output_path"])
    assert len(list(folder.glob("units/*/*/results_*.json"))) == 1
    assert len(list(folder.glob("units/*/*/error.json"))) == 1
    # The same command goes on, behind the unit that may be to blame.
    assert run_sweep(options) == 1
    assert len(failing) == 4
    assert run_sweep(options, retry_failed=True) == 0


@pytest.mark.parametrize("repository", [False, True])
def test_git_says_nothing_outside_a_repository(
    options, tmp_path, monkeypatch, capfd, repository
):
    monkeypatch.chdir(tmp_path)
    if repository:
        me = ["-c", "user.name=a", "-c", "user.email=a@b"]
        for words in (["init"], [*me, "commit", "--allow-empty", "-m", "first"]):
            subprocess.run(["git", *words], check=True, capture_output=True)
    assert run_sweep({**options, "ratios": [], "tasks": ["tiny_choice"]}) == 0
    assert "fatal" not in capfd.readouterr().err
    (file,) = Path(options["output_path"]).glob("units/*/*/results_*.json")
    assert bool(json.loads(file.read_text())["git_hash"]) == repository


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"prune_precent": 3}, "--prune_percents"),
        ({"multipleof": 8}, "multiple_of"),
        ({"prefix_share": False}, "prefix_sharing"),
    ],
)
def test_a_misspelt_model_argument_is_refused_before_anything_runs(
    options, capsys, given, meant
):
    assert run_sweep({**options, "ratios": []}) == 0
    before = files_of(Path(options["output_path"]))
    capsys.readouterr()
    model_args = {**options["model_args"], **given}
    ((name, value),) = given.items()
    sentence = f"model_args has {name}={value}, which pruned-hf does not know: did you mean {meant}?"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run_sweep({**options, "model_args": model_args})
    assert files_of(Path(options["output_path"])) == before


def test_a_setting_of_the_config_is_no_misspelt_argument(options, tiny_llama, tmp_path):
    model = _copy(tiny_llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "n_layers": 3}))
    given = {"pretrained": str(model), "n_layers": 2}
    Sweep({**options, "model_args": given})
    with pytest.raises(ValueError, match="n_layers=2"):
        Sweep({**options, "model_args": {**given, "pretrained": str(tiny_llama)}})


def test_model_is_loaded_once_per_configuration(options, monkeypatch):
    from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM

    loaded = []
    create = PrunedHFLM.create_from_arg_obj.__func__

    def counted(cls, arguments, more=None):
        loaded.append(arguments.get("ratio"))
        return create(cls, arguments, more)

    monkeypatch.setattr(PrunedHFLM, "create_from_arg_obj", classmethod(counted))
    assert run_sweep(options) == 0
    assert loaded == [None, 1.5]


@pytest.mark.slow
def test_an_engine_that_died_is_started_again_for_the_next_unit(options, monkeypatch):
    from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM

    loaded, closed = [], []
    create = PrunedHFLM.create_from_arg_obj.__func__

    def counted(cls, arguments, more=None):
        loaded.append(arguments.get("ratio"))
        return create(cls, arguments, more)

    def dying(self, requests, **kwargs):
        self.engine_died = True
        raise RuntimeError("the engine ended")

    monkeypatch.setattr(PrunedHFLM, "create_from_arg_obj", classmethod(counted))
    monkeypatch.setattr(PrunedHFLM, "loglikelihood", dying)
    monkeypatch.setattr(
        PrunedHFLM, "close", lambda self: closed.append(True), raising=False
    )
    assert run_sweep(options) == 1
    folder = Path(options["output_path"])
    assert len(list(folder.glob("units/*/tiny_choice/error.json"))) == 2
    assert len(list(folder.glob("units/*/tiny_sentence/results_*.json"))) == 2
    assert loaded == [None, None, 1.5, 1.5]
    assert len(closed) == 4


@pytest.mark.slow
def test_neurons_are_scored_once_for_all_ratios(options, monkeypatch):
    from lm_eval_pruned.pruning import measuring

    scored = []

    def counted(*args, name, score=measuring.score_neurons, **kwargs):
        scored.append(name)
        return score(*args, name=name, **kwargs)

    monkeypatch.setattr(measuring, "score_neurons", counted)
    options["ratios"] = ["1", "1.25", "1.5", "1.75", "2", "2.25", "2.5"]
    assert run_sweep(options) == 0
    assert sorted(scored) == [f"model.layers.{layer}.mlp" for layer in range(3)]
    written = list(Path(options["output_path"]).rglob("*.json"))
    assert len(written) > 16, "results and a definition of each of 16 units"
    assert not [file for file in written if "known_scores" in file.read_text()]


@pytest.mark.slow
def test_model_that_cannot_be_loaded_fails_its_units_only(options, monkeypatch):
    from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM

    create = PrunedHFLM.create_from_arg_obj.__func__
    tried = []

    def failing(cls, arguments, more=None):
        tried.append(arguments)
        if "ratio" not in arguments:
            raise torch.OutOfMemoryError("no memory left")
        return create(cls, arguments, more)

    monkeypatch.setattr(PrunedHFLM, "create_from_arg_obj", classmethod(failing))
    assert run_sweep(options) == 1
    folder = Path(options["output_path"])
    assert {p.parent.parent.name for p in folder.glob("units/*/*/error.json")} == {
        "baseline"
    }
    assert len(list(folder.glob("units/*/*/error.json"))) == 2
    assert len(tried) == 2


def test_full_disk_is_a_failure_and_not_a_result(options, monkeypatch):
    from lm_eval.loggers import EvaluationTracker

    monkeypatch.setattr(
        EvaluationTracker, "save_results_samples", lambda *_, **__: None
    )
    assert run_sweep({**options, "ratios": [], "tasks": ["tiny_choice"]}) == 1
    error = Path(options["output_path"], "units/baseline/tiny_choice/error.json")
    assert "0 of 4 samples" in json.loads(error.read_text())["message"]


@pytest.mark.slow
def test_ctrl_c_stops_and_the_next_start_goes_on(options, monkeypatch, capsys):
    import lm_eval

    evaluate = lm_eval.simple_evaluate
    calls = []

    def interrupted(**kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(**kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("lm_eval.simple_evaluate", interrupted)
        assert run_sweep(options) == 130
    assert "1 of 4 units are done" in capsys.readouterr().out
    assert len(files_of(Path(options["output_path"]))) == 1
    assert run_sweep(options) == 0
    assert len(files_of(Path(options["output_path"]))) == 4


def test_two_sweeps_on_one_folder(options, tmp_path):
    folder = tmp_path / "sweep"
    for shard in (None, (0, 2)):
        with (
            SweepFolder(folder, shard).held(),
            SweepFolder(folder, (1, 2)).held(),
            pytest.raises(ValueError, match=f"{folder} is in use by another sweep"),
        ):
            run_sweep(options, shard=shard)
    assert not (folder / "units").exists()


def test_a_shard_leaves_the_unfinished_work_of_others_alone(tmp_path):
    other = SweepFolder(tmp_path, (1, 2))
    with other.held(), other.new_unit() as files:
        with SweepFolder(tmp_path, (0, 2)).held():
            pass
        assert files.is_dir()


@pytest.mark.parametrize("parts", range(1, 9))
def test_shards_are_a_partition(options, parts):
    sweep = Sweep({**options, "ratios": ["2.5", "2", "1.5"]})
    everything = sweep.units()
    shards = [sweep.units((part, parts)) for part in range(parts)]
    assert sorted(map(repr, everything)) == sorted(
        repr(unit) for shard in shards for unit in shard
    )
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    if parts == len(sweep.configurations):
        assert all(len({unit[0].id for unit in shard}) == 1 for shard in shards)


@pytest.mark.slow
def test_shards_together_are_the_sweep(options, undisturbed):
    folder = Path(options["output_path"])
    definitions = []
    for part in range(3):
        assert run_sweep(options, shard=(part, 3)) == 0
        definitions.append((folder / "sweep.json").read_bytes())
    assert len(set(definitions)) == 1
    assert results_of(folder) == results_of(undisturbed[0])


@pytest.mark.slow
def test_cache_is_not_shared_between_models(options, undisturbed, tmp_path):
    options = {**options, "use_cache": str(tmp_path / "cache" / "responses")}
    assert run_sweep(options) == 0
    assert results_of(Path(options["output_path"])) == results_of(undisturbed[0])
    names = sorted(file.name for file in (tmp_path / "cache").glob("*.db"))
    assert len(names) == 2
    assert names[0].startswith("responses_baseline_")
    assert names[1].startswith("responses_ratio-1.5_")
    # Responses are used again by the same model only.
    shutil.rmtree(options["output_path"])
    assert run_sweep(options) == 0
    assert results_of(Path(options["output_path"])) == results_of(undisturbed[0])
    assert sorted(f.name for f in (tmp_path / "cache").glob("*.db")) == names


def test_the_models_own_ratio_is_the_baseline(options):
    sweep = Sweep({**options, "ratios": ["2.75", "1.5"], "prune_percents": ["0"]})
    assert [each.id for each in sweep.configurations] == ["baseline", "ratio-1.5"]


def test_criteria_and_seeds_multiply(options):
    sweep = Sweep(
        {
            **options,
            "ratios": [],
            "prune_percents": ["20.0"],
            "criteria": ["ppm", "l2", "random"],
            "seeds": ["1", "2"],
        }
    )
    assert [each.id for each in sweep.configurations] == [
        "baseline",
        "prune_percent-20",
        "prune_percent-20_criterion-l2",
        "prune_percent-20_criterion-random_seed-1",
        "prune_percent-20_criterion-random_seed-2",
    ]
    assert sweep.model_args(sweep.configurations[-1]) == {
        **options["model_args"],
        "prune_percent": 20,
        "criterion": "random",
        "seed": 2,
    }


@pytest.mark.slow
def test_depths_are_configurations_beside_widths(options):
    assert run_sweep({**options, "drop_layers": ["1"]}) == 0
    layers = {}
    for file in Path(options["output_path"]).glob("units/*/*/results_*.json"):
        pruning = json.loads(file.read_text())["config"]["pruning"]
        layers[file.parts[-3]] = pruning.get("layers_kept")
    assert layers == {"baseline": None, "ratio-1.5": None, "drop_layers-1": "0,2"}


def test_a_group_with_a_score_is_one_unit(options):
    options = {**options, "tasks": ["tiny_scored"], "ratios": []}
    assert run_sweep(options) == 0
    folder = Path(options["output_path"], "units", "baseline", "tiny_scored")
    (results,) = folder.glob("results_*.json")
    assert "tiny_scored" in json.loads(results.read_text())["groups"]
    assert len(list(folder.glob("samples_tiny_choice_*.jsonl"))) == 1


def test_groups_in_groups_keep_their_settings(options):
    options = {**options, "tasks": ["tiny_nested"], "ratios": []}
    assert [task.name for task in Sweep(options).tasks] == [
        "tiny_scored",
        "tiny_sentence",
    ]
    assert run_sweep(options) == 0
    folder = Path(options["output_path"], "units", "baseline", "tiny_scored")
    (results,) = folder.glob("results_*.json")
    results = json.loads(results.read_text())
    assert results["n-shot"]["tiny_choice"] == 1
    assert set(results["groups"]) == {"tiny_scored"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratios": ["4"]}, "ratio=4 is above the model's own expansion ratio 88/32"),
        ({"ratios": ["many"]}, "ratio=many is not a finite number"),
        ({"seeds": ["1"]}, "only the criterion random"),
        ({"criteria": ["random"], "seeds": ["-1"]}, "seed=-1"),
        ({"criteria": ["best"]}, "best"),
        ({"model": "hf"}, "model=hf is no model type that prunes"),
        ({"tasks": ["no_such_task"]}, "no_such_task, which no task"),
        ({"include_path": "/no/such/folder"}, "not a folder"),
        ({"seed": "one"}, "seed values must be integers or None, got 'one'"),
        ({"model_args": {"pretrained": "x", "ratio": 2}}, "use --ratios"),
        ({"tasks": ["tiny_both", "tiny_sentence"]}, "asked for twice"),
        ({"fewshot_as_multiturn": True}, "apply_chat_template"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_name_the_option(options, change, message):
    with pytest.raises(ValueError, match=message):
        run_sweep({**options, **change})
    assert not Path(options["output_path"]).exists()


def test_dry_run_prints_widths_and_writes_nothing(options, capsys):
    assert run_sweep(options, dry_run=True) == 0
    out = capsys.readouterr().out
    assert "|baseline|88|2.7500|51,424|0.00%|0|0|2|" in out
    assert "|ratio-1.5|48|1.5000|39,904|22.40%|0|0|2|" in out
    assert "Units: 4, 0 done, 0 failed, 4 to run" in out
    assert not Path(options["output_path"]).exists()


def test_same_as_the_stock_command(options, undisturbed, tmp_path, monkeypatch):
    """The unit's file says what `lm_eval run` writes for the same model and task."""
    from lm_eval.__main__ import cli_evaluate

    monkeypatch.setattr(
        sys,
        "argv",
        ["lm_eval", "run", "--model", "pruned-hf", "--model_args"]
        + [f"pretrained={options['model_args']['pretrained']},ratio=1.5"]
        + ["--tasks", "tiny_sentence", "--include_path", options["include_path"]]
        + [
            "--device",
            "cpu",
            "--log_samples",
            "--output_path",
            str(tmp_path / "stock"),
        ],
    )
    cli_evaluate()
    (stock,) = (tmp_path / "stock").rglob("results_*.json")
    (ours,) = undisturbed[0].glob("units/ratio-1.5/tiny_sentence/results_*.json")
    expected, found = json.loads(stock.read_text()), json.loads(ours.read_text())
    differing = {
        key
        for key in expected.keys() | found.keys()
        if expected.get(key) != found.get(key)
    }
    assert differing <= {
        "date",
        "start_time",
        "end_time",
        "total_evaluation_time_seconds",
        "configs",
    }
    # A group may set what the task leaves open.
    for results in (expected, found):
        results["configs"]["tiny_sentence"]["custom_dataset"] = None
    assert expected["configs"] == found["configs"]
    samples = [
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (
            next((tmp_path / "stock").rglob("samples_*.jsonl")),
            next(ours.parent.glob("samples_*.jsonl")),
        )
    ]
    assert samples[0] == samples[1]


def test_command_line(options, tmp_path, capsys):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"model_args:\n  pretrained: {options['model_args']['pretrained']}\n"
        f"ratios: [2.0, 1.5]\ntasks: tiny_choice\ninclude_path: {options['include_path']}\n"
        f"output_path: {options['output_path']}\nlimit: 1\n"
    )
    assert main(["sweep", "--config", str(file), "--ratios", "1.5", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "ratio-1.5" in out
    assert "ratio-2" not in out
    assert main(["sweep", "--config", str(file), "--shard", "2/2"]) == 2
    assert "--shard 2/2 is not I/N" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_share_each_unit(options, undisturbed, tmp_path):
    # Samples are gathered by rank, and each rank draws its own random numbers.
    command = [
        *TWO_PROCESSES, "-m", "lm_eval_pruned.cli", "sweep",
        "--model_args", f"pretrained={options['model_args']['pretrained']}",
        "--ratios", *options["ratios"], "--tasks", "tiny_choice", "--device", "cpu",
        "--include_path", options["include_path"], "--output_path", options["output_path"],
    ]  # fmt: skip
    done = evaluations.run(command, tmp_path, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    found = results_of(Path(options["output_path"]))
    whole = results_of(undisturbed[0])
    assert len(found) == 2
    for unit, results in found.items():
        assert results["scores"] == whole[unit]["scores"]
        (samples,) = results["samples"].values()
        (expected,) = whole[unit]["samples"].values()
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        for sample, one in zip(samples, expected, strict=True):
            # Batches are formed within a process, and their size decides how sums round.
            for key in ("resps", "filtered_resps"):
                pairs = zip(flat(sample.pop(key)), flat(one.pop(key)), strict=True)
                for answer, known in pairs:
                    assert float(answer[0]) == pytest.approx(float(known[0]), rel=1e-5)
                    assert answer[1] == known[1]
        assert samples == expected


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_whose_device_fails_ends_both(
    options, tasks, tmp_path, rank
):
    broken = _copy(tasks, tmp_path / "tasks")
    (broken / "utils.py").write_text(
        (broken / "utils.py")
        .read_text()
        .replace(
            "def load(**kwargs):\n",
            "def load(**kwargs):\n    import os\n"
            f"    if os.environ['RANK'] == '{rank}':\n"
            "        raise RuntimeError('CUDA error: unspecified launch failure')\n",
        )
    )
    command = [
        *TWO_PROCESSES, "-m", "lm_eval_pruned.cli", "sweep",
        "--model_args", f"pretrained={options['model_args']['pretrained']}",
        "--ratios", *options["ratios"], "--tasks", "tiny_choice", "--device", "cpu",
        "--include_path", str(broken), "--output_path", options["output_path"],
    ]  # fmt: skip
    done = evaluations.run(command, tmp_path, ACCELERATE_USE_CPU="true")
    assert done.returncode != 0
    assert "unspecified launch failure" in done.stderr
    assert not list(Path(options["output_path"]).glob("units/*/*/results_*.json"))


def flat(answers):
    """Return pairs of log-likelihood and greedy flag, however deeply they are nested."""
    if isinstance(answers[0], str):
        return [answers]
    return [pair for each in answers for pair in flat(each)]


def test_processes_that_do_not_see_each_other_are_refused(options, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE=2.*ACCELERATE_USE_CPU=true"):
        run_sweep(options)


def test_files_of_widths_are_configurations_by_their_content(options, tmp_path, capsys):
    one, other = tmp_path / "1.5.json", tmp_path / "else" / "1.5.json"
    other.parent.mkdir()
    one.write_text('{"0": 60, "2": 41}')
    other.write_text("[10, 20, 30]")
    asked = {**options, "ratios": [], "widths": [str(one), str(other), str(one)]}
    sweep = Sweep(asked)
    ids = [each.id for each in sweep.configurations]
    assert ids[0] == "baseline"
    assert [name.rpartition("-")[0] for name in ids[1:]] == ["widths-1.5"] * 2
    assert ids[1] != ids[2]
    assert [each.kept_width for each in sweep.configurations] == [88, 63, 20]

    def defined(files):
        sweep = Sweep({**asked, "widths": files})
        return fingerprint(sweep.definition(sweep.configurations[1], sweep.tasks[0]))

    # Where a file lies, and how it says it, does not count.
    moved = tmp_path / "moved.csv"
    moved.write_text("layer,width\n2,41\n0,60\n")
    assert defined([str(moved)]) == defined([str(one)])
    moved.write_text("layer,width\n2,42\n0,60\n")
    assert defined([str(moved)]) != defined([str(one)])

    asked |= {"widths": [str(other)], "tasks": ["tiny_choice"]}
    assert run_sweep(asked) == 0
    (run,) = (
        each
        for each in read_sweep(Path(asked["output_path"])).runs
        if not each.is_baseline
    )
    assert run.pruning["layer_widths"] == {"0": 10, "1": 20, "2": 30}
    assert run.pruning["asked"] == {"widths": "1.5.json"}


def test_calibration_text_belongs_to_the_definition_by_its_content(options, tmp_path):
    text, moved = tmp_path / "texts.jsonl", tmp_path / "moved.jsonl"
    asked = {**options, "ratios": ["2.0"], "criteria": ["act"]}

    def prints(file) -> str:
        sweep = Sweep(
            {**asked, "model_args": {**asked["model_args"], "calibration": str(file)}}
        )
        return fingerprint(sweep.definition(sweep.configurations[1], sweep.tasks[0]))

    text.write_text('{"text": "one"}\n')
    before = prints(text)
    assert prints(text.rename(moved)) == before
    text.write_text('{"text": "another"}\n')
    assert prints(text) != before


def test_widths_and_layers_are_refused_before_anything_runs(options, tmp_path):
    (tmp_path / "a.json").write_text("[10]")
    model_args = {**options["model_args"], "skip_layers": 1}
    asked = {**options, "widths": [str(tmp_path / "a.json")], "model_args": model_args}
    with pytest.raises(
        ValueError, match=r"skip_layers=1 and widths=a\.json were given"
    ):
        Sweep(asked)


def test_layers_that_are_left_alone_count_as_whole(options):
    """In the table of a sweep, its definition and its reports."""
    model_args = {**options["model_args"], "layers": "0"}
    sweep = Sweep({**options, "ratios": ["1"], "model_args": model_args})
    baseline, cut = sweep.configurations
    assert baseline.parameters - cut.parameters == 3 * 32 * (88 - 32)
