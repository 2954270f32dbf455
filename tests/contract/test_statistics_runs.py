"""What docs/statistics.md promises of runs: which are compared, how they are shown, power, trends and reports."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pytest

from tests.contract.commands import compared, lm_eval, pruned, results_in
from tests.helpers.made_tasks import write_made_tasks
from tests.helpers.results_files import losses, pruning, write_run, write_sweep
from tests.sweeps.conftest import quick  # noqa: F401


N = 80
ORDER = np.random.default_rng(7).permutation(N)


def acc(share, documents=N, metric="acc,none"):
    """Return right-or-wrong answers of which a share is right."""
    return {metric: (ORDER[:documents] < share * N).astype(float).tolist()}


def two(folder, base, run, **about):
    """Write two runs, the second with further sections, and return their folders."""
    write_run(folder / "base", base)
    write_run(folder / "run", run, **about)
    return folder / "base", folder / "run"


@pytest.mark.parametrize(
    ("other", "about", "words"),
    [
        ({"tf": acc(0.4, 15)}, {}, "65 of 80 only in base, 0 of 15 only in run"),
        ({"tf": acc(0.4)}, {"versions": {"tf": 2.0}}, "version 1.0 in base and 2.0"),
        ({"arc": acc(0.4)}, {}, "no task in common"),
    ],
)
def test_a_document_in_only_one_run_is_an_error_and_so_is_another_version(
    tmp_path, other, about, words
):
    paths = two(tmp_path, {"tf": acc(0.4)}, other, **about)
    assert words in pruned("compare", *paths).sentence


def test_the_newest_result_of_each_task_counts_and_of_several_models_one_is_named(
    tmp_path,
):
    paths = two(tmp_path, {"tf": acc(0.5)}, {"tf": acc(0.5)}, pruning=pruning(20))
    later = "2026-02-02T03-04-05.678901"
    write_run(paths[1], {"tf": acc(0.25)}, date=later, pruning=pruning(20))
    # The order in which they were written does not count.
    first = "2026-01-01T03-04-05.678901"
    write_run(paths[1], {"tf": acc(0.75)}, date=first, pruning=pruning(20))
    (row,) = compared(*paths)["rows"]
    assert (row["base_score"], row["score"]) == (0.5, 0.25)
    write_run(paths[1], {"tf": acc(0.25)}, date=later, pruning=pruning(40))
    assert "several models" in pruned("compare", *paths).sentence
    assert compared(paths[0], paths[1] / f"results_{later}.json")["rows"]


def test_a_note_names_the_settings_in_which_runs_differ(tmp_path):
    bf16 = {"config": {"model": "pruned-hf", "model_dtype": "torch.bfloat16"}}
    paths = two(tmp_path, {"tf": acc(0.5)}, {"tf": acc(0.5)}, **bf16)
    assert any("(dtype)" in note for note in compared(*paths)["notes"])


def test_markdown_csv_and_json_have_the_same_rows(tmp_path):
    both = acc(0.5) | acc(0.5, metric="acc_norm,none")
    less = acc(0.25) | acc(0.25, metric="acc_norm,none")
    paths = two(tmp_path, {"tf": both}, {"tf": less})
    rows = compared(*paths)["rows"]
    table = pruned("compare", *paths, "--format", "csv").out
    found = [*csv.DictReader(io.StringIO(table))]
    markdown = pruned("compare", *paths).out
    for name in ("task", "metric", "verdict"):
        assert [row[name] for row in found] == [row[name] for row in rows]
    for row in rows:
        assert re.search(rf"\|{row['metric']} *\|.*\|{row['verdict']}", markdown)
    with_margin = pruned(
        "compare", *paths, "--format", "csv", "--not_worse", "45pt"
    ).out
    assert with_margin.splitlines()[0].endswith("verdict,margin,p_margin,q_margin")
    # acc_norm represents the task.
    verdicts = {row["metric"]: row["verdict"] for row in rows}
    assert verdicts == {"acc,none": "restated", "acc_norm,none": "worse"}


def test_subtasks_compares_the_members_of_a_group(tmp_path):
    members = {"a": acc(0.5), "b": acc(0.5)}
    group = {"groups": {"g": [*members]}, "group_scores": {"g": {"acc,none": 0.5}}}
    write_run(tmp_path / "base", members, **group)
    write_run(tmp_path / "run", members, **group)
    paths = tmp_path / "base", tmp_path / "run"
    assert {row["task"] for row in compared(*paths)["rows"]} == {"g"}
    rows = compared(*paths, "--subtasks")["rows"]
    assert {row["task"] for row in rows} == {"g", "a", "b"}


def test_verdicts_are_those_of_the_table(tmp_path):
    unknown = {"acc,none": {"values": acc(0.2)["acc,none"], "higher_is_better": None}}
    broken = {"acc,none": [float("nan"), *acc(0.5)["acc,none"][1:]]}
    few = {"mc2,none": [0.1, 0.2, 0.4]}
    runs = {
        "better": (acc(0.5), acc(0.9)),
        "worse": (acc(0.5), acc(0.1)),
        "different": (unknown | acc(0.5), unknown),
        "not shown": (acc(0.5), acc(0.525)),
        "not tested": (few, {"mc2,none": [0.2, 0.2, 0.3]}),
        "not comparable": (acc(0.5), broken),
    }
    base, run = (
        {name.replace(" ", "_"): pair[n] for name, pair in runs.items()} for n in (0, 1)
    )
    base["different"] = {
        "acc,none": {**unknown["acc,none"], "values": acc(0.7)["acc,none"]}
    }
    rows = compared(*two(tmp_path, base, run))["rows"]
    assert any("score of run is not a finite number" in row["method"] for row in rows)
    # What is at a floor is said beside the verdict.
    found = {row["task"].replace("_", " "): row["verdict"] for row in rows}
    assert found == {name: name for name in runs}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep whose knowledge falls from size to size while another score rises."""
    shares = {0: (0.8, 0.2), 10: (0.75, 0.25), 20: (0.6, 0.3), 40: (0.5, 0.6)}
    runs = {
        f"p{percent}": (percent, {"mmlu": acc(knows), "tf": acc(true)})
        for percent, (knows, true) in shares.items()
    }
    return write_sweep(tmp_path_factory.mktemp("sweep"), runs)


