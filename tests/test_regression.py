from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from lm_eval_pruned import cli

from .results_files import write_run, write_sweep


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
    assert "no metric acc,none" in text
    assert "no result for lambada" in text
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
    assert "other documents" in text


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
    assert "no run p20" in capsys.readouterr().out
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
        "schema_version": 1,
        "runs": {"run": {"tf": {"metrics": {"acc,none": record}}}},
    }


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"{", "not whole JSON"),
        ({"results": {}}, "is no baseline"),
        ({"schema_version": 2, "runs": {}}, "upgrade lm-eval-pruned"),
        ({"schema_version": 1, "runs": {}}, "expects nothing"),
        ({"schema_version": 1, "runs": {"run": 3}}, "entry of run is damaged"),
        (
            {"schema_version": 1, "runs": {"run": {"tf": {}}}},
            "entry of run, tf is damaged",
        ),
        (
            baseline_of({**GOOD, "score": float("nan")}),
            "score of run, tf, acc,none is nan",
        ),
        (baseline_of({**GOOD, "score": "0.5"}), "not a number"),
        (baseline_of({**GOOD, "relative": 0.1}), "has 2 rules"),
        (baseline_of({"score": 0.5}), "has 0 rules"),
        (baseline_of({**GOOD, "absolute": -1}), "absolute=-1 is no tolerance"),
        (baseline_of({**GOOD, "absolute": "x"}), "give a number"),
        (baseline_of({**GOOD, "higher_is_better": "yes"}), "higher_is_better"),
        (baseline_of({"score": 0.5, "alpha": 2}), "alpha=2"),
        (baseline_of({"score": 0.5, "alpha": 0.05}), "no documents"),
        (
            baseline_of({"score": 0.5, "alpha": 0.05, "documents": {"values": [1]}}),
            "damaged",
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
