from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from lm_eval_pruned import cli
from tests.helpers.results_files import pruning, write_run, write_sweep


N = 60


def answers(share: float) -> list[float]:
    order = np.random.default_rng(3).permutation(N)
    return (order < share * N).astype(float).tolist()


def perplexity(shift: float) -> dict:
    values = np.random.default_rng(1).normal(-3, 0.2, size=N) - shift
    return {
        "values": values.tolist(),
        "aggregation": "perplexity",
        "higher_is_better": False,
    }


BEFORE = {
    "tf": {"acc,none": answers(0.5)},
    "lambada": {"perplexity,none": perplexity(0)},
}


@pytest.fixture
def gate(tmp_path, capsys):
    """Return a function that makes a baseline of `before` and checks `after`."""

    def run(
        before, after, *options, update=("--absolute", "0.01"), edit=None, **kwargs
    ):
        baseline = tmp_path / "baseline.json"
        write_run(tmp_path / "before", before)
        write_run(tmp_path / "after", after, **kwargs)
        made = ["check", str(tmp_path / "before"), "--baseline", str(baseline)]
        assert cli.main([*made, "--update", *update]) == 0
        if edit:
            data = json.loads(baseline.read_text())
            edit(data["runs"]["run"])
            baseline.write_text(json.dumps(data))
        capsys.readouterr()
        checked = ["check", str(tmp_path / "after"), "--baseline", str(baseline)]
        code = cli.main([*checked, *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_equal_results_pass(gate):
    code, text = gate(BEFORE, BEFORE, update=())
    assert code == 0
    assert text == (
        "Check passed: 0 failed, 2 as expected, 0 improved, 0 not in the baseline.\n"
    )


@pytest.mark.parametrize(
    ("rule", "after", "code"),
    [
        (("--absolute", "0.05"), 0.46, 0),
        (("--absolute", "0.05"), 0.43, 1),
        (("--relative", "0.1"), 0.46, 0),
        (("--relative", "0.1"), 0.43, 1),
        (("--alpha", "0.05"), 0.44, 0),
        (("--alpha", "0.05"), 0.3, 1),
        ((), 0.5, 0),
        ((), 0.48, 1),
    ],
)
def test_rules(gate, rule, after, code):
    before = {"tf": {"acc,none": answers(0.5)}}
    assert gate(before, {"tf": {"acc,none": answers(after)}}, update=rule)[0] == code


def test_direction_comes_from_the_harness(gate):
    code, text = gate(
        BEFORE, {**BEFORE, "lambada": {"perplexity,none": perplexity(0.1)}}
    )
    assert code == 1
    assert "FAIL     lambada perplexity,none" in text
    code, text = gate(
        BEFORE, {**BEFORE, "lambada": {"perplexity,none": perplexity(-0.1)}}
    )
    assert code == 0
    assert "IMPROVED lambada" in text
    assert "run with --update" in text


def test_without_direction_any_change_fails(gate):
    before, after = (
        {"t": {"m,none": {"values": answers(share), "higher_is_better": None}}}
        for share in (0.5, 0.8)
    )
    code, text = gate(before, after)
    assert code == 1
    assert "Changed by" in text


def test_missing_tasks_and_metrics_fail(gate):
    code, text = gate(BEFORE, {"tf": {"acc_norm,none": answers(0.5)}})
    assert code == 1
    assert "no tf acc,none" in text
    assert "no lambada perplexity,none" in text
    assert "NEW      tf acc_norm,none" in text


def test_nan_fails(gate):
    values = [float("nan"), *answers(0.5)[1:]]
    code, text = gate(BEFORE, {**BEFORE, "tf": {"acc,none": values}})
    assert code == 1
    assert "The score is nan" in text


def test_a_new_version_of_a_task_fails(gate):
    code, text = gate(BEFORE, BEFORE, versions={"tf": 2.0, "lambada": 1.0})
    assert code == 1
    assert "has version 2.0, and the baseline is of version 1.0" in text


def test_a_rule_can_be_edited(gate):
    after = {**BEFORE, "tf": {"acc,none": answers(0.4)}}

    def edit(run):
        run["tf"]["metrics"]["acc,none"]["absolute"] = 0.2

    assert gate(BEFORE, after)[0] == 1
    assert gate(BEFORE, after, edit=edit)[0] == 0


def test_alpha_without_samples_is_unusable(gate):
    code, text = gate(BEFORE, BEFORE, update=("--alpha", "0.05"), samples=False)
    assert code == 2
    assert "--log_samples" in text


def test_alpha_on_other_documents_is_unusable(gate):
    other = {
        task: {metric: spec if isinstance(spec, dict) else {"values": spec}}
        for task, metrics in BEFORE.items()
        for metric, spec in metrics.items()
    }
    other["tf"]["acc,none"]["docs"] = {0: {"question": "another"}}
    code, text = gate(BEFORE, other, update=("--alpha", "0.05"))
    assert code == 2
    assert "1 of 60 only in the baseline, 1 of 60 only in after" in text


def test_a_group_by_significance(tmp_path):
    # Documents of the members, in clusters, go through the file and back.
    def write(name, share):
        rng = np.random.default_rng(0)
        tasks = {
            f"musr_{n}": {
                "acc,none": {
                    "values": (rng.random(20) < share).astype(float).tolist(),
                    "docs": {d: {"n": d, "narrative": f"{d // 5}"} for d in range(20)},
                }
            }
            for n in range(12)
        }
        score = np.mean([task["acc,none"]["values"] for task in tasks.values()])
        write_run(
            tmp_path / name,
            tasks,
            groups={"musr": list(tasks)},
            group_scores={"musr": {"acc,none": score}},
        )
        return str(tmp_path / name)

    file = tmp_path / "b.json"
    options = ["--baseline", str(file)]
    before = write("before", 0.6)
    assert cli.main(["check", before, *options, "--update", "--alpha", "0.05"]) == 0
    record = json.loads(file.read_text())["runs"]["run"]["musr"]["metrics"]["acc,none"]
    assert len(set(record["documents"]["clusters"].values())) == 48
    assert cli.main(["check", before, *options]) == 0
    assert cli.main(["check", write("after", 0.3), *options]) == 1


def test_json(gate):
    code, text = gate(BEFORE, {"tf": BEFORE["tf"]}, "--format", "json")
    data = json.loads(text)
    assert (code, data["passed"]) == (1, False)
    assert [row["status"] for row in data["findings"]] == ["fail", "pass"]


def test_junit(gate):
    _, text = gate(BEFORE, {"tf": {"acc,none": answers(0.3)}}, "--format", "junit")
    suite = ElementTree.fromstring(text).find("testsuite")  # noqa: S314
    assert (suite.get("tests"), suite.get("failures")) == ("2", "2")
    assert "Worse by 0.2" in suite.findall("testcase/failure")[1].get("message")


def test_github_escapes_what_would_end_a_command(gate):
    nasty = {"a:b,c%": {"acc,none": answers(0.5)}}
    _, text = gate(nasty, {"a:b,c%": {"acc,none": answers(0.2)}}, "--format", "github")
    line = text.splitlines()[0]
    assert line.startswith("::error title=a%3Ab%2Cc%25 acc%2Cnone::Worse by 0.3")


def test_a_sweep_is_checked_run_by_run(tmp_path, capsys):
    tasks = {"tf": {"acc,none": answers(0.5)}}
    write_sweep(tmp_path / "sweep", {"base": (0, tasks), "p20": (20, tasks)})
    command = ["check", str(tmp_path / "sweep"), "--baseline", str(tmp_path / "b.json")]
    assert cli.main([*command, "--update"]) == 0
    assert list(json.loads((tmp_path / "b.json").read_text())["runs"]) == [
        "base",
        "p20",
    ]
    assert cli.main(command) == 0
    write_sweep(
        tmp_path / "worse",
        {"base": (0, tasks)},
    )
    command[1] = str(tmp_path / "worse")
    assert cli.main(command) == 1
    assert "no p20 tf acc,none" in capsys.readouterr().out
    write_sweep(tmp_path / "failed", {"base": (0, tasks), "p20": (20, {})}, p20="tf")
    command[1] = str(tmp_path / "failed")
    assert cli.main(command) == 2
    assert "--retry_failed" in capsys.readouterr().err


def test_update_is_deterministic_and_keeps_rules(tmp_path, capsys):
    file = tmp_path / "baseline.json"
    write_run(tmp_path / "a", BEFORE)
    command = ["check", str(tmp_path / "a"), "--baseline", str(file), "--update"]
    assert cli.main([*command, "--relative", "0.02"]) == 0
    first = file.read_bytes()
    assert cli.main(command) == 0
    assert file.read_bytes() == first
    shuffled = dict(reversed(BEFORE.items()))
    write_run(tmp_path / "b", shuffled)
    command[1] = str(tmp_path / "b")
    assert cli.main(command) == 0
    assert file.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [file.name]


def test_the_baseline_holds_no_text_of_documents(tmp_path):
    spec = {"values": [1.0] * 12, "docs": {0: {"question": "a secret question"}}}
    write_run(tmp_path / "a", {"tf": {"acc,none": spec}})
    file = tmp_path / "b.json"
    cli.main(
        [
            "check",
            str(tmp_path / "a"),
            "--baseline",
            str(file),
            "--update",
            "--alpha",
            "0.1",
        ]
    )
    assert "secret" not in file.read_text()


def test_update_refuses_nan_and_leaves_the_file_alone(tmp_path, capsys):
    write_run(tmp_path / "a", {"tf": {"acc,none": [float("nan"), 1.0]}})
    file = tmp_path / "b.json"
    command = ["check", str(tmp_path / "a"), "--baseline", str(file), "--update"]
    assert cli.main(command) == 2
    assert "finite" in capsys.readouterr().err
    assert not file.exists()


GOOD = {"score": 0.5, "higher_is_better": True, "absolute": 0.1}


def baseline_of(record):
    return {
        "schema_version": 2,
        "runs": {"run": {"tf": {"metrics": {"acc,none": record}}}},
    }


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not whole JSON"),
        (b"{", "not whole JSON"),
        ({"results": {}}, "is no baseline"),
        ({"schema_version": 3, "runs": {}}, "is no baseline of schema version 2"),
        ({"schema_version": 2, "runs": {}}, "expects nothing"),
        ({"schema_version": 2, "runs": {"run": 3}}, "entry of run:"),
        ({"schema_version": 2, "runs": {"run": {}}}, "entry of run: expects nothing"),
        (
            {"schema_version": 2, "runs": {"run": {"tf": {"settings": 3}}}},
            "entry of run, tf:",
        ),
        ({"schema_version": 2, "runs": {"run": {"tf": {}}}}, "lacks 'metrics'"),
        (
            {"schema_version": 2, "runs": {"run": {"tf": {"metrics": {}}}}},
            "entry of run, tf: expects nothing",
        ),
        (baseline_of({**GOOD, "score": float("nan")}), "run, tf, acc,none: score nan"),
        (baseline_of({**GOOD, "score": "0.5"}), "score '0.5'"),
        (baseline_of({**GOOD, "relative": 0.1}), "has 2 rules"),
        (baseline_of({"score": 0.5}), "has 0 rules"),
        (baseline_of({**GOOD, "absolute": -1}), "absolute=-1 is not between"),
        (baseline_of({**GOOD, "absolute": "x"}), "could not convert"),
        (baseline_of({**GOOD, "higher_is_better": "yes"}), "higher_is_better"),
        (baseline_of({"score": 0.5, "alpha": 2}), "alpha=2 is not between 0 and 1"),
        (baseline_of({"score": 0.5, "not_worse": "much"}), "not_worse=much is no mar"),
        (baseline_of({"score": 0.5, "alpha": 0.05}), "lacks 'documents'"),
        (
            baseline_of({"score": 0.5, "alpha": 0.05, "documents": {"values": [1]}}),
            "run, tf, acc,none",
        ),
    ],
)
def test_hostile_baselines(tmp_path, capsys, data, words):
    write_run(tmp_path / "a", BEFORE)
    file = tmp_path / "baseline.json"
    file.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    before = file.read_bytes()
    command = ["check", str(tmp_path / "a"), "--baseline", str(file)]
    for options in ([], ["--update"]):
        assert cli.main([*command, *options]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
    assert file.read_bytes() == before


def test_a_missing_baseline_says_how_to_make_one(tmp_path, capsys):
    write_run(tmp_path / "a", BEFORE)
    assert (
        cli.main(["check", str(tmp_path / "a"), "--baseline", str(tmp_path / "b")]) == 2
    )
    assert "--update" in capsys.readouterr().err


def test_rules_without_update_are_refused(tmp_path, capsys):
    command = ["check", str(tmp_path), "--baseline", "b.json", "--alpha", "0.05"]
    assert cli.main(command) == 2
    assert "together with --update" in capsys.readouterr().err


def first(n: int) -> dict:
    return {"tf": {"acc,none": answers(0.5)[:n]}}


def test_other_documents_and_shots_are_not_compared(tmp_path, capsys):
    """A baseline of 800 documents at 0 shots does not pass results of 50 at 5 shots."""
    write_run(tmp_path / "before", {"tf": {"acc,none": [1.0, 0.0] * 400}})
    few = {"tf": {"acc,none": [1.0, 0.0] * 25}}
    write_run(tmp_path / "after", few, **{"n-shot": {"tf": 5}})
    file = tmp_path / "b.json"
    assert (
        cli.main(
            ["check", str(tmp_path / "before"), "--baseline", str(file), "--update"]
        )
        == 0
    )
    settings = json.loads(file.read_text())["runs"]["run"]["tf"]["settings"]
    assert (settings["documents"], settings["num_fewshot"]) == (800, 0)
    capsys.readouterr()
    check = ["check", str(tmp_path / "after"), "--baseline", str(file)]
    assert cli.main(check) == 2
    text = capsys.readouterr().out
    assert "UNDECIDED tf acc,none" in text
    assert "documents 50 and in the baseline 800" in text
    assert "num_fewshot 5 and in the baseline 0" in text
    assert "Check undecided: 0 failed, 1 undecided" in text
    # To accept says what it accepts.
    assert cli.main([*check, "--update"]) == 0
    note = "other settings than the baseline (documents, num_fewshot)"
    assert note in capsys.readouterr().out
    assert cli.main(check) == 0


@pytest.mark.parametrize("rule", [("--absolute", "1"), ("--alpha", "0.05")])
@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"n-shot": {"tf": 5, "lambada": 5}}, "num_fewshot 5"),
        ({"chat_template_sha": "f" * 64}, "chat_template ffffffffffff and"),
        ({"system_instruction_sha": "f00"}, "system_instruction f00 and"),
        ({"config": {"gen_kwargs": {"temperature": 1}}}, "gen_kwargs"),
        ({"n-samples": {}}, "documents none"),
    ],
)
def test_what_was_asked_otherwise_is_not_compared(gate, rule, sections, words):
    code, text = gate(BEFORE, BEFORE, update=rule, **sections)
    assert code == 2
    assert words in text


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"lm_eval_version": "0.4.14"}, "(lm_eval_version), so"),
        ({"task_hashes": {"tf": "f00"}}, "(task_hash) on tf, so"),
        ({"config": {"model_dtype": "torch.bfloat16"}}, "(dtype), so"),
        # Nothing depends on the seed of examples that there are none of.
        ({"config": {"fewshot_seed": 7}}, "(fewshot_seed), so"),
        ({"fewshot_as_multiturn": True}, "(fewshot_as_multiturn), so"),
    ],
)
def test_what_else_differs_is_noted(gate, sections, words):
    code, text = gate(BEFORE, BEFORE, **sections)
    assert code == 0
    assert (
        f"NOTE     after was evaluated with other settings than the baseline {words}"
        in text
    )


