"""Results files, folders and sweeps, as the harness writes them and as damage leaves them."""

from __future__ import annotations

import json
import math

import pytest

from lm_eval_pruned.results import runs
from lm_eval_pruned.results.documents import documents_of
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.groups import series_of
from lm_eval_pruned.results.metrics import SHARE, metric_of
from lm_eval_pruned.results.runs import read_run, read_sweep, setting_of
from tests.helpers.results_files import DATE, pruning, write_run, write_sweep


TASKS = {"tf": {"acc,none": [1.0, 0.0, 1.0]}}
BOOLQ = {"boolq": {"acc,none": [1.0]}}
NEW = "2026-01-02T11-00-00.000001"


def test_a_results_file(tmp_path):
    nan = {"acc,none": {"values": [float("nan"), 1.0]}}
    file = write_run(tmp_path / "model", TASKS | {"nan": nan}, pruning=pruning(20))
    # A file that was renamed finds its samples.
    run = read_run(file.rename(file.with_name("renamed.json")))
    score = run.scores["tf", "acc,none"]
    assert score.value == pytest.approx(2 / 3)
    assert (score.stderr, score.higher_is_better, score.documents) == (None, True, 3)
    assert math.isnan(run.scores["nan", "acc,none"].value)
    assert (run.name, run.expansion_ratio, run.is_baseline) == ("renamed", 3.2, False)
    assert run.samples["tf"].name == f"samples_tf_{DATE}.jsonl"


def test_a_model_of_fewer_layers_is_no_baseline(tmp_path):
    """As results of `drop_layers` say, which existed once: the widths are those of the whole model."""
    shallow = pruning(0) | {"layers_dropped": "3", "parameters_after": 1}
    runs_of = {"whole": pruning(0), "shallow": shallow}
    for name, record in runs_of.items():
        write_run(tmp_path / name, TASKS, pruning=record)
    baselines = {name: read_run(tmp_path / name).is_baseline for name in runs_of}
    assert baselines == {"whole": True, "shallow": False}


@pytest.mark.parametrize("below", ["", "org__model"])
def test_of_several_results_in_a_folder_the_newest_of_each_task_counts(tmp_path, below):
    both = {"tf": {"acc,none": [1.0, 0.0]}, **BOOLQ}
    newer = {"date": NEW, "lm_eval_version": "0.4.14"}
    write_run(tmp_path / below, {"tf": {"acc,none": [0.0]}}, **newer)
    write_run(tmp_path / below, both)
    run = read_run(tmp_path)
    scores = {task: score.value for (task, _), score in run.scores.items()}
    assert scores == {"tf": 0.0, "boolq": 1.0}
    assert DATE in run.samples["boolq"].name
    assert NEW in run.samples["tf"].name
    assert documents_of(run, "boolq", "acc,none").values.tolist() == [1.0]
    versions = {"boolq": "0.4.13", "tf": "0.4.14"}
    assert setting_of(run, "lm_eval_version") == versions
    assert (run.name, setting_of(run, "num_fewshot")) == (tmp_path.name, 0)


