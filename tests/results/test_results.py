from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from lm_eval_pruned.results import runs
from lm_eval_pruned.results.documents import TRANSFORMS, Documents, read_documents
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.runs import setting_of
from tests.helpers.results_files import DATE, pruning, score_of, write_run, write_sweep


TASKS = {"tf": {"acc,none": [1.0, 0.0, 1.0]}}
BOOLQ = {"boolq": {"acc,none": [1.0]}}
OLD, NEW = "2026-01-02T03-04-05.678901", "2026-01-02T11-00-00.000001"


def test_a_results_file(tmp_path):
    file = write_run(tmp_path / "model", TASKS, pruning=pruning(20))
    run = runs.read_run(file)
    score = run.scores["tf", "acc,none"]
    assert score.value == pytest.approx(2 / 3)
    assert (score.stderr, score.higher_is_better, score.documents) == (None, True, 3)
    assert run.expansion_ratio == 3.2
    assert not run.is_baseline
    assert run.samples["tf"].name == f"samples_tf_{DATE}.jsonl"


@pytest.mark.parametrize("below", ["", "org__model"])
def test_the_newest_results_of_a_folder_count(tmp_path, below):
    write_run(tmp_path / below, {"tf": {"acc,none": [0.0]}}, date=NEW)
    write_run(tmp_path / below, {"tf": {"acc,none": [1.0]}}, date=OLD)
    run = runs.read_run(tmp_path)
    assert run.scores["tf", "acc,none"].value == 0
    assert NEW in run.samples["tf"].name


@pytest.mark.parametrize("below", ["", "org__model"])
def test_results_of_several_commands_in_a_folder_are_all_read(tmp_path, below):
    folder = tmp_path / below
    write_run(folder, {"tf": {"acc,none": [1.0, 0.0]}, **BOOLQ}, date=OLD)
    write_run(folder, {"tf": {"acc,none": [0.0]}}, date=NEW, lm_eval_version="0.4.14")
    run = runs.read_run(tmp_path)
    assert {key: score.value for key, score in run.scores.items()} == {
        ("tf", "acc,none"): 0.0,
        ("boolq", "acc,none"): 1.0,
    }
    assert OLD in run.samples["boolq"].name
    assert NEW in run.samples["tf"].name
    assert read_documents(run, "boolq", "acc,none").values.tolist() == [1.0]
    versions = {"boolq": "0.4.13", "tf": "0.4.14"}
    assert setting_of(run, "lm_eval_version") == versions
    assert setting_of(run, "num_fewshot") == 0
    assert (run.name, run.notes) == (tmp_path.name, ())


def test_results_of_one_model_in_several_folders_are_all_read(tmp_path):
    """Without `pretrained` the harness names the folder of each command at random."""
    write_run(tmp_path / "a8h3", TASKS, pruning=pruning(20))
    write_run(tmp_path / "x7f1", BOOLQ, pruning=pruning(20))
    run = runs.read_run(tmp_path)
    assert (run.tasks(), run.notes) == (["tf", "boolq"], ())


@pytest.mark.parametrize("folders", [("", ""), ("x", "z")])
@pytest.mark.parametrize(
    "other",
    [
        {"pruning": pruning(40)},
        {"config": {"model": "hf", "model_args": {"pretrained": "tiny"}}},
    ],
)
def test_results_of_two_models_in_a_folder_are_not_mixed(tmp_path, other, folders):
    """The harness names the folder after the checkpoint: two sizes share it."""
    write_run(tmp_path / folders[0], BOOLQ, date=OLD, **other)
    write_run(tmp_path / folders[1], TASKS, date=NEW, pruning=pruning(20))
    with pytest.raises(ResultsError, match=rf"several models \(.*results_{OLD}"):
        runs.read_run(tmp_path)


def test_a_renamed_results_file_finds_its_samples(tmp_path):
    file = write_run(tmp_path, TASKS)
    renamed = file.rename(tmp_path / "baseline.json")
    assert runs.read_run(renamed).samples["tf"].is_file()