def test_another_few_shot_seed_matters_with_examples(tmp_path, capsys):
    shots = {"n-shot": {"tf": 5}}
    write_run(tmp_path / "before", first(60), **shots, config={"fewshot_seed": 1})
    write_run(tmp_path / "after", first(60), **shots, config={"fewshot_seed": 2})
    file = str(tmp_path / "b.json")
    assert (
        cli.main(["check", str(tmp_path / "before"), "--baseline", file, "--update"])
        == 0
    )
    assert cli.main(["check", str(tmp_path / "after"), "--baseline", file]) == 2
    assert "fewshot_seed 2 and in the baseline 1" in capsys.readouterr().out


def test_another_width_is_another_model(tmp_path, capsys):
    """An unpruned model must not pass as the pruned one that the baseline is of."""
    write_run(tmp_path / "before", first(60), pruning=pruning(40))
    write_run(tmp_path / "after", first(60), pruning=pruning(20))
    kept = {**pruning(40), "kept_digest": "e" * 64}
    write_run(tmp_path / "others", first(60), pruning=kept)
    file = str(tmp_path / "b.json")
    assert (
        cli.main(["check", str(tmp_path / "before"), "--baseline", file, "--update"])
        == 0
    )
    assert cli.main(["check", str(tmp_path / "after"), "--baseline", file]) == 2
    assert "widths 2 x 320 and in the baseline 2 x 240" in capsys.readouterr().out
    assert cli.main(["check", str(tmp_path / "others"), "--baseline", file]) == 0


