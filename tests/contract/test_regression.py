"""What docs/regression.md promises of ``lm-eval-pruned check``; its formats are golden files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.contract.commands import pruned
from tests.helpers.results_files import (
    answered,
    lifts,
    losses,
    pruning,
    spread,
    write_run,
    write_sweep,
)


N = 60
NOT_WORSE = ("--not_worse", "5pt")


def answers(share: float) -> list[float]:
    return spread(share, N, 3)


def one(values, **more) -> dict:
    """Return a task ``tf`` with one metric."""
    return {"tf": {"acc,none": {"values": values, **more}}}


LOSSES = np.random.default_rng(1).normal(-3, 0.2, N)
PERPLEXITY = losses(LOSSES)
BEFORE = {**one(answers(0.5)), "lambada": {"perplexity,none": PERPLEXITY}}


@pytest.fixture
def held(tmp_path):
    """Return a function that checks a folder, or makes the baseline of it; exit code and text."""

    def run(folder, *options):
        file = str(tmp_path / "baseline.json")
        done = pruned("check", tmp_path / folder, "--baseline", file, *options)
        return done.code, done.out + done.err

    return run


@pytest.fixture
def gate(tmp_path, held):
    """Return a function that makes a baseline of `before` and checks `after`."""

    def run(before, after, *options, rule=("--absolute", "0.01"), **sections):
        write_run(tmp_path / "before", before, pruning=pruning(40))
        write_run(tmp_path / "after", after, **{"pruning": pruning(40), **sections})
        assert held("before", "--update", *rule)[0] == 0
        return held("after", *options)

    return run


SHOTS = {"tf": 5, "lambada": 0}


@pytest.mark.parametrize("rule", ["absolute", "relative"])
def test_what_leaves_a_tolerance_for_the_better_passes_and_is_named(gate, rule):
    better = {"values": [each + 0.5 for each in LOSSES]}
    after = {**one(answers(0.7)), "lambada": {"perplexity,none": PERPLEXITY | better}}
    code, text = gate(BEFORE, after, rule=(f"--{rule}", "0.01"))
    assert (code, text.count("Better than the baseline")) == (0, 2)


@pytest.mark.parametrize(
    ("rule", "before", "after", "code", "words"),
    [
        ("absolute 0.05", answers(0.5), answers(0.46), 0, "1 as expected"),
        ("absolute 0.05", answers(0.5), answers(0.43), 1, "Worse by 0.06"),
        ("relative 0.1", answers(0.5), answers(0.43), 1, "of the expected score"),
        # Three of 60 answers are lost: the allowed loss passes, one that is barely larger fails.
        ("absolute 0.05", answers(0.5), answers(0.45), 0, "1 as expected"),
        ("absolute 0.0499", answers(0.5), answers(0.45), 1, "Worse by 0.05"),
        ("relative 0.1", answers(0.5), answers(0.45), 0, "1 as expected"),
        ("relative 0.0999", answers(0.5), answers(0.45), 1, "Worse by 0.05"),
        # Five answers lost and none won: 2**-5 on one side.
        ("not_worse 1pt", [1.0] * 30, [0.0] * 5 + [1.0] * 25, 1, "q = 0.0312"),
        ("not_worse 1pt", [1.0] * 30, [0.0] * 4 + [1.0] * 26, 3, "Not decided"),
        ("not_worse 1pt", [1.0] * 5, [0.0] * 5, 3, "Not decided"),
        ("not_worse 10pt", answers(0.5), answers(0.5), 0, "1 as expected"),
        ("not_worse 1pt", answers(0.5), answers(0.3), 1, "Significantly worse"),
        ("not_worse 1pt", answers(0.5), answers(0.8), 0, "1 improved"),
        # Significantly worse, and shown to be by less than the margin.
        ("not_worse 30pt", answers(0.5), answers(0.4), 0, "1 as expected"),
        ("equivalent 15%", answers(0.5), answers(0.5), 0, "1 as expected"),
        ("equivalent 1pt", answers(0.5), answers(0.48), 3, "Not decided whether equiv"),
        ("equivalent 1pt", answers(0.5), answers(0.8), 0, "IMPROVED"),
        ("", answers(0.5), answers(0.48), 1, "the rule allows 0."),
        # Exact to the digits of the file.
        *[("", [0.5] * N, [0.5 - off] * N, 1, "allows 0.") for off in (1e-8, 1e-4)],
        ("", [0.5] * N, [0.5] * N, 0, "1 as expected"),
    ],
)
def test_rules(gate, rule, before, after, code, words):
    options = f"--{rule}".split() if rule else ()
    found, text = gate(one(before), one(after), rule=options)
    assert (found, words in text) == (code, True), text


@pytest.mark.parametrize(
    ("share", "noise", "code"),
    [(1, 0, 0), (0.99, 1, 0), (0.97, 3, 3), (0.9, 1, 1), (0.6, 1, 1), (1.2, 1, 0)],
)
def test_without_a_margin_what_verdict_judges_has_its_usual_one_and_the_same_answer(
    held, tmp_path, share, noise, code
):
    rights = [n % 2 for n in range(240)]
    picks = [r if n % 5 else 1 - r for n, r in enumerate(rights)]
    lifts(tmp_path / "before", 1, boolq=answered(picks, rights))
    assert held("before", "--update", "--not_worse")[0] == 0
    of = json.loads((tmp_path / "baseline.json").read_text())["runs"]["run"]
    facts, boolq = (of[task]["metrics"] for task in ("facts", "boolq"))
    assert (facts["lift,none"]["not_worse"], facts["lift,none"]["floor"]) == ("5%", 0)
    assert boolq["choice_prob,none"]["not_worse"] == "2pt"
    # The share of right answers takes more documents, and only a large loss of it counts.
    assert boolq["acc,none"]["beside"] == "2pt"
    lifts(tmp_path / "after", share, noise, boolq=answered(picks, rights))
    found, text = held("after")
    assert found == code, text
    paths = (tmp_path / name for name in ("before", "after"))
    same = pruned("verdict", *paths, "--output_path", tmp_path / "out")
    assert same.code == code


def test_a_folder_with_several_models_is_refused(held, tmp_path):
    for n, name in enumerate(("m1", "m2")):
        config = {"model": "hf", "model_args": {"pretrained": name}}
        date = f"2026-01-0{n + 1}T03-04-05.678901"
        write_run(tmp_path / "both" / name, one(answers(0.5)), config=config, date=date)
    code, text = held("both", "--update")
    assert (code, "of several models" in text, "name one of them" in text) == (2, 1, 1)
    assert held("both/m1", "--update")[0] == 0


@pytest.mark.parametrize("rule", [NOT_WORSE, ("--absolute", "0.01")])
@pytest.mark.parametrize(
    ("up", "change", "status"),
    [(True, 0.3, "IMPROVED"), (True, -0.3, "FAIL"), (None, 0.3, "FAIL")]
    + [(None, -0.3, "FAIL"), (False, 0.3, "FAIL"), (False, -0.3, "IMPROVED")],
)
def test_the_direction_comes_from_the_harness(gate, rule, up, change, status):
    tasks = (one(answers(0.5 + c), higher_is_better=up) for c in (0, change))
    code, text = gate(*tasks, rule=rule)
    assert text.startswith(status)
    assert code == (status == "FAIL")


def test_what_is_missing_fails(gate):
    code, text = gate(BEFORE, {"tf": {"acc_norm,none": answers(0.5)}})
    words = ("no tf acc,none", "no lambada perplexity,none", "NEW      tf acc_nor")
    assert (code, *(each in text for each in words)) == (1, True, True, True)


@pytest.mark.parametrize("rule", [("--absolute", "1"), ("--not_worse", "10%")])
@pytest.mark.parametrize(
    ("code", "words", "sections"),
    [
        (2, "has version 1.0 in the baseline and 2.0 in", {"versions": {"tf": 2.0}}),
        (2, "num_fewshot is 5, but 0 in the baseline", {"n-shot": SHOTS}),
        (2, "chat_template is ffffffffffff, but", {"chat_template_sha": "f" * 64}),
        (2, "gen_kwargs", {"config": {"gen_kwargs": {"temperature": 1}}}),
        (2, "documents is none, but 60 in the baseline", {"n-samples": {}}),
        # Another width is another model; another choice of neurons is not.
        (2, "widths is 2 x 320, but 2 x 240 in the baseline", {"pruning": pruning(20)}),
        (0, "2 as exp", {"pruning": {**pruning(40), "kept_digest": "e" * 64}}),
        # It may move a score, but the test is the same; without examples, their seed does not matter.
        (0, "baseline (task_hash) on tf, so", {"task_hashes": {"tf": "f00"}}),
        (0, "2 as exp", {"config": {"fewshot_seed": 7}}),
        (2, "fewshot_seed is 7, but", {"config": {"fewshot_seed": 7}, "n-shot": SHOTS}),
    ],
)
def test_what_was_asked_otherwise_is_not_compared(gate, rule, code, words, sections):
    found, text = gate(BEFORE, BEFORE, rule=rule, **sections)
    assert (found, words in text) == (code, True), text


def test_a_failure_outweighs_what_is_undecided(gate):
    after = {**BEFORE, **one([float("nan"), *answers(0.5)[1:]])}
    code, text = gate(BEFORE, after, **{"n-shot": {"tf": 0, "lambada": 5}})
    assert code == 1
    assert "FAIL     tf acc,none: 0.5 -> nan" in text
    assert "REFUSED  lambada" in text


def test_documents_are_missing_or_others(gate, held, tmp_path):
    code, text = gate(BEFORE, BEFORE, rule=NOT_WORSE, samples=False)
    assert (code, "--log_samples" in text) == (2, True)
    other = {**BEFORE, **one(answers(0.5), docs={0: {"question": "another"}})}
    code, text = gate(BEFORE, other, rule=NOT_WORSE)
    assert code == 2
    assert "1 of 60 only in the baseline, 1 of 60 only in after" in text
    # A rule that cannot decide is named when it is made.
    (tmp_path / "baseline.json").unlink()
    few = write_run(tmp_path / "few", one([1.0] * 5))
    code, text = held(few)
    assert (code, "baseline.json does not exist: --update makes" in text) == (2, True)
    assert "NOTE     tf acc,none: Not decided" in held(few, "--update", *NOT_WORSE)[1]


def test_a_group_within_a_margin(tmp_path, held):
    """Documents of the members, in clusters, go through the file and back."""
    docs = {n: {"n": n, "narrative": f"{n // 5}"} for n in range(60)}
    for name, share in (("before", 0.6), ("after", 0.3)):
        right = (np.random.default_rng(0).random((12, 60)) < share).astype(float)
        tasks = {
            f"musr_{n}": {"acc,none": {"values": values, "docs": docs}}
            for n, values in enumerate(right.tolist())
        }
        scores = {"musr": {"acc,none": right.mean()}}
        about = {"groups": {"musr": [*tasks]}, "group_scores": scores}
        write_run(tmp_path / name, tasks, **about)
    assert held("before", "--update", "--not_worse", "20pt")[0] == 0
    # The rules of the subtasks go, so that the group alone is judged.
    file = tmp_path / "baseline.json"
    data = json.loads(file.read_text())
    data["runs"]["run"] = {"musr": data["runs"]["run"]["musr"]}
    file.write_text(json.dumps(data))
    record = data["runs"]["run"]["musr"]["metrics"]["acc,none"]["documents"]
    assert len({*record["clusters"].values()}) == 144
    assert (held("before")[0], held("after")[0]) == (0, 1)


def test_notes_and_names_cannot_break_a_format(gate):
    nasty, shots = {"a:b,c%": {"acc,none": answers(0.5)}}, {"n-shot": {"a:b,c%": 5}}
    forms = ("json", "github")
    as_json, github = (
        gate(nasty, nasty, "--format", form, **shots)[1] for form in forms
    )
    assert "(num_fewshot)" in json.loads(as_json)["notes"][0]
    first, second, _ = github.splitlines()
    assert first.startswith("::error title=a%3Ab%2Cc%25 acc%2Cnone::Not comparable")
    assert second.startswith("::warning title=not as in the baseline::after was")


def test_a_sweep_is_checked_run_by_run(tmp_path, held):
    tasks = one(answers(0.5)) | {"arc": {"acc,none": answers(0.5)}}
    both = {"base": (0, tasks), "p20": (20, tasks)}
    write_sweep(tmp_path / "sweep", both)
    write_sweep(tmp_path / "worse", {"base": (0, tasks)})
    write_sweep(tmp_path / "failed", {**both, "p20": (20, {})}, p20="tf")
    few = {"arc": {"acc,none": answers(0.5)[:10]}}
    write_sweep(tmp_path / "part", {**both, "p20": (20, {**tasks, **few})})
    assert held("sweep", "--update")[0] == held("sweep")[0] == 0
    for folder, code, words in (
        ("worse", 1, "no p20 tf acc,none"),
        ("failed", 2, "--retry_failed"),
        ("part", 2, "0 failed, 3 as expected, 1 asked otherwise"),
    ):
        found, text = held(folder)
        assert (found, words in text) == (code, True), text


def test_the_baseline_is_sorted_json_with_scores_of_ten_digits(tmp_path, held):
    tasks = {"tf": {"mc1,none": [1.0, 0.0, 0.0]}}
    write_sweep(tmp_path / "sweep", {"p40": (40, tasks), "baseline": (0, tasks)})
    assert held("sweep", "--update")[0] == 0
    text = (tmp_path / "baseline.json").read_text()
    data = json.loads(text)
    assert text == json.dumps(data, indent=2, sort_keys=True) + "\n"
    assert [*data["runs"]] == ["baseline", "p40"]
    expected = {"absolute": 0, "higher_is_better": True, "score": 0.3333333333}
    of_task = data["runs"]["p40"]["tf"]
    assert (of_task["metrics"], of_task["version"]) == ({"mc1,none": expected}, 1.0)
    measured = {"documents": 3, "num_fewshot": 0, "widths": "2 x 240"}
    assert measured.items() <= of_task["settings"].items()


def test_update_removes_runs_and_metrics_that_the_results_lack(tmp_path, held):
    both = {"base": (0, BEFORE), "p20": (20, BEFORE)}
    write_sweep(tmp_path / "sweep", both)
    write_sweep(tmp_path / "less", {"base": (0, one(answers(0.5)))})
    for folder in ("sweep", "less"):
        assert held(folder, "--update", "--absolute", "0.1")[0] == 0
    data = json.loads((tmp_path / "baseline.json").read_text())
    assert {run: [*tasks] for run, tasks in data["runs"].items()} == {"base": ["tf"]}


def test_a_rule_for_a_computed_score_survives_an_update_with_another_rule(
    tmp_path, held
):
    rights = [n % 2 for n in range(240)]
    write_run(tmp_path / "a", {"boolq": answered(rights, rights)})
    assert held("a", "--update", "--not_worse")[0] == 0
    first = (tmp_path / "baseline.json").read_bytes()
    assert held("a", "--update", "--absolute", "0.1")[0] == 0
    assert (tmp_path / "baseline.json").read_bytes() == first
    # Without samples the score is not lower: it is not there.
    write_run(tmp_path / "b", {"boolq": answered(rights, rights)}, samples=False)
    code, text = held("b")
    assert (code, "--log_samples" in text) == (2, True), text


def test_update_is_deterministic_and_keeps_rules(tmp_path, held):
    file = tmp_path / "baseline.json"
    write_run(tmp_path / "a", BEFORE)
    write_run(tmp_path / "b", dict(reversed(BEFORE.items())))
    assert held("a", "--update", "--relative", "0.02")[0] == 0
    first = file.read_bytes()
    for folder in ("a", "b"):
        assert held(folder, "--update")[0] == 0
        assert file.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [file.name]


def test_the_baseline_holds_neither_texts_nor_where_the_model_was(tmp_path, held):
    asked = one([1.0] * 12, docs={0: {"question": "a secret question"}})
    config = {"model": "pruned-hf", "model_args": {"pretrained": "/home/secret/m"}}
    write_run(tmp_path / "a", asked, config=config)
    assert held("a", "--update", *NOT_WORSE)[0] == 0
    assert "secret" not in (tmp_path / "baseline.json").read_text()


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([float("nan"), 1.0], ["--update"], "tf acc,none: The score is nan"),
        ([1.0], ["--update", "--not_worse", "-1"], "not_worse"),
        ([1.0], NOT_WORSE, "together with --update"),
        ([1.0], [], "--update"),
        ([1.0], ["--update", "--not_worse", "5"], "did you mean 5pt?"),
    ],
)
def test_what_is_refused_leaves_no_file(tmp_path, held, values, options, words):
    write_run(tmp_path / "a", one(values))
    code, text = held("a", *options)
    assert (code, words in text) == (2, True)
    assert not (tmp_path / "baseline.json").exists()


def baseline_of(**record):
    tasks = {"tf": {"metrics": {"acc,none": {"higher_is_better": True, **record}}}}
    return {"schema_version": 3, "runs": {"run": tasks}}


def documents(values, transform="mean"):
    made = {"transform": transform, "values": values}
    return baseline_of(score=0.5, not_worse="5pt", documents=made)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"results": {}}, "it lacks 'schema_version'"),
        ({"schema_version": 2, "runs": {}}, "schema_version is 2"),
        ({"schema_version": 3, "runs": {"run": {"tf": {}}}}, "it lacks 'metrics'"),
        (baseline_of(score=float("nan"), absolute=1), "needs a score and one of"),
        (baseline_of(score=0.5, absolute=0.1, relative=0.1), "one of"),
        (baseline_of(score=0.5, absolute=-1), "absolute=-1 is not a number from 0 on"),
        (baseline_of(score=0.5, not_worse="much"), "not_worse=much is not a margin"),
        (baseline_of(score=0.5, not_worse=5), "did you mean 5pt"),
        (documents({"a b 0": None}), "documents without scores"),
        (documents({"a b 0": 1}, transform="sum"), "a known transform"),
    ],
)
def test_damaged_baselines_are_refused_and_left_alone(tmp_path, held, data, words):
    write_run(tmp_path / "a", BEFORE)
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps(data))
    before = file.read_bytes()
    for options in ([], ["--update"]):
        code, message = held("a", *options)
        assert (code, words in message) == (2, True), message
        assert "write another file" in message
    assert file.read_bytes() == before
