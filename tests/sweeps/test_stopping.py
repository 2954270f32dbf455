"""Units that end when their comparison with the unpruned model is decided."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lm_eval_pruned.compare.comparison import compare, read_comparands
from lm_eval_pruned.compare.verdicts import Margin
from lm_eval_pruned.gate.baseline import Rule
from lm_eval_pruned.gate.check import check, make_baseline
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.sweeps import stopping as module
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.run import run_sweep
from lm_eval_pruned.sweeps.stopping import documents_of_looks, read_rule
from tests.helpers.made_tasks import write_made_tasks
from tests.helpers.sweeping import (
    errors_of,
    files_of,
    forked,
    results_of,
    sweep_options,
    write_tasks,
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), documents=60)


@pytest.fixture(scope="module")
def stopped(tiny_llama, tmp_path_factory):
    """Options of a sweep that stopped when decided, on a task that the unpruned model solves."""
    place = tmp_path_factory.mktemp("stopped")
    made, tasks = write_made_tasks(place / "tasks", questions=400), ["tiny_choice"]
    first = sweep_options(tiny_llama, made, place / "first", ratios=[], tasks=tasks)
    assert run_sweep(first) == 0
    questions = place / "tasks" / "tiny_choice.jsonl"
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for sample in samples_of(place / "first", "baseline").values():
        chances = [float(response[0][0]) for response in sample["resps"]]
        rows[sample["doc_id"]]["answer"] = chances.index(max(chances))
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"ratios": ["1.0", "0.5"], "stop_when": "decided"}
    options = {**first, **more, "output_path": str(place / "sweep")}
    assert run_sweep(options) == 0
    return options


def samples_of(folder, configuration):
    """Return the samples of the one task of a configuration by document."""
    (rows,) = results_of(folder)[f"{configuration}/tiny_choice"]["samples"].values()
    return {row["doc_id"]: row for row in rows}


def test_decided_units_stop_and_say_so(stopped):
    folder, key = stopped["output_path"], ("tiny_choice", "acc,none")
    base, runs = read_comparands([folder])
    assert (base.scores[key].value, base.scores[key].documents) == (1.0, 400)
    assert not base.stopping
    for run in runs:
        stopping, score = run.stopping["tiny_choice"], run.scores[key]
        assert (stopping.reason, stopping.of, stopping.sizes) == ("difference", 400, 2)
        assert score.documents == stopping.looks[-1] < 200
        low, high = stopping.scores["acc,none"]
        assert low <= score.value <= high < 1
        assert stopping.difference == pytest.approx(score.value - 1)
        assert stopping.p < 0.05 / 2
    # All share one order of documents, at random.
    few, many = sorted((samples_of(folder, run.name) for run in runs), key=len)
    assert {*few} <= {*many}
    assert sorted(few) != [*range(len(few))]
    before = files_of(folder)
    assert run_sweep(stopped) == 0
    assert files_of(folder) == before


@pytest.mark.slow
def test_answers_are_those_of_a_run_without_the_rule(stopped, tmp_path):
    """Of the documents of all looks, and with a cache that an interrupted run left."""
    again = {**stopped, "output_path": str(tmp_path / "again")}
    again["use_cache"] = str(tmp_path / "cache" / "answers")

    def dying():
        module.look = lambda *_: os.kill(os.getpid(), 9)
        return run_sweep(again)

    assert forked(dying) == -9
    assert list((tmp_path / "cache").glob("answers_ratio-*"))
    assert run_sweep(again) == 0
    assert results_of(tmp_path / "again") == results_of(stopped["output_path"])
    whole = {**stopped, "output_path": str(tmp_path / "whole"), "ratios": ["0.5"]}
    assert run_sweep({**whole, "stop_when": None}) == 0
    full = samples_of(tmp_path / "whole", "ratio-0.5")
    for document, row in samples_of(tmp_path / "again", "ratio-0.5").items():
        for key in ("prompt_hash", "doc_hash", "acc"):
            assert row[key] == full[document][key]
        # Other requests in a batch may change the last digit.
        for one, other in zip(row["resps"], full[document]["resps"], strict=True):
            assert float(one[0][0]) == pytest.approx(float(other[0][0]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "other"),
    [("decided:90pt", "equivalent"), ("decided", "all documents")],
)
def test_a_group_and_a_task_end_by_their_rule(options, rule, other):
    options |= {"tasks": ["tiny_choice", "tiny_scored"], "stop_when": rule}
    assert run_sweep(options) == 0
    base, (run,) = read_comparands([options["output_path"]])
    for task in ("tiny_choice", "tiny_scored"):
        assert run.stopping[task].looks in ([30], [30, 60])
        assert run.stopping[task].reason in (other, "difference")
    # Nothing is said about a margin that was not looked at.
    for size, known in (("95pt", False), ("90pt", "90pt" in rule)):
        found = compare(base, [run], margin=Margin("equivalent", size)).rows
        assert any(row.claim and row.claim.q < 0.05 for row in found) == known


@pytest.mark.parametrize(
    ("task", "more", "why"),
    [
        ("tiny_choice", {"num_fewshot": 2}, "its few-shot examples at random"),
        ("tiny_sentence", {}, "its answers at random"),
    ],
)
def test_what_depends_on_other_documents_is_refused(options, task, more, why):
    assert run_sweep({**options, **more, "tasks": [task], "stop_when": "decided"}) == 1
    errors = errors_of(options["output_path"]).values()
    assert len(errors) == 2
    assert all(f"{task} draws {why}" in error["message"] for error in errors)


def test_looks_take_members_in_proportion_and_hold_those_before():
    def looks(**options):
        found = {"limit": None, "samples": None, "seed": [3]} | options
        sizes = {"few": 10, "many": 90}
        tasks = {k: SimpleNamespace(eval_docs=range(n)) for k, n in sizes.items()}
        return documents_of_looks(tasks, SimpleNamespace(**found))

    found = looks()
    # An eighth of the documents would be too few to look at.
    assert list(found) == [26, 50, 100]
    assert [len(each["few"]) for each in found.values()] == [3, 5, 10]
    for name in ("few", "many"):
        first, second, last = (each[name] for each in found.values())
        assert {*first} < {*second} < {*last}
        assert first == sorted(first)
    assert found == looks() != looks(seed=[4])
    assert looks(limit=1, seed=None) == {2: {"few": [0], "many": [0]}}
    assert looks(samples={"few": [7, 1], "many": [5]})[3]["few"] == [1, 7]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *(({"stop_when": rule}, "pass decided") for rule in ("", "soon")),
        *(({"stop_when": f"decided:{m}"}, "percentage") for m in ("", "one", "0pt")),
        ({"stop_when": "decided", "log_samples": False}, "log_samples=False"),
        ({"stop_when": "decided", "model_args": {"energy": True}}, "energy=True"),
        ({"stop_when": "decided", "ray": True}, "leave out --ray"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        read_rule(options)


def test_a_margin_without_its_unit_is_refused_before_anything_is_evaluated(options):
    said = "margin=5 allows any difference of tiny_choice acc.* did you mean 5pt"
    with pytest.raises(ValueError, match=said):
        Sweep({**options, "tasks": ["tiny_choice"], "stop_when": "decided:5"})


@pytest.mark.slow
def test_a_shard_without_the_unpruned_model_fails(stopped, tmp_path):
    options = {**stopped, "output_path": str(tmp_path)}
    assert run_sweep(options, shard=(1, 3)) == 1
    (error,) = errors_of(tmp_path).values()
    assert "no results of the unpruned model" in error["message"]
    whole = Path(stopped["output_path"], "units", "baseline")
    shutil.copytree(whole, tmp_path / "units" / "baseline")
    assert run_sweep(options, shard=(1, 3), retry_failed=True) == 0


def test_partial_scores_are_called_partial_by_compare_and_check(stopped):
    base, runs = read_comparands([stopped["output_path"]])
    comparison = compare(base, runs)
    for row in comparison.rows:
        assert row.verdict == ("worse" if row.primary else "restated")
        assert "partial" in row.method
        assert row.documents < row.of == 400
        assert (row.q is not None) is row.primary
        assert row.low <= row.difference <= row.high
    assert any("not over all tasks" in note for note in comparison.notes)
    named = {run.name: run for run in (base, *runs)}
    with pytest.raises(ResultsError, match=r"partial: \d+ of 400 documents"):
        make_baseline(named, Rule("absolute", 0.5))
    complete = {name: replace(run, stopping={}) for name, run in named.items()}
    found = check(named, make_baseline(complete, Rule("absolute", 0.5)))
    status = {each.run: each.status for each in found}
    assert (status["baseline"], status["ratio-1"]) == ("pass", "undecided")