def test_too_few_documents_for_alpha_are_undecided(gate):
    """Also where all of them became wrong, and where none did."""
    alpha = ("--alpha", "0.05")
    right, wrong = ({"tf": {"acc,none": [share] * 5}} for share in (1.0, 0.0))
    for after in (wrong, right):
        code, text = gate(right, after, update=alpha)
        assert code == 2
        assert "5 independent documents are too few to decide, at least 10" in text


def test_a_score_that_cannot_get_significantly_worse_is_undecided(gate):
    alpha = ("--alpha", "0.05")
    low = {"tf": {"acc,none": [1.0, 1.0] + [0.0] * 58}}
    code, text = gate(low, low, update=alpha)
    assert code == 2
    assert "not even the worst possible score would be significant (p = 0.125" in text
    # Unless the result is better, which is all the rule asks.
    assert gate(low, {"tf": {"acc,none": [1.0] * 60}}, update=alpha)[0] == 0


def test_too_few_documents_that_are_no_answers_are_undecided(gate):
    before = {"tf": {"mc2,none": [0.5 + n / 100 for n in range(5)]}}
    code, text = gate(
        before, {"tf": {"mc2,none": [0.1] * 5}}, update=("--alpha", "0.05")
    )
    assert code == 2
    assert "too few to decide" in text


