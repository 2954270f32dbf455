"""Units in blocks of documents: resumption inside a task, and stopping when decided."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lm_eval_pruned.compare.comparison import compare, read_comparands
from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.gate import Rule, check, make_baseline
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from lm_eval_pruned.report.report import write_report
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.sweep_results import read_sweep
from lm_eval_pruned.sweeps.block_options import read_block_options
from lm_eval_pruned.sweeps.document_order import DocumentOrder
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.run import run_sweep
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
def in_blocks(tiny_llama, tasks, tmp_path_factory):
    """Folder of a sweep in blocks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("blocks") / "sweep"
    options = sweep_options(tiny_llama, tasks, folder, block_size=16)
    assert run_sweep(options) == 0
    return folder


def _responses(folder):
    return {
        unit: {
            name: [sample["resps"] for sample in rows]
            for name, rows in found["samples"].items()
        }
        for unit, found in results_of(folder).items()
    }


def test_blocks_change_no_score(options, in_blocks):
    options["tasks"] = ["tiny_choice"]
    assert run_sweep(options) == 0
    whole, blocks = results_of(Path(options["output_path"])), results_of(in_blocks)
    for unit, found in whole.items():
        assert found["hashes"] == blocks[unit]["hashes"]
        assert found["scores"] == blocks[unit]["scores"]


def test_killed_unit_goes_on_from_its_finished_blocks(options, in_blocks):
    """Dies after some blocks of one unit, several times over, in a sampling task too."""
    options["block_size"] = 16
    folder = Path(options["output_path"])

    def dying(after):
        from lm_eval_pruned.sweeps import blocks

        write, left = blocks.write_atomically, after

        def counted(*arguments):
            nonlocal left
            write(*arguments)
            left -= 1
            if left == 0:
                os.kill(os.getpid(), 9)

        blocks.write_atomically = counted
        return run_sweep(options)

    kept = []
    for after in (2, 3, 1, 6):
        assert forked(functools.partial(dying, after)) == -9
        kept.append(len(list(folder.glob(".blocks/*/*/*/*.json"))))
    # Nothing is computed twice: each life left as many blocks more as it made, but for those
    # of units that were finished and are now results.
    assert kept[0] == 2
    assert kept[2:] != kept[:2]
    done = len(list(folder.glob("units/*/*/unit.json")))
    assert done >= 2
    assert forked(functools.partial(run_sweep, options)) == 0
    assert results_of(folder) == results_of(in_blocks)
    assert not (folder / ".blocks").exists()