@pytest.mark.parametrize("folders", [("", ""), ("x", "z")])
def test_results_of_one_model_are_joined_and_of_two_are_not(tmp_path, folders):
    """The harness names a folder after the checkpoint, or at random: two sizes may share it."""
    write_run(tmp_path / folders[0], BOOLQ, pruning=pruning(20))
    write_run(tmp_path / folders[1], TASKS, date=NEW, pruning=pruning(20))
    assert {*read_run(tmp_path).tasks()} == {"tf", "boolq"}
    hf = {"config": {"model": "hf", "model_args": {"pretrained": "tiny"}}}
    repaired = {"pruning": pruning(20) | {"repair": "least_squares"}}
    for other in ({"pruning": pruning(40)}, repaired, hf):
        write_run(tmp_path / folders[0], BOOLQ, **other)
        with pytest.raises(ResultsError, match=rf"several models \(.*results_{DATE}"):
            read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x81\xff\x00", "not complete JSON"),
        (b"[" * 200_000, "not complete JSON"),
        (b"[1, 2]", "holds a list"),
        (b'{"results": {}}', "not a results file"),
        (b'{"results": {"tf": {"acc,none": [1]}}}', "not a results file"),
        # Other sections in place of those of a good file.
        ({"n-samples": {"tf": {"effective": None}}}, "n-samples of tf are"),
        ({"n-samples": {"tf": {"effective": "many"}}}, "n-samples of tf are"),
        ({"n-samples": {"tf": {}}}, "it lacks 'effective'"),
        ({"n-samples": {"other": {"effective": 3}}}, "do not both hold other, tf"),
        ({"results": {"tf": {"acc,none": 10**400}}}, "a number of 401 digits"),
        ({"results": {"tf": {"acc,none": None}}}, "acc,none of tf is None"),
        ({"results": {"tf": [1]}}, r"the results of tf are \[1\]"),
        ({"group_subtasks": {"tf": ["tf"]}}, "the group tf holds itself"),
        ({"group_subtasks": {"a": ["b"], "b": ["a"]}}, "the group a holds itself"),
        ({"group_subtasks": {"tf": "boolq"}}, "the group tf holds 'boolq'"),
        ({"higher_is_better": {"tf": {"acc": "yes"}}}, "higher_is_better is 'yes'"),
        ({"versions": {"tf": [1]}}, r"a version is \[1\]"),
        ({"configs": {"tf": {"metadata": {"cluster": 3}}}}, "declares the cluster 3"),
        ({"config": {"pruning": "none"}}, "pruning is 'none', not an object"),
    ],
)
def test_a_damaged_results_file_is_refused_in_a_sentence(tmp_path, content, words):
    file = write_run(tmp_path, TASKS, **content if isinstance(content, dict) else {})
    if isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(ResultsError, match=words) as caught:
        read_run(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_changes_no_score_may_be_missing(tmp_path):
    """The time and the energy are shown beside the scores; a number of numpy is written as a text."""
    tasks = {"tf": {**TASKS["tf"], "f1,none": {"values": [1.0], "score": "0.53"}}}
    config = {"model": "hf", "energy": "much"}
    size = {"tf": {"effective": 3, "original": 3}}
    file = write_run(
        tmp_path,
        tasks,
        config=config,
        total_evaluation_time_seconds="nan",
        **{"n-samples": size},
    )
    run = read_run(file)
    assert [*run.scores] == [("tf", "acc,none")]
    assert (run.energy, run.evaluated["tf"].seconds) == ({}, None)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unit.json", {"seconds": "many"}),
        ("unit.json", {"seconds": -1}),
        ("unit.json", {"schema_version": 7}),
        ("unit.json", {"fingerprint": None}),
        ("sweep.json", {"configurations": [{"id": "base", "units": {"tf": 3}}]}),
        ("sweep.json", {"configurations": [{"id": 3, "units": {}}]}),
    ],
)
def test_a_damaged_unit_is_not_read_as_one_that_is_missing(tmp_path, name, change):
    write_sweep(tmp_path, {"base": (0, TASKS)})
    (file,) = tmp_path.rglob(name)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ResultsError, match="delete it and repeat the command") as told:
        read_sweep(tmp_path)
    assert str(file) in str(told.value)


def test_a_sweep_folder(tmp_path):
    both = {**TASKS, "if": {"acc,none": [1.0]}}
    sizes = {"base": (0, TASKS), "p20": (20, both), "p40": (40, {}), "p60": (60, {})}
    write_sweep(tmp_path, sizes, p40="tf")
    # A unit that succeeded after it failed is done.
    (tmp_path / "units" / "base" / "tf" / "error.json").write_text('{"message": "old"}')
    sweep = runs.read_sweep(tmp_path)
    assert [run.name for run in sweep.runs] == ["base", "p20"]
    assert sweep.runs[0].is_baseline
    assert "no finished unit of p40, p60" in sweep.runs[0].notes[0]
    assert sweep.runs[1].tasks() == ["if", "tf"]
    assert sweep.failures == (runs.Failure("p40", "tf", "out of memory"),)
    assert read_run(tmp_path / "units" / "p20").tasks() == ["if", "tf"]
    with pytest.raises(ResultsError, match="results of several models"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        (None, r"no sweep\.json"),
        ({"schema_version": 2}, "upgrade lm-eval-pruned"),
        ({}, "has schema version None"),
        ({"schema_version": 1}, "no finished unit yet"),
        # One that was edited by hand.
        *(
            ({"schema_version": 1, "configurations": these}, r"json does not list")
            for these in (None, [{"name": "c"}], ["c"])
        ),
    ],
)
def test_hostile_sweep_folders(tmp_path, definition, words):
    if definition is not None:
        definition.setdefault("configurations", [{"id": "a", "units": {}}])
        (tmp_path / "sweep.json").write_text(json.dumps(definition))
    with pytest.raises(ResultsError, match=words):
        runs.read_sweep(tmp_path)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ResultsError, match=r"holds no results_\*.json"):
            read_run(path)