@pytest.mark.parametrize(("lost", "code"), [(4, 1), (3, 0)])
def test_the_test_is_one_sided(gate, lost, code):
    """Four answers lost and none won: mid-p 0.031 on one side, 0.0625 on both."""
    before = [1.0] * 30
    after = [0.0] * lost + [1.0] * (30 - lost)
    tasks = ({"tf": {"acc,none": values}} for values in (before, after))
    assert gate(*tasks, update=("--alpha", "0.05"))[0] == code


@pytest.mark.parametrize(
    ("higher_is_better", "code"), [(True, 0), (None, 1), (False, 1)]
)
def test_the_side_of_the_test_is_the_direction(gate, higher_is_better, code):
    before, after = (
        {"tf": {"m,none": {"values": values, "higher_is_better": higher_is_better}}}
        for values in ([0.0] * 30, [1.0] * 30)
    )
    found, text = gate(before, after, update=("--alpha", "0.05"))
    assert found == code
    assert ("IMPROVED" in text) == (higher_is_better is True)


def test_a_failure_outweighs_what_is_undecided(gate):
    after = {"tf": {"acc,none": answers(0.1)}, "lambada": BEFORE["lambada"]}
    code, text = gate(BEFORE, after, **{"n-shot": {"tf": 0, "lambada": 5}})
    assert code == 1
    assert "FAIL     tf" in text
    assert "UNDECIDED lambada" in text


