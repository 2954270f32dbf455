"""What docs/sweeps.md promises."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.contract.commands import lm_eval, pruned, results_in
from tests.helpers.checkpoints import ROOT, save_tiny
from tests.helpers.sweeping import (
    change,
    errors_of,
    files_of,
    results_of,
)
from tests.sweeps.conftest import quick  # noqa: F401


@pytest.fixture(scope="module")
def tiny2(tmp_path_factory):
    """Another model of the same shape."""
    return save_tiny(tmp_path_factory.mktemp("tiny2"), seed=1)


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished sweep, to be changed."""
    return shutil.copytree(finished, tmp_path / "sweep")


def compared(folder):
    """Return the tasks of each run that `compare` shows, and its notes."""
    done = pruned("compare", folder, "--format", "json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    tasks: dict[str, set[str]] = {}
    for row in told["rows"]:
        tasks.setdefault(row["run"], set()).add(row["task"])
    return tasks, " ".join(told["notes"])


def test_a_second_sweep_with_another_size_keeps_what_the_first_finished(
    folder, tiny_llama, sweep_of
):
    done = sweep_of(tiny_llama, folder, size=40)
    assert done.code == 0
    assert "stay part of the sweep: prune_percent-20 (tiny_choice)" in done.out
    tasks, notes = compared(folder)
    assert [*tasks] == ["prune_percent-20", "prune_percent-40"]
    assert "left out" not in notes
    report = pruned("report", folder)
    assert report.code == 0, report.err
    text = (folder / "report" / "report.md").read_text("utf-8")
    assert "prune_percent-20" in text and "prune_percent-40" in text


def test_a_second_sweep_with_another_task_keeps_what_the_first_finished(
    folder, tiny_llama, sweep_of
):
    assert sweep_of(tiny_llama, folder, task="tiny_sentence").code == 0
    tasks, notes = compared(folder)
    assert tasks == {"prune_percent-20": {"tiny_choice", "tiny_sentence"}}
    assert "left out" not in notes


@pytest.mark.parametrize("other", ["model", "dtype"])
def test_results_of_another_model_or_dtype_are_left_out_and_named(
    folder, tiny_llama, tiny2, sweep_of, other
):
    model, dtype = (tiny2, "float32") if other == "model" else (tiny_llama, "bfloat16")
    done = sweep_of(model, folder, task="tiny_sentence", dtype=dtype)
    named = "baseline (tiny_choice), prune_percent-20 (tiny_choice)"
    assert done.code == 0
    assert named in done.out
    tasks, notes = compared(folder)
    assert tasks == {"prune_percent-20": {"tiny_sentence"}}
    assert named in notes
    for run in ("baseline", "prune_percent-20"):
        path = folder / "units" / run
        alone = pruned("compare", path, path, "--format", "json")
        assert {row["task"] for row in json.loads(alone.out)["rows"]} == {
            "tiny_sentence"
        }
    if other == "model":
        report = pruned("report", folder)
        assert report.code == 0, report.err
        assert named in (folder / "report" / "report.md").read_text("utf-8")
    # The command of the earlier sweep takes its results in again.
    assert sweep_of(tiny_llama, folder).code == 0
    assert compared(folder)[0] == {"prune_percent-20": {"tiny_choice"}}


def test_a_size_with_another_seed_is_left_out_and_named(folder, tiny_llama, sweep_of):
    assert sweep_of(tiny_llama, folder, "--seed", 7, size=40).code == 0
    tasks, notes = compared(folder)
    assert [*tasks] == ["prune_percent-40"]
    assert "prune_percent-20 (tiny_choice)" in notes


@pytest.mark.parametrize("part", ["0/2", "7/8"])
def test_while_another_model_is_swept_nothing_of_the_old_one_is_shown(
    folder, tiny_llama, tiny2, sweep_of, part, tmp_path
):
    """A process that was killed behind its first unit, or before, leaves what a part does."""
    assert sweep_of(tiny2, folder, "--shard", part).code == 0
    said = pruned("compare", folder).sentence
    assert "prune_percent-20 (tiny_choice)" in said
    baseline = tmp_path / "baseline.json"
    done = pruned("check", folder, "--baseline", baseline, "--update")
    if part == "0/2":
        assert done.code == 0
        assert [*json.loads(baseline.read_text())["runs"]] == ["baseline"]
        assert "prune_percent-20 (tiny_choice)" in done.out
        assert sweep_of(tiny2, folder, "--shard", "1/2").code == 0
        tasks, notes = compared(folder)
        assert tasks == {"prune_percent-20": {"tiny_choice"}}
        assert "left out" not in notes
    else:
        assert "prune_percent-20 (tiny_choice)" in done.sentence


def test_a_folder_whose_sweep_json_lists_no_units_says_what_to_do(
    folder, tiny_llama, sweep_of
):
    file = folder / "sweep.json"
    whole = json.loads(file.read_text())
    for each in whole["configurations"]:
        each.pop("units", None)
    file.write_text(json.dumps(whole))
    for words in (("compare", folder), ("report", folder)):
        assert "repeat the command of the sweep" in pruned(*words).sentence
    file.unlink()
    before = {*folder.rglob("results_*.json")}
    assert sweep_of(tiny_llama, folder).code == 0
    assert {*folder.rglob("results_*.json")} == before
    assert compared(folder)[0] == {"prune_percent-20": {"tiny_choice"}}


@pytest.mark.parametrize(
    "words",
    [
        ("--model_args", "dtype=flaot16"),
        ("--model_args", "trust_remote_code=off"),
        ("--model_args", "backend=casual"),
        ("--model_args", "prefix_sharing=maybe"),
        ("--model_args", "slot_refilling=maybe"),
        ("--model_args", "energy=maybe"),
        ("--model_args", "max_length=long"),
        ("--batch_size", "many"),
        ("--max_batch_size", "-1"),
    ],
    ids=lambda words: words[-1],
)
def test_a_misspelt_value_is_refused_before_anything_runs(
    words, tiny_llama, sweep_of, tmp_path
):
    option, value = words
    given = f"pretrained={tiny_llama}"
    more = (option, given, value) if option == "--model_args" else words
    done = sweep_of(tiny_llama, tmp_path / "sweep", *more)
    assert value.rpartition("=")[2] in done.sentence
    assert not (tmp_path / "sweep").exists()


LLAMA = ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct")


@pytest.mark.parametrize("model", LLAMA)
def test_a_dry_run_plans_the_study_s_models_without_access(model, tmp_path):
    words = ("--quick", "--include_path", ROOT / "tasks", "--output_path", tmp_path)
    done = pruned("study", model, *words, "--dry_run")
    assert done.code == 0, done.err
    assert "|prune_percent-40|4916|" in done.out.replace(",", "")
    assert "Units: 60, 0 done, 0 failed, 60 to run" in done.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "output_path was not given"),
        (["--model_args", "pretrained=x", "--output_path", "o"], "name the model"),
        (["--ratios", "9", "--output_path", "o"], "ratio=9 is above"),
        (["--margin", "much", "--output_path", "o"], "margin=much is not a margin"),
        (
            ["--families", "mine=facts", "--output_path", "o"],
            "--families mine=facts names no family: pass one of knowledge, commonsense",
        ),
    ],
)
def test_what_a_study_cannot_use_is_refused_in_one_sentence(
    words, sentence, tiny_llama
):
    done = pruned(
        "study", tiny_llama, *(each.format(model=tiny_llama) for each in words)
    )
    assert sentence in done.sentence


