"""Units that end when their comparison with the unpruned model is decided."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lm_eval_pruned.compare.comparison import compare, read_comparands
from lm_eval_pruned.compare.verdicts import Margin
from lm_eval_pruned.gate.baseline import Rule
from lm_eval_pruned.gate.check import check, make_baseline
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.report.report import write_report
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.run import run_sweep
from lm_eval_pruned.sweeps.stopping import documents_of_looks, read_rule
from tests.helpers.made_tasks import write_choice_task
from tests.helpers.sweeping import (
    files_of,
    forked,
    results_of,
    sweep_options,
    write_tasks,
)


pytestmark = pytest.mark.usefixtures("quick")


DOCUMENTS = 60


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), DOCUMENTS)


@pytest.fixture
def options(tiny_llama, tasks, tmp_path):
    return sweep_options(tiny_llama, tasks, tmp_path / "sweep")


@pytest.fixture(scope="module")
def stopped(tiny_llama, tmp_path_factory):
    """Folder of a sweep that stops when decided, on a task that the unpruned model solves."""
    place = tmp_path_factory.mktemp("stopped")
    write_choice_task(place / "tasks", questions=400)
    options = {
        "model_args": {"pretrained": str(tiny_llama)},
        "tasks": ["tiny_choice"],
        "include_path": str(place / "tasks"),
        "output_path": str(place / "first"),
        "device": "cpu",
    }
    assert run_sweep(options) == 0
    found = results_of(place / "first")["baseline/tiny_choice"]["samples"]
    (samples,) = found.values()
    questions = place / "tasks" / "tiny_choice.jsonl"
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for sample in samples:
        chances = [float(response[0][0]) for response in sample["resps"]]
        rows[sample["doc_id"]]["answer"] = chances.index(max(chances))
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options |= {
        "ratios": ["1.0", "0.5"],
        "output_path": str(place / "sweep"),
        "stop_when": "decided",
    }
    assert run_sweep(options) == 0
    return options


def test_decided_units_stop_and_say_so(stopped):
    sweep = read_sweep(stopped["output_path"])
    base, *runs = sweep.runs
    assert base.scores["tiny_choice", "acc,none"].value == 1.0
    assert base.scores["tiny_choice", "acc,none"].documents == 400
    assert not base.stopping
    for run in runs:
        stopping = run.stopping["tiny_choice"]
        assert stopping.reason == "difference"
        assert stopping.of == 400
        assert stopping.documents < 200
        assert stopping.sizes == 2
        score = run.scores["tiny_choice", "acc,none"]
        assert score.documents == stopping.documents
        low, high = stopping.scores["acc,none"]
        assert low <= score.value <= high
        assert stopping.high < 0
    assert not list(Path(stopped["output_path"]).glob(".unfinished/*/*"))


def test_sizes_share_one_order_of_documents_and_their_prompts(stopped):
    samples = {
        unit: {row["doc_id"]: row["prompt_hash"] for row in rows}
        for unit, found in results_of(Path(stopped["output_path"])).items()
        for rows in found["samples"].values()
    }
    base = samples.pop("baseline/tiny_choice")
    few, many = sorted(samples.values(), key=len)
    assert few.keys() <= many.keys() <= base.keys()
    assert all(base[document] == prompt for document, prompt in many.items())
    assert sorted(few) != list(range(len(few)))


def test_a_stopped_sweep_is_done(stopped):
    before = files_of(Path(stopped["output_path"]))
    assert run_sweep(stopped) == 0
    assert files_of(Path(stopped["output_path"])) == before


@pytest.mark.slow
def test_answers_are_those_of_a_run_without_the_rule(stopped, tmp_path):
    """Of the documents of all looks, and with a cache that an interrupted run left."""
    whole = {**stopped, "output_path": str(tmp_path / "whole"), "ratios": ["0.5"]}
    del whole["stop_when"]
    assert run_sweep(whole) == 0
    again = {**stopped, "output_path": str(tmp_path / "again")}
    again["use_cache"] = str(tmp_path / "cache" / "answers")

    def dying():
        from lm_eval_pruned.sweeps import stopping

        look = stopping.look

        def once(*arguments):
            look(*arguments)
            os.kill(os.getpid(), 9)

        stopping.look = once
        return run_sweep(again)

    assert forked(dying) == -9
    assert list((tmp_path / "cache").glob("answers_ratio-*"))
    assert run_sweep(again) == 0
    found = results_of(tmp_path / "again")
    assert found == results_of(Path(stopped["output_path"]))
    full, part = (
        {
            row["doc_id"]: row
            for rows in units["ratio-0.5/tiny_choice"]["samples"].values()
            for row in rows
        }
        for units in (results_of(tmp_path / "whole"), found)
    )
    for document, row in part.items():
        for key in ("prompt_hash", "doc_hash", "acc"):
            assert row[key] == full[document][key]
        answers, others = (
            [float(response[0][0]) for response in each["resps"]]
            for each in (row, full[document])
        )
        # Other requests in a batch may change the last digit.
        assert answers == pytest.approx(others, rel=1e-5)


@pytest.mark.slow
def test_energy_is_of_all_looks_and_no_answer_of_an_earlier_look_came_for_nothing(
    stopped, tmp_path, monkeypatch
):
    counted = []
    count = PrunedHFLM.count_kept_answers
    monkeypatch.setattr(
        PrunedHFLM,
        "count_kept_answers",
        lambda lm, answers: (counted.append(answers), count(lm, answers))[1],
    )
    options = {**stopped, "output_path": str(tmp_path / "sweep"), "ratios": ["1.0"]}
    options["model_args"] = {**stopped["model_args"], "energy": True}
    options["tasks"] = ["tiny_choice"]
    options["stop_when"] = "decided:1pt"
    assert run_sweep(options) == 0
    run = read_sweep(options["output_path"]).runs[1]
    (block,) = run.energy.values()
    stopping = run.stopping["tiny_choice"]
    requests = block["request_types"]["loglikelihood"]["requests"]
    assert requests == 2 * stopping.documents
    assert block["cached_answers"] == 0
    assert -2 * stopping.looks[0] in counted or len(stopping.looks) == 1


@pytest.mark.slow
def test_unclear_units_use_all_documents(options):
    options |= {"tasks": ["tiny_choice", "tiny_scored"], "stop_when": "decided"}
    assert run_sweep(options) == 0
    _, run = read_sweep(options["output_path"]).runs
    for task in ("tiny_choice", "tiny_scored"):
        assert run.scores[task, "acc,none"].documents in (DOCUMENTS, None)
        assert run.stopping[task].reason in ("all documents", "difference")


def test_wide_margins_are_decided_early(options):
    options |= {"tasks": ["tiny_choice"], "stop_when": "decided:90pt"}
    assert run_sweep(options) == 0
    _, run = read_sweep(options["output_path"]).runs
    stopping = run.stopping["tiny_choice"]
    assert stopping.looks in ((30,), (30, 60))
    assert stopping.reason in ("equivalent", "difference")


def test_examples_that_depend_on_other_documents_are_refused(stopped, tmp_path):
    options = {**stopped, "output_path": str(tmp_path / "sweep"), "num_fewshot": 2}
    assert run_sweep(options) == 1
    errors = list((tmp_path / "sweep").glob("units/*/*/error.json"))
    assert len(errors) == 3
    for file in errors:
        message = json.loads(file.read_text())["message"]
        assert "tiny_choice draws its few-shot examples at random" in message


@pytest.mark.slow
def test_first_examples_are_those_of_the_full_run(stopped, tmp_path):
    tasks = tmp_path / "tasks"
    shutil.copytree(stopped["include_path"], tasks)
    with (tasks / "tiny_choice.yaml").open("a") as file:
        file.write("fewshot_config:\n  sampler: first_n\n")
    options = {
        **stopped,
        "include_path": str(tasks),
        "output_path": str(tmp_path / "sweep"),
        "num_fewshot": 2,
        "ratios": ["0.5"],
    }
    assert run_sweep(options) == 0
    found = results_of(tmp_path / "sweep")
    prompts = [
        {
            row["doc_id"]: row["prompt_hash"]
            for rows in unit["samples"].values()
            for row in rows
        }
        for unit in (found["baseline/tiny_choice"], found["ratio-0.5/tiny_choice"])
    ]
    assert prompts[1].items() <= prompts[0].items()


def test_sampled_answers_are_refused(options):
    options |= {"tasks": ["tiny_sentence"], "stop_when": "decided"}
    assert run_sweep(options) == 1
    for file in Path(options["output_path"]).glob("units/*/*/error.json"):
        assert "draws its answers at random" in json.loads(file.read_text())["message"]


def test_looks_take_members_in_proportion_and_hold_those_before():
    def looks(**options):
        found = {"limit": None, "samples": None, "seed": [3]} | options
        tasks = {
            name: SimpleNamespace(eval_docs=range(count))
            for name, count in (("few", 10), ("many", 90))
        }
        return documents_of_looks(tasks, SimpleNamespace(**found))

    found = looks()
    # An eighth of the documents would be too few to look at.
    assert list(found) == [26, 50, 100]
    assert [len(each["few"]) for each in found.values()] == [3, 5, 10]
    before = {"few": [], "many": []}
    for each in found.values():
        assert each == {name: sorted(rows) for name, rows in each.items()}
        assert all(set(before[name]) <= set(each[name]) for name in each)
        before = each
    assert found == looks()
    assert found != looks(seed=[4])
    assert looks(limit=1, seed=None) == {2: {"few": [0], "many": [0]}}
    assert looks(samples={"few": [7, 1], "many": [5]})[3]["few"] == [1, 7]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stop_when": "soon"}, "stop_when=soon"),
        ({"stop_when": "decided", "log_samples": False}, "log_samples is False"),
        ({"stop_when": "decided", "ray": True}, "stop_when=decided .* leave out --ray"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        read_rule(options)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2"):
        read_rule({"stop_when": "decided"})


@pytest.mark.slow
def test_a_shard_without_the_unpruned_model_fails(stopped, tmp_path):
    options = {**stopped, "output_path": str(tmp_path / "sweep")}
    assert run_sweep(options, shard=(1, 3)) == 1
    (error,) = Path(options["output_path"]).glob("units/*/*/error.json")
    assert "no results of the unpruned model" in error.read_text()
    shutil.copytree(
        Path(stopped["output_path"], "units", "baseline"),
        tmp_path / "sweep" / "units" / "baseline",
    )
    assert run_sweep(options, shard=(1, 3), retry_failed=True) == 0


def test_what_was_not_to_stop_keeps_its_fingerprint(options):
    plain, stopping = Sweep(options), Sweep({**options, "stop_when": "decided"})
    more = Sweep({**options, "stop_when": "decided", "ratios": ["1.5", "1.0"]})
    task = plain.tasks[0]
    for number, same in ((0, True), (1, False)):
        definitions = [
            sweep.definition(sweep.configurations[number], task)
            for sweep in (plain, stopping, more)
        ]
        assert (definitions[0] == definitions[1]) is same
        assert (definitions[1] == definitions[2]) is same


def test_compare_calls_partial_scores_partial(stopped):
    base, runs = read_comparands([stopped["output_path"]])
    comparison = compare(base, runs)
    for row in comparison.rows:
        assert row.verdict == ("worse" if row.primary else "restated")
        assert "partial" in row.method
        assert row.documents < row.of == 400
        assert (row.q is not None) is row.primary
        assert row.low <= row.difference <= row.high
    assert any("partial: " in note for note in comparison.notes)
    assert not any("other settings" in note for note in comparison.notes)
    assert any("not over all tasks" in note for note in comparison.notes)


def test_compare_shows_equivalence_that_a_unit_stopped_by(options):
    options |= {"tasks": ["tiny_choice"], "stop_when": "decided:90pt"}
    assert run_sweep(options) == 0
    base, runs = read_comparands([options["output_path"]])
    (row,) = compare(base, runs, margin=Margin("equivalent", "90pt")).rows
    assert row.verdict == "equivalent"
    assert row.claim.q < 0.05
    # Nothing is said about a margin that was not looked at.
    (other,) = compare(base, runs, margin=Margin("equivalent", "95pt")).rows
    assert other.claim is None
    assert other.verdict == "undecided"


def test_check_refuses_partial_scores(stopped):
    runs = {run.name: run for run in read_sweep(stopped["output_path"]).runs}
    with pytest.raises(ResultsError, match=r"partial: \d+ of 400 documents"):
        make_baseline(runs, Rule("absolute", 0.5))
    complete = {name: replace(run, stopping={}) for name, run in runs.items()}
    baseline = make_baseline(complete, Rule("absolute", 0.5))
    findings = {each.run: each for each in check(runs, baseline)}
    assert findings["baseline"].status == "pass"
    assert findings["ratio-1"].status == "undecided"
    assert "partial" in findings["ratio-1"].message


@pytest.mark.slow
def test_the_report_marks_partial_scores(stopped, tmp_path):
    write_report(stopped["output_path"], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert re.search(r"0\.\d{4} ▼ \(partial: \d+ of 400\)", text)
    assert "stopped when decided" in text
    assert "of 400 documents" in (tmp_path / "report" / "results.csv").read_text()