def test_runs_that_differ_in_the_ratio_alone_are_a_series(tmp_path):
    widths = {"layer_widths": {"0": 9}}
    described = [
        *(pruning(percent) for percent in (0, 40, 20)),
        *(pruning(20, criterion="random", seed=seed) for seed in (1, 2)),
        pruning(20) | widths,
        *(pruning(each) | widths | {"allocation": "sensitivity"} for each in (20, 30)),
        pruning(20) | {"layers_pruned": "1-29"},
        pruning(20) | {"repair": "least_squares"},
    ]
    healing = {"method": "lora", "teacher": {"weight": 0.5, "temperature": 1.0}}
    configs = [
        *({"pruning": each} for each in described),
        *({"pruning": pruning(each), "healing": healing} for each in (20, 40)),
        *(
            {"pruning": pruning(20), "model_args": {"recipe": "best", **asked}}
            for asked in (
                {},
                {"repair": "none"},
                {"criterion": "ppm", "repair": "least_squares"},
            )
        ),
    ]
    members = [
        read_run(write_run(tmp_path / str(n), TASKS, config={"model": "hf", **each}))
        for n, each in enumerate(configs)
    ]
    series = series_of(members)
    ratios = {name: [run.expansion_ratio for run in of] for name, of in series.items()}
    assert ratios == {
        "maw": [4.0, 3.2, 2.4],
        "random, seed 1": [4.0, 3.2],
        "random, seed 2": [4.0, 3.2],
        "maw, widths by layer": [4.0, 3.2],
        "maw, allocation sensitivity": [4.0, 3.2, 2.8],
        "maw, layers 1-29": [4.0, 3.2],
        "maw, repair least_squares": [4.0, 3.2],
        "maw, healed by lora with teacher 0.5": [4.0, 3.2, 2.4],
        # What was asked beside a recipe makes another series.
        "recipe=best": [4.0, 3.2],
        "recipe=best, repair none": [4.0, 3.2],
        "recipe=best, maw, repair least_squares": [4.0, 3.2],
    }


@pytest.mark.slow
def test_what_the_harness_writes(tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    tasks = ["pruned_demo_truthfulness", "pruned_demo_instruction_following"]
    how = {"model": "dummy", "model_args": "pretrained=dummy", "log_samples": True}
    for task in tasks:
        tracker = EvaluationTracker(output_path=str(tmp_path))
        how |= {"evaluation_tracker": tracker, "bootstrap_iters": 0}
        evaluated = simple_evaluate(tasks=[task], **how)
        samples = evaluated.pop("samples")
        tracker.save_results_aggregated(results=evaluated, samples=samples)
        tracker.save_results_samples(task, samples[task])
    run = read_run(tmp_path)
    assert (run.tasks(), run.notes) == (tasks, ())
    for task, settings in run.settings.items():
        rows = run.samples[task].read_text(encoding="utf-8").splitlines()
        assert settings["documents"] == len(rows)
        assert (settings["num_fewshot"], settings["fewshot_seed"]) == (0, 1234)
        assert len(settings["task_hash"]) == 64
    for task, metric in run.scores:
        documents = documents_of(run, task, metric)
        assert len(documents.keys) == run.scores[task, metric].documents
        assert run.scores[task, metric].higher_is_better


@pytest.mark.parametrize(
    ("metric", "limits"),
    [
        *(
            ("choice_prob_norm", SHARE),
            ("exact_match_mc", SHARE),
            ("brier_score", (0, 2)),
        ),
        *(("bpb", None), ("choice_logprob", None), ("choice_logprob_norm", None)),
    ],
)
def test_metrics_of_lm_eval_0_5_have_their_limits(metric, limits):
    assert metric_of("arc", f"{metric},none").limits == limits