def test_intervals_are_widened_so_that_0_is_outside_exactly_if_a_difference_is_shown(
    sweep,
):
    rows = compared(sweep)["rows"]
    assert len(rows) == 6
    shown = [row["verdict"].split(" (")[0] in ("better", "worse") for row in rows]
    assert shown == [row["low"] > 0 or row["high"] < 0 for row in rows]
    assert {True, False} == {*shown}
    # q is p adjusted over the runs on one task.
    for task in ("mmlu", "tf"):
        pairs = sorted((row["p"], row["q"]) for row in rows if row["task"] == task)
        smallest = 1.0
        for place in (3, 2, 1):
            p, q = pairs[place - 1]
            smallest = min(smallest, p * 3 / place)
            assert q == pytest.approx(smallest)


@pytest.mark.smoke
def test_three_or_more_ratios_have_trends_and_correlations(tmp_path, monkeypatch):
    noise, runs = np.random.default_rng(0).normal(0, 0.1, N), {}
    shares = {0: (0.8, 0.2), 20: (0.6, 0.3), 40: (0.5, 0.6), 60: (0.3, 0.5)}
    for percent, (knows, true) in shares.items():
        # The logarithm of the perplexity falls with the share of right answers.
        text = {"word_perplexity,none": losses(20 * np.mean(knows * N > ORDER) + noise)}
        tasks = {"mmlu": acc(knows), "tf": acc(true), "text": text}
        runs[f"p{percent}"] = percent, tasks
    folder = write_sweep(tmp_path, runs)
    # No test draws random numbers.
    for name in ("default_rng", "RandomState", "Generator"):
        monkeypatch.delattr(np.random, name)
    told = compared(folder)
    trends = {each["task"]: each for each in told["trends"]}
    mmlu = trends["mmlu"]
    # Over ratios, which fall.
    assert mmlu["slope"] > 0 > trends["tf"]["slope"]
    assert trends["text"]["slope"] == pytest.approx(-20 * mmlu["slope"])
    assert (mmlu["n"], mmlu["series"]) == (4, "maw")
    assert mmlu["p"] < mmlu["q"] < 1e-6
    pairs = {
        tuple(task for task, _ in each["tasks"]): each["pearson"]
        for each in told["correlations"]
    }
    assert pairs["mmlu", "tf"] == pytest.approx(-0.789, abs=1e-3)
    assert pairs["mmlu", "text"] == pytest.approx(-1)
    out = pruned("compare", folder, "--all").out
    assert "trend" in out.lower() and "correlation" in out.lower()
    # A trend is tested where there are samples of all sizes.
    for file in folder.glob("units/p40/*/samples_*.jsonl"):
        file.unlink()
    (mmlu,) = (each for each in compared(folder)["trends"] if each["task"] == "mmlu")
    assert (mmlu["p"], "needs logged samples" in mmlu["method"]) == (None, True)