def test_undecided_in_every_format(gate):
    shots = {"n-shot": {"tf": 5, "lambada": 0}}
    data = json.loads(gate(BEFORE, BEFORE, "--format", "json", **shots)[1])
    assert data["passed"] is False
    assert [row["status"] for row in data["findings"]] == ["pass", "undecided"]
    (note,) = data["notes"]
    assert "(num_fewshot) on tf, so" in note
    _, text = gate(BEFORE, BEFORE, "--format", "junit", **shots)
    suite = ElementTree.fromstring(text).find("testsuite")  # noqa: S314
    assert (suite.get("failures"), suite.get("errors")) == ("0", "1")
    assert "num_fewshot" in suite.find("testcase/error").get("message")
    _, text = gate(BEFORE, BEFORE, "--format", "github", **shots)
    assert "::error title=tf acc%2Cnone::Not comparable: num_fewshot 5" in text
    assert "::warning title=not as in the baseline::after was evaluated with" in text


def test_a_baseline_whose_settings_were_taken_out(gate):
    code, text = gate(BEFORE, BEFORE, edit=lambda run: run["tf"].pop("settings"))
    assert code == 2
    assert "documents 60 and in the baseline none" in text


def test_an_update_says_what_it_drops(tmp_path, capsys):
    write_run(tmp_path / "a", BEFORE)
    write_run(tmp_path / "b", {"tf": BEFORE["tf"]})
    options = ["--baseline", str(tmp_path / "b.json"), "--update"]
    assert cli.main(["check", str(tmp_path / "a"), *options]) == 0
    assert cli.main(["check", str(tmp_path / "b"), *options]) == 0
    assert "No longer expected: lambada perplexity,none." in capsys.readouterr().out