HOSTILE = {
    "empty": (b"", "not whole JSON"),
    "truncated": (b'{"results": {"tf": {"acc,none": 0.', "not whole JSON"),
    "binary": (b"\x80\x81\xff\x00", "not whole JSON"),
    "a list": (b"[1, 2]", "holds a list"),
    "foreign": (b'{"scores": {"tf": 1}}', "no results file of lm-eval"),
    "results is a list": (b'{"results": [1]}', "no results file of lm-eval"),
    "no tasks": (b'{"results": {}}', "no results file of lm-eval"),
    "task is a number": (b'{"results": {"tf": 0.5}}', "with scores in it"),
    "no metrics": (b'{"results": {"tf": {"alias": "tf"}}}', "with scores in it"),
    "score is a list": (b'{"results": {"tf": {"acc,none": [1]}}}', "with scores in it"),
    "deep": (b"[" * 200_000, "not whole JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_results_files(tmp_path, name):
    content, words = HOSTILE[name]
    file = tmp_path / f"results_{DATE}.json"
    file.write_bytes(content)
    with pytest.raises(ResultsError, match=words) as caught:
        runs.read_run(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_paths(tmp_path):
    with pytest.raises(ResultsError, match="does not exist"):
        runs.read_run(tmp_path / "nowhere")
    with pytest.raises(ResultsError, match=r"holds no results_\*.json: give"):
        runs.read_run(tmp_path)


def test_nan_scores_are_read(tmp_path):
    file = write_run(tmp_path, {"tf": {"acc,none": {"values": [float("nan"), 1.0]}}})
    assert math.isnan(runs.read_run(file).scores["tf", "acc,none"].value)


def damage_samples(tmp_path, change):
    write_run(tmp_path, TASKS)
    run = runs.read_run(tmp_path)
    file = run.samples["tf"]
    file.write_bytes(change(file.read_bytes()))
    return run, file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-20], "line 3: not whole JSON"),
        (lambda text: b"".join(text.splitlines(True)[:2]), "holds 2 documents.*says 3"),
        (lambda text: b"", "holds 0 documents"),
        (
            lambda text: text.replace(b"doc_hash", b"other"),
            "line 1: not whole JSON",
        ),
        (lambda text: b"\xff\xfe", "line 1: not whole JSON"),
    ],
)
def test_hostile_samples(tmp_path, change, words):
    run, file = damage_samples(tmp_path, change)
    with pytest.raises(ResultsError, match=words) as caught:
        read_documents(run, "tf", "acc,none")
    assert str(file) in str(caught.value)


RNG = np.random.default_rng(0)
PAIRS = [
    [-float(v), int(w)]
    for v, w in zip(RNG.gamma(9, size=12), RNG.integers(1, 90, 12), strict=True)
]


@pytest.mark.parametrize(
    ("values", "aggregation", "transform"),
    [
        ([True, False, True], "mean", "mean"),
        ([0.25, 0.5, 0.75], "mean", "mean"),
        ([[True, False], [True], [False, True, True]], "pooled", "mean"),
        ([[True, False], [True, True]], "pooled", "mean"),
        ([-1.5, -2.5, -0.5], "perplexity", "perplexity"),
        (PAIRS, "weighted", "perplexity"),
        (PAIRS, "bits", "bits_per_byte"),
    ],
)
def test_documents_reproduce_the_score(tmp_path, values, aggregation, transform):
    spec = {"values": values, "aggregation": aggregation}
    run = runs.read_run(write_run(tmp_path, {"t": {"m,none": spec}}))
    documents = read_documents(run, "t", "m,none")
    assert documents.transform == transform
    score = TRANSFORMS[transform](
        np.average(documents.values, weights=documents.weights)
    )
    assert score == pytest.approx(score_of(values, aggregation))


def test_an_aggregation_that_is_no_mean_is_not_guessed(tmp_path):
    spec = {"values": [1.0, 0.0, 1.0], "score": 0.31}
    run = runs.read_run(write_run(tmp_path, {"t": {"f1,none": spec}}))
    assert read_documents(run, "t", "f1,none") is None


def test_each_filter_has_its_own_documents(tmp_path):
    tasks = {
        "gsm8k": {
            "exact_match,strict-match": [0.0, 0.0, 1.0],
            "exact_match,flexible-extract": [1.0, 0.0, 1.0],
        }
    }
    run = runs.read_run(write_run(tmp_path, tasks))
    strict = read_documents(run, "gsm8k", "exact_match,strict-match")
    assert strict.values.tolist() == [0, 0, 1]


def test_repeated_documents_are_told_apart(tmp_path):
    docs = {0: {"q": "same"}, 1: {"q": "same"}, 2: {"q": "other"}}
    spec = {"values": [1.0, 0.0, 1.0], "docs": docs}
    run = runs.read_run(write_run(tmp_path, {"t": {"acc,none": spec}}))
    keys = read_documents(run, "t", "acc,none").keys
    assert len(set(keys)) == 3


def test_stories_of_musr_are_clusters(tmp_path):
    docs = {n: {"narrative": f"story {n // 2}", "question": n} for n in range(6)}
    spec = {"values": [1.0, 0.0] * 3, "docs": docs}
    name = "leaderboard_musr_object_placements"
    run = runs.read_run(write_run(tmp_path, {name: {"acc_norm,none": spec}}))
    clusters = read_documents(run, name, "acc_norm,none").clusters
    assert len(clusters) == 6
    assert len(set(clusters)) == 3