@pytest.fixture
def power(tmp_path):
    """Return the command ``power`` on two runs of 300 documents."""
    rng = np.random.default_rng(1)
    before, soft = (rng.random(300) < 0.5).astype(float), rng.random(300)
    after = np.where(rng.random(300) < 0.1, 1 - before, before)
    paths = []
    for right, noise in ((before, 0), (after, rng.normal(0, 0.05, size=300))):
        wiki = {"perplexity,none": losses(soft + noise - 3)}
        sure = np.clip(soft + noise, 0, 1)
        tasks = {"boolq": {"acc,none": [*right]}, "tf": {"mc2,none": [*sure]}}
        paths.append(write_run(tmp_path / str(len(paths)), {**tasks, "wiki": wiki}))
    return lambda task, *words: pruned("power", task, *paths, *words)


def rows_of(out):
    """Return the rows of the table of ``power``."""
    rows = [row.split("|")[1:-1] for row in out.splitlines() if row[:1] == "|"]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_power_answers_for_each_measure_that_a_verdict_judges(power):
    """Also the score that counts; without a margin, within the verdict's own."""
    (tf,) = {tuple(row[1:5:3]) for row in rows_of(power("tf").out)}
    assert tf == ("mc2,none", "0.02")
    assert {row[1] for row in rows_of(power("boolq").out)} == {"acc,none"}
    verdicts = [row[5:7] for row in rows_of(power("wiki").out)]
    assert verdicts == [
        ["equivalent", "no difference"],
        ["not worse", "no difference"],
        ["not worse", "the difference seen"],
    ]
    message = power("boolq", "--measure", "mc3").sentence
    assert "--measure mc3 is a metric of no task" in message


def test_power_of_several_tasks_is_of_the_claim_on_their_mean(power):
    out = power("boolq,tf", "--margin", "5pt").sentence
    assert "There is no mean over boolq, tf" in out
    rows = rows_of(power("tf,tf", "--margin", "5pt").out)
    assert {row[2] for row in rows} == {"600"}


@pytest.mark.parametrize("task", ["boolq", "tf", "wiki"])
def test_power_prints_the_chances_of_a_verdict_which_more_documents_raise(power, task):
    def chances(*more):
        out = power(task, "--margin", "0.02", *more).out
        return [int(row[7].rstrip("%")) for row in rows_of(out)]

    few, many = chances(), chances("--documents", 3000)
    # Those of the difference seen fall where that is beyond the margin.
    assert few and all(x <= y for x, y in zip(few[:2], many[:2], strict=True))


@pytest.mark.parametrize(
    ("task", "words", "said"),
    [
        ("gsm8k", ["--margin", "1pt"], "has boolq, tf"),
        ("wiki", ["--margin", "1pt"], "1pt is not a margin"),
        ("boolq", ["--margin", "1pt", "--documents", "1"], "documents=1"),
        ("boolq", ["--margin", "1pt", "--alpha", "0.5"], "alpha=0.5"),
        ("boolq", ["--margin", "5"], "any difference of boolq acc"),
    ],
)
def test_what_power_cannot_answer_is_refused(power, task, words, said):
    assert said in power(task, *words).sentence


@pytest.mark.slow
def test_a_report_has_the_files_of_the_page_and_loads_nothing(sweep, tmp_path):
    pytest.importorskip("altair", reason="a report needs the extra `report`")
    one, again = tmp_path / "one", tmp_path / "again"
    for folder in (one, again):
        done = pruned("report", sweep, "--output_path", folder)
        assert done.code == 0, done.err
    names = {path.name for path in one.iterdir()}
    flips = {"flips.html", "flips.jsonl"}
    assert names == {"report.html", "report.md", "results.csv", "plots", *flips}
    assert {path.suffix for path in one.glob("plots/*")} == {".png", ".svg"}
    for path in one.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(one)).read_bytes(), path
    with (one / "results.csv").open() as file:
        rows = {(row["run"], row["task"]) for row in csv.DictReader(file)}
    assert rows == {(f"p{p}", t) for p in (0, 10, 20, 40) for t in ("mmlu", "tf")}
    for page in one.glob("*.html"):
        text = page.read_text("utf-8")
        assert "default-src 'none'" in text
        assert not re.search(r"<(script|link|img)[^>]*(src|href)=.?(https?:)?//", text)


def test_mismatched_questions_are_recorded_and_a_task_without_answers_is_refused(
    tiny_llama, tmp_path
):
    made = write_made_tasks(tmp_path / "tasks")
    words = ["--model", "hf-prefix", "--include_path", made, "--device", "cpu"]
    words += ["--model_args", f"pretrained={tiny_llama},mismatched_questions=true"]
    found = []
    for name in ("one", "other"):
        where = ("--output_path", tmp_path / name, "--tasks", "tiny_choice")
        assert lm_eval("run", *words, *where).code == 0
        found.append(results_in(tmp_path / name))
    assert found[0]["config"]["mismatched_questions"]
    # The exchange is fixed.
    assert found[0]["results"] == found[1]["results"]
    with pytest.raises(ValueError, match="tiny_generation has none"):
        lm_eval("run", *words, "--tasks", "tiny_generation")