def test_one_unit_of_a_resumed_sweep_is_of_other_documents(tmp_path, capsys):
    tasks = {"tf": {"acc,none": answers(0.5)}, "arc": {"acc,none": answers(0.5)}}
    folder = tmp_path / "sweep"
    write_sweep(folder, {"base": (0, tasks), "p20": (20, tasks)})
    command = ["check", str(folder), "--baseline", str(tmp_path / "b.json")]
    assert cli.main([*command, "--update", "--absolute", "1"]) == 0
    unit = folder / "units" / "p20" / "arc"
    few = {"arc": {"acc,none": answers(0.5)[:10]}}
    write_run(unit, few, pruning=pruning(20), lm_eval_version="0.4.12")
    assert cli.main(command) == 2
    text = capsys.readouterr().out
    assert "UNDECIDED p20 arc acc,none" in text
    assert "0 failed, 1 undecided, 3 as expected" in text
    assert "(documents, lm_eval_version) on arc" in text


def test_results_of_several_commands_in_one_folder_are_checked(tmp_path, capsys):
    write_run(tmp_path / "a", BEFORE)
    command = ["check", str(tmp_path / "a"), "--baseline", str(tmp_path / "b.json")]
    assert cli.main([*command, "--update"]) == 0
    for number, (task, metrics) in enumerate(BEFORE.items()):
        date = f"2026-01-0{number + 1}T03-04-05.678901"
        write_run(tmp_path / "several", {task: metrics}, date=date)
    command[1] = str(tmp_path / "several")
    assert cli.main(command) == 0


def test_a_rule_that_cannot_decide_is_named_when_it_is_made(tmp_path, capsys):
    write_run(tmp_path / "a", first(5))
    options = ["--baseline", str(tmp_path / "b.json"), "--update", "--alpha", "0.05"]
    assert cli.main(["check", str(tmp_path / "a"), *options]) == 0
    assert "NOTE     tf acc,none: 5 independent documents" in capsys.readouterr().out


def test_the_baseline_does_not_hold_where_the_model_was(tmp_path):
    config = {"model": "pruned-hf", "model_args": {"pretrained": "/home/somebody/m"}}
    write_run(tmp_path / "a", first(60), config=config)
    file = tmp_path / "b.json"
    cli.main(["check", str(tmp_path / "a"), "--baseline", str(file), "--update"])
    assert "somebody" not in file.read_text()