@pytest.mark.slow
def test_killed_command_goes_on_from_its_finished_blocks(options, in_blocks, tasks):
    """A process of its own, killed from outside in the middle of a unit."""
    folder = Path(options["output_path"])
    command = [sys.executable, "-m", "lm_eval_pruned.cli", "sweep"]
    command += ["--model_args", f"pretrained={options['model_args']['pretrained']}"]
    command += ["--ratios", "1.5", "--tasks", "tiny_both", "--device", "cpu"]
    command += ["--include_path", str(tasks), "--output_path", str(folder)]
    command += ["--block_size", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(folder.glob(".blocks/*/*/*/*.json")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    process.kill()
    assert process.wait() == -9
    assert list(folder.glob(".blocks/*/*/*/*.json"))
    assert subprocess.run(command, env=environment, check=False).returncode == 0
    assert results_of(folder) == results_of(in_blocks)


def test_blocks_of_other_requests_are_computed_anew(options, in_blocks):
    folder = Path(options["output_path"])
    options["block_size"] = 16

    def damaged():
        from lm_eval_pruned.sweeps import blocks

        write = blocks.write_atomically

        def broken(file, text):
            content = json.loads(text)
            if file.name.endswith("0.json"):
                content["requests"] = "of something else"
            write(file, json.dumps(content) if file.name[-6] != "1" else "{")
            if file.name.endswith("2.json"):
                os.kill(os.getpid(), 9)

        blocks.write_atomically = broken
        return run_sweep(options)

    assert forked(damaged) == -9
    assert run_sweep(options) == 0
    assert results_of(folder) == results_of(in_blocks)


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
    assert not Path(stopped["output_path"], ".blocks").exists()


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


def test_killed_while_it_looks_a_unit_ends_as_an_undisturbed_one(stopped, tmp_path):
    options = {**stopped, "output_path": str(tmp_path / "sweep")}

    def dying():
        from lm_eval_pruned.sweeps import until_decided

        evaluate, looks = until_decided.Looks.add, 0

        def counted(*arguments):
            nonlocal looks
            looks += 1
            evaluate(*arguments)
            os.kill(os.getpid(), 9)

        until_decided.Looks.add = counted
        return run_sweep(options)

    assert forked(dying) == -9
    assert list(Path(options["output_path"]).glob(".blocks/*/*/*/*.json"))
    assert run_sweep(options) == 0
    assert results_of(Path(options["output_path"])) == results_of(
        Path(stopped["output_path"])
    )


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
    assert stopping.documents == 25
    assert stopping.reason in ("equivalent", "difference")


def test_few_shot_examples_are_those_of_the_full_run(stopped, tmp_path):
    options = {
        **stopped,
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


def test_order_takes_members_in_proportion():
    order = DocumentOrder({"few": 10, "many": 90}, seed=3)
    for count in (20, 50, 80):
        first = order.first(count)
        assert abs(len(first["few"]) - count / 10) <= 1
    assert min(len(each) for each in order.first(order.least).values()) >= 2
    assert order.documents == DocumentOrder({"many": 90, "few": 10}, seed=3).documents
    assert order.documents != DocumentOrder({"many": 90, "few": 10}, seed=4).documents


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stop_when": "soon"}, "stop_when=soon"),
        ({"stop_when": "decided", "log_samples": False}, "log_samples is False"),
        ({"stop_when": "decided", "ray": True}, "stop_when=decided .* leave --ray out"),
        ({"block_size": 8, "ray": "10.0.0.5:6379"}, "block_size=8 .* leave --ray out"),
        ({"block_size": 0}, "block_size=0"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        read_block_options(options)


@pytest.mark.parametrize("blocks", [{"stop_when": "decided"}, {"block_size": 8}])
def test_blocks_on_ray_are_refused_before_anything_starts(
    stopped, tmp_path, monkeypatch, blocks
):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(PrunedHFLM, "__init__", lambda *_, **__: pytest.fail("loaded"))
    kept = {k: v for k, v in stopped.items() if k not in ("stop_when", "block_size")}
    folder = tmp_path / "sweep"
    with pytest.raises(ValueError, match="which Ray's workers do not see") as error:
        run_sweep({**kept, **blocks, "ray": True, "output_path": str(folder)})
    assert "\n" not in str(error.value)
    assert not folder.exists()


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2"):
        read_block_options({"block_size": 8})


def test_a_shard_without_the_unpruned_model_is_refused(stopped, tmp_path):
    options = {**stopped, "output_path": str(tmp_path / "sweep")}
    with pytest.raises(ValueError, match="unpruned model"):
        run_sweep(options, shard=(1, 3))
    shutil.copytree(
        Path(stopped["output_path"], "units", "baseline"),
        tmp_path / "sweep" / "units" / "baseline",
    )
    assert run_sweep(options, shard=(1, 3)) == 0


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
    assert -0.9 < row.claim.low < row.claim.high < 0.9
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


def test_the_report_marks_partial_scores(stopped, tmp_path):
    write_report(stopped["output_path"], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert re.search(r"0\.\d{4} ▼ \(partial: \d+ of 400\)", text)
    assert "stopped when decided" in text
    assert "of 400 documents" in (tmp_path / "report" / "results.csv").read_text()