@pytest.mark.parametrize("weighted", [True, False])
def test_subjects_of_a_group_are_strata(tmp_path, weighted):
    rng = np.random.default_rng(1)
    tasks = {
        f"mmlu_{n}": {"acc,none": rng.integers(0, 2, size=5 + n).astype(float)}
        for n in range(12)
    }
    values = [task["acc,none"] for task in tasks.values()]
    score = (
        np.concatenate(values).mean()
        if weighted
        else np.mean([v.mean() for v in values])
    )
    halves = {
        "mmlu": ["stem", "other"],
        "stem": list(tasks)[:6],
        "other": list(tasks)[6:],
    }
    file = write_run(
        tmp_path,
        {t: {"acc,none": list(m["acc,none"])} for t, m in tasks.items()},
        groups=halves,
        group_scores={"mmlu": {"acc,none": float(score), "acc_stderr,none": 0.02}},
    )
    run = runs.read_run(file)
    assert run.tasks(subtasks=False) == ["mmlu"]
    documents = read_documents(run, "mmlu", "acc,none")
    assert documents.clusters is None
    assert len(set(documents.strata)) == 12
    assert np.average(documents.values, weights=documents.weights) == pytest.approx(
        score
    )


def test_a_sweep_folder(tmp_path):
    write_sweep(
        tmp_path,
        {
            "base": (0, TASKS),
            "p20": (20, {**TASKS, "if": {"acc,none": [1.0]}}),
            "p40": (40, {}),
        },
        p40="tf",
    )
    sweep = runs.read_sweep(tmp_path)
    assert [run.name for run in sweep.runs] == ["base", "p20"]
    assert sweep.runs[0].is_baseline
    assert sweep.runs[1].tasks() == ["if", "tf"]
    shots = {task: each["num_fewshot"] for task, each in sweep.runs[1].settings.items()}
    assert shots == {"if": 0, "tf": 0}
    assert sweep.failures == (runs.Failure("p40", "tf", "out of memory"),)
    assert [run.name for run in runs.read_sweep(tmp_path).runs] == [
        "base",
        "p20",
    ]
    assert runs.read_run(tmp_path / "units" / "p20").tasks() == ["if", "tf"]
    with pytest.raises(ResultsError, match="results of several models"):
        runs.read_run(tmp_path)


def test_a_unit_that_succeeded_after_it_failed_is_done(tmp_path):
    write_sweep(tmp_path, {"base": (0, TASKS)})
    (tmp_path / "units" / "base" / "tf" / "error.json").write_text('{"message": "old"}')
    assert runs.read_sweep(tmp_path).failures == ()


@pytest.mark.parametrize(
    ("definition", "words"),
    [
        (
            {"schema_version": 2, "configurations": [{"id": "a"}]},
            "upgrade lm-eval-pruned",
        ),
        ({"configurations": [{"id": "a"}]}, "has schema version None"),
        (
            {"schema_version": 1, "configurations": [{"id": "a"}]},
            "no finished unit yet",
        ),
    ],
)
def test_hostile_sweep_folders(tmp_path, definition, words):
    (tmp_path / "sweep.json").write_text(json.dumps(definition))
    with pytest.raises(ResultsError, match=words):
        runs.read_sweep(tmp_path)


def test_a_folder_that_is_no_sweep(tmp_path):
    with pytest.raises(ResultsError, match=r"no sweep\.json"):
        runs.read_sweep(tmp_path)


@pytest.mark.slow
def test_what_the_harness_writes(tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    tasks = ["pruned_demo_truthfulness", "pruned_demo_instruction_following"]
    for task in tasks:
        tracker = EvaluationTracker(output_path=str(tmp_path))
        evaluated = simple_evaluate(
            model="dummy",
            model_args="pretrained=dummy",
            tasks=[task],
            log_samples=True,
            evaluation_tracker=tracker,
            bootstrap_iters=0,
        )
        samples = evaluated.pop("samples")
        tracker.save_results_aggregated(results=evaluated, samples=samples)
        tracker.save_results_samples(task, samples[task])
    run = runs.read_run(tmp_path)
    assert (run.tasks(), run.notes) == (tasks, ())
    for task, settings in run.settings.items():
        rows = run.samples[task].read_text(encoding="utf-8").splitlines()
        assert settings["documents"] == len(rows)
        assert (settings["num_fewshot"], settings["fewshot_seed"]) == (0, 1234)
        assert len(settings["task_hash"]) == 64
        assert settings["lm_eval_version"] == setting_of(run, "lm_eval_version")
    for task, metric in run.scores:
        documents = read_documents(run, task, metric)
        assert len(documents.keys) == run.scores[task, metric].documents
        assert run.scores[task, metric].higher_is_better


def test_documents_in_another_order_keep_what_belongs_to_each():
    keys = tuple(("task", name, 0) for name in "abc")
    documents = Documents(keys, np.arange(3.0), np.arange(1.0, 4), tuple("xyz"), "mean")
    other = replace(documents, keys=keys[::-1])
    turned = documents.in_the_order_of(other)
    assert turned.keys == other.keys
    assert turned.values.tolist() == [2, 1, 0]
    assert turned.weights.tolist() == [3, 2, 1]
    assert turned.clusters == tuple("zyx")
    assert documents.in_the_order_of(replace(documents, keys=keys[:2])) is None