#: Documents of a user's tasks, with the family that each task declares, if any.
OWN = {
    "own_facts": ["a", "b"],
    "own_text": None,
    "own_chat": ["yes", "no"],
}
OWN_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: "{data}"}}
output_type: {kind}
test_split: train
doc_to_text: "{text}"
doc_to_target: "{target}"
{choices}metadata:
  version: 1.0
{family}"""


def write_own_tasks(folder):
    """Write a task of each side; two declare their families, and `own_chat` does not."""
    documents = [{"text": f"word {n} again", "right": n % 2} for n in range(12)]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in documents))
    families = {"own_facts": "knowledge", "own_text": "language_modeling"}
    for name, choices in OWN.items():
        family = families.get(name)
        written = OWN_TASK.format(
            name=name,
            data=data,
            kind="multiple_choice" if choices else "loglikelihood_rolling",
            text="{{text}}" if choices else "",
            target="{{right}}" if choices else "{{text}}",
            choices=f"doc_to_choice: {json.dumps(choices)}\n" if choices else "",
            family=f"  family: {family}\n" if family else "",
        )
        (folder / f"{name}.yaml").write_text(written)
    return folder


@pytest.mark.slow
def test_a_study_ends_with_a_report_that_begins_with_its_verdict_and_counts_own_tasks(
    cluster, tiny_llama, tmp_path
):
    own, out = tmp_path / "own", tmp_path / "out"
    own.mkdir()
    words = ["study", tiny_llama, "--kind", "base", "--quick", "--tasks", *OWN]
    words += ["--include_path", write_own_tasks(own), "--prune_percents", 20, 50]
    words += ["--seeds", 0, "--device", "cpu", "--output_path", out]
    words += ["--families", "own_chat=instruction_following"]
    assert pruned(*words, "--dry_run").code == 0
    assert not out.exists()
    for elsewhere in (["--shard", "0/1"], ["--ray"]):
        assert pruned(*words, *elsewhere).code == 0
        assert not (out / "profile").exists()
    done = pruned(*words)
    assert done.code == 0
    told = f"For {tiny_llama.name} the dichotomy cannot be decided. Knowledge: "
    assert told in done.out
    page = (out / "report" / "report.md").read_text("utf-8")
    assert page.index("\n## Verdict of the study\n") < page.index("\n## Claims of the")
    assert page.index("\n## Limits of the study\n") < page.index("\n## Scores\n")
    assert told in page
    for file in ("report/report.html", "profile/profile.json", "sweep.json"):
        assert (out / file).is_file()
    assert "On no side" not in page
    assert "|`maw` keeps more than random cuts|v3|" in page
    assert "Compared with `recipe=best` of the same size" in page
    assert "|less energy per token|v1|" in page and "not measured" not in page
    assert "](../profile/profile.md)" in page
    again = pruned(*words)
    assert "starts" not in again.out
    assert (out / "report" / "report.md").read_text("utf-8") == page


def test_what_cannot_be_fetched_is_refused_before_anything_runs(
    tiny_llama, sweep_of, tmp_path
):
    done = sweep_of(LLAMA[0], tmp_path / "sweep")
    assert f"pretrained={LLAMA[0]}" in done.sentence
    words = ("--model_args", f"pretrained={tiny_llama}", "peft=nowhere")
    done = sweep_of(tiny_llama, tmp_path / "sweep", *words)
    assert "peft=nowhere" in done.sentence
    assert not (tmp_path / "sweep").exists()


def test_a_dry_run_shows_widths_parameters_and_what_is_left(
    finished, tiny_llama, sweep_of, tmp_path
):
    done = sweep_of(tiny_llama, tmp_path / "sweep", "--dry_run")
    assert done.code == 0
    assert "|prune_percent-20|71|2.2188|46,528|9.52%|0|0|1|" in done.out
    assert "Units: 2, 0 done, 0 failed, 2 to run" in done.out
    assert not (tmp_path / "sweep").exists()
    assert "2 done" in sweep_of(tiny_llama, finished, "--dry_run").out


@pytest.mark.parametrize("task", ["tiny_choice", "tiny_sentence"])
def test_the_results_of_a_unit_are_those_of_lm_eval(
    task, tiny_llama, sweep_of, made, tmp_path
):
    """Sampled answers, too, for which seeds are set again in each unit."""
    folder, out = tmp_path / "sweep", tmp_path / "out"
    assert sweep_of(tiny_llama, folder, task=task).code == 0
    model = f"pretrained={tiny_llama},dtype=float32,prune_percent=20"
    words = ["--model", "pruned-hf", "--model_args", model, "--tasks", task]
    words += ["--include_path", made, "--device", "cpu", "--log_samples"]
    assert lm_eval("run", *words, "--output_path", out).code == 0
    expected = results_in(out)
    found = results_in(folder / "units" / "prune_percent-20" / task)
    for results in (expected, found):
        for name in ("date", "start_time", "end_time", "total_evaluation_time_seconds"):
            results.pop(name, None)
    assert found["config"].pop("weight_bytes") > 0
    assert found == expected
    (samples,) = out.rglob("samples_*.jsonl")
    (ours,) = results_of(folder)[f"prune_percent-20/{task}"]["samples"].values()
    assert ours == [json.loads(line) for line in samples.read_text().splitlines()]


def test_an_interrupted_sweep_continues_where_it_stopped(
    folder, finished, tiny_llama, sweep_of
):
    """The folder of a sweep that was killed in its second unit, and goes on with smaller batches."""
    lost = folder / "units" / "prune_percent-20" / "tiny_choice"
    lost.rename(folder / ".unfinished" / "sweep" / "0")
    before = files_of(folder)
    done = sweep_of(tiny_llama, folder, "--batch_size", 2)
    assert done.code == 0
    assert "1 done, 0 failed before, 1 to run" in done.out
    assert before.items() < files_of(folder).items()
    assert results_of(folder) == results_of(finished)
    assert not [*folder.glob(".unfinished/*/*")]


def test_what_changed_is_named_and_evaluated_again_and_the_earlier_results_move(
    folder, tiny_llama, sweep_of
):
    before = sorted(path.name for path in folder.glob("units/*/*/results_*"))
    done = sweep_of(tiny_llama, folder, "--limit", 2)
    assert done.code == 0
    assert "2 finished units" in done.out and "(settings)" in done.out
    moved = folder.glob("superseded/*/tiny_choice/*/results_*")
    assert sorted(path.name for path in moved) == before
    again = results_in(folder / "units" / "baseline" / "tiny_choice")
    assert again["n-samples"]["tiny_choice"]["effective"] == 2


@pytest.mark.slow
def test_a_failed_unit_is_recorded_and_runs_again_with_retry_failed_or_if_it_changes(
    tiny_llama, made, sweep_of, tmp_path
):
    folder = tmp_path / "sweep"
    broken = shutil.copytree(made, tmp_path / "tasks")
    change(broken, "choice.yaml", ".load", ".cannot_be_had")
    words = ("--include_path", broken, "--tasks", "tiny_choice", "tiny_sentence")
    for more, said in (
        ((), "0 failed before, 4 to run"),
        ((), "2 failed before, 0 to run"),
        (("--retry_failed",), "0 failed before, 2 to run"),
    ):
        done = sweep_of(tiny_llama, folder, *words, *more)
        assert done.code == 1
        assert said in done.out
        for unit, names in files_of(folder).items():
            is_error = names == ("error.json", "unit.json")
            assert is_error == unit.endswith("tiny_choice")
    error = errors_of(folder)["baseline/tiny_choice"]
    assert {*error} == {"type", "message", "traceback"}
    assert error["type"] == "ConnectionError"
    assert error["message"] == "the data set cannot be had"
    assert "cannot_be_had" in error["traceback"]
    words = ("--include_path", made, "--tasks", "tiny_choice", "tiny_sentence")
    assert sweep_of(tiny_llama, folder, *words).code == 0
    assert not errors_of(folder)
    assert not (folder / "superseded").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ratios", "4"), "ratio=4 is above the model's own expansion ratio 88/32"),
        (("--model_args", "pretrained={}", "ratio=2"), "use --ratios"),
        (("--ratios", "many"), "ratio=many"),
        (("--seeds", "1"), "only the criterion random"),
        (("--criteria", "random", "--seeds", "-1"), "seed=-1"),
        (("--model", "hf"), "model=hf"),
        (("--seed", "one"), "'one'"),
        (("--seed", "1,2,3"), "'1,2,3'"),
        (("--include_path", "/no/such/folder"), "not a folder"),
        (("--tasks", "no_such_task"), "no_such_task"),
        (("--tasks", "tiny_both", "tiny_sentence"), "requested twice"),
        (("--fewshot_as_multiturn", "yes"), "apply_chat_template"),
        (("--shard", "2/2"), "I from 0 to N-1"),
        (("--shard", "next", "--ray"), "leave out --ray"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, tuple) else "",
)
def test_what_cannot_be_swept_is_refused(words, said, tiny_llama, sweep_of, tmp_path):
    given = [word.format(tiny_llama) for word in words]
    assert said in sweep_of(tiny_llama, tmp_path / "sweep", *given).sentence
    assert not (tmp_path / "sweep").exists()