@pytest.mark.parametrize(("shift", "code"), [(0.2, 1), (-0.2, 0)])
def test_a_higher_perplexity_is_significantly_worse(gate, shift, code):
    noise = np.random.default_rng(2).normal(0, 0.1, size=N)
    after = perplexity(0)
    after["values"] = (np.array(after["values"]) - shift + noise).tolist()
    tasks = ({"lambada": {"perplexity,none": spec}} for spec in (perplexity(0), after))
    found, text = gate(*tasks, update=("--alpha", "0.05"))
    assert found == code
    assert ("IMPROVED" in text) == (shift < 0)


def test_a_model_of_several_widths(tmp_path, capsys):
    def groups(shared):
        kinds = {"expert": (8, 64), "shared": (1, shared)}
        return [
            {"kind": kind, "mlps": mlps, "width_after": width}
            for kind, (mlps, width) in kinds.items()
        ]

    for name, shared in (("a", 128), ("b", 96)):
        record = {**pruning(20), "groups": groups(shared)}
        write_run(tmp_path / name, first(60), pruning=record)
    file = str(tmp_path / "b.json")
    assert cli.main(["check", str(tmp_path / "a"), "--baseline", file, "--update"]) == 0
    assert cli.main(["check", str(tmp_path / "b"), "--baseline", file]) == 2
    assert "widths 8 x 64, 1 x 96 and" in capsys.readouterr().out


def test_small_subtasks_are_decided_with_their_group(tmp_path, capsys):
    def write(name, shares):
        tasks = {
            f"s{n}": {"acc,none": [float(m < 4 * share) for m in range(4)]}
            for n, share in enumerate(shares)
        }
        write_run(
            tmp_path / name,
            tasks,
            groups={"all": list(tasks)},
            group_scores={"all": {"acc,none": float(np.mean(shares))}},
        )
        return str(tmp_path / name)

    options = ["--baseline", str(tmp_path / "b.json")]
    before = write("before", [1.0] * 10)
    assert cli.main(["check", before, *options, "--update", "--alpha", "0.05"]) == 0
    assert cli.main(["check", before, *options, "--format", "json"]) == 0
    output = capsys.readouterr().out
    assert output.count("Too few documents alone, decided as a part of all.") == 10
    assert cli.main(["check", write("after", [0.25] * 10), *options]) == 1
    # Without the group there is nothing that decides.
    data = json.loads((tmp_path / "b.json").read_text())
    del data["runs"]["run"]["all"]
    (tmp_path / "b.json").write_text(json.dumps(data))
    assert cli.main(["check", before, *options]) == 2


@pytest.mark.parametrize(
    ("rule", "after", "code", "words"),
    [
        (("--not_worse", "10pt"), 0.5, 0, "1 as expected"),
        (("--equivalent", "15%"), 0.5, 0, "1 as expected"),
        (("--not_worse", "1pt"), 0.3, 1, "Significantly worse"),
        (("--equivalent", "1pt"), 0.48, 2, "Not shown to be equivalent within 1pt"),
        (("--equivalent", "1pt"), 0.8, 0, "IMPROVED"),
        (("--not_worse", "1pt"), 0.8, 0, "1 as expected"),
    ],
)
def test_rules_with_a_margin(gate, rule, after, code, words):
    before = {"tf": {"acc,none": answers(0.5)}}
    found, text = gate(before, {"tf": {"acc,none": answers(after)}}, update=rule)
    assert found == code, text
    assert words in text


def test_a_margin_that_cannot_be_is_refused_when_it_is_made(tmp_path, capsys):
    write_run(tmp_path / "a", first(60))
    options = ["--baseline", str(tmp_path / "b.json"), "--update", "--not_worse", "-1"]
    assert cli.main(["check", str(tmp_path / "a"), *options]) == 2
    assert "not_worse" in capsys.readouterr().err
    assert not (tmp_path / "b.json").exists()
