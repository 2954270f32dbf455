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
def held(tmp_path, capsys):
    """Return a function that checks a folder, or makes the baseline of it; exit code and text."""

    def run(folder, *options):
        file = str(tmp_path / "baseline.json")
        code = cli.main(["check", str(tmp_path / folder), "--baseline", file, *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def gate(tmp_path, held):
    """Return a function that makes a baseline of `before` and checks `after`."""

    def run(
        before, after, *options, update=("--absolute", "0.01"), edit=None, **kwargs
    ):
        write_run(tmp_path / "before", before)
        write_run(tmp_path / "after", after, **kwargs)
        assert held("before", "--update", *update)[0] == 0
        if edit:
            file = tmp_path / "baseline.json"
            data = json.loads(file.read_text())
            edit(data["runs"]["run"])
            file.write_text(json.dumps(data))
        return held("after", *options)

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


def test_alpha_without_samples_is_unusable(gate, held, tmp_path):
    alpha = ("--alpha", "0.05")
    code, text = gate(BEFORE, BEFORE, update=alpha, samples=False)
    assert code == 2
    assert "--log_samples" in text
    (tmp_path / "baseline.json").unlink()
    code, text = held("after", "--update", *alpha)
    assert code == 0
    assert "NOTE     tf acc,none: The rule alpha needs logged samples" in text
    assert held("before")[0] == 2


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
    # The subtasks have too few clusters to be tested by themselves.
    data = json.loads(file.read_text())
    data["runs"]["run"] = {"musr": data["runs"]["run"]["musr"]}
    file.write_text(json.dumps(data))
    record = data["runs"]["run"]["musr"]["metrics"]["acc,none"]
    assert len(set(record["documents"]["clusters"].values())) == 48
    assert cli.main(["check", before, *options]) == 0
    assert cli.main(["check", write("after", 0.3), *options]) == 1


def test_github_escapes_what_would_end_a_command(gate):
    nasty = {"a:b,c%": {"acc,none": answers(0.5)}}
    _, text = gate(nasty, {"a:b,c%": {"acc,none": answers(0.2)}}, "--format", "github")
    line = text.splitlines()[0]
    assert line.startswith("::error title=a%3Ab%2Cc%25 acc%2Cnone::Worse by 0.3")


def test_a_sweep_is_checked_run_by_run(tmp_path, held):
    tasks = {"tf": {"acc,none": answers(0.5)}}
    both = {"base": (0, tasks), "p20": (20, tasks)}
    write_sweep(tmp_path / "sweep", both)
    write_sweep(tmp_path / "worse", {"base": (0, tasks)})
    write_sweep(tmp_path / "failed", {**both, "p20": (20, {})}, p20="tf")
    assert held("sweep", "--update")[0] == 0
    data = json.loads((tmp_path / "baseline.json").read_text())
    assert list(data["runs"]) == ["base", "p20"]
    assert held("sweep")[0] == 0
    code, text = held("worse")
    assert code == 1
    assert "no p20 tf acc,none" in text
    code, text = held("failed")
    assert code == 2
    assert "--retry_failed" in text


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
    spec = {"values": [1.0] * 12, "docs": {0: {"question": "a secret question"}}}
    config = {"model": "pruned-hf", "model_args": {"pretrained": "/home/secret/m"}}
    write_run(tmp_path / "a", {"tf": {"acc,none": spec}}, config=config)
    assert held("a", "--update", "--alpha", "0.1")[0] == 0
    assert "secret" not in (tmp_path / "baseline.json").read_text()


def test_update_refuses_nan_and_leaves_the_file_alone(tmp_path, held):
    write_run(tmp_path / "a", {"tf": {"acc,none": [float("nan"), 1.0]}})
    code, text = held("a", "--update")
    assert code == 2
    assert "tf acc,none: The score is nan, not a finite number" in text
    assert not (tmp_path / "baseline.json").exists()


GOOD = {"score": 0.5, "higher_is_better": True, "absolute": 0.1}
TESTED = {"score": 0.5, "alpha": 0.05}
NEEDS = "run tf acc,none needs a finite score"


def baseline_of(record):
    tasks = {"tf": {"metrics": {"acc,none": record}}}
    return {"schema_version": 2, "runs": {"run": tasks}}


def documents(values, **more):
    made = {"transform": "mean", "values": values, **more}
    return baseline_of({**TESTED, "documents": made})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "not whole JSON"),
        ({"results": {}}, "it lacks 'schema_version'"),
        ({"schema_version": 3, "runs": {}}, "schema_version is 3"),
        ({"schema_version": 2, "runs": {}}, "it expects nothing"),
        ({"schema_version": 2, "runs": {"run": {}}}, "it expects nothing"),
        ({"schema_version": 2, "runs": {"run": 3}}, "cannot be read"),
        ({"schema_version": 2, "runs": {"run": {"tf": {}}}}, "it lacks 'metrics'"),
        (baseline_of({**GOOD, "score": float("nan")}), NEEDS),
        (baseline_of({**GOOD, "score": "0.5"}), NEEDS),
        (baseline_of({**GOOD, "relative": 0.1}), NEEDS),
        (baseline_of({"score": 0.5}), NEEDS),
        (baseline_of({**GOOD, "higher_is_better": "yes"}), NEEDS),
        (baseline_of({**GOOD, "absolute": -1}), "absolute=-1 is not between"),
        (baseline_of({**GOOD, "absolute": "x"}), "could not convert"),
        (baseline_of({"score": 0.5, "alpha": 2}), "alpha=2 is not between 0 and 1"),
        (baseline_of({"score": 0.5, "not_worse": "much"}), "not_worse=much is no mar"),
        (baseline_of({**TESTED, "documents": {"values": [1]}}), "cannot be read"),
        (documents({"a b 0": None}), "documents without finite scores"),
        (documents({}), "documents without finite scores"),
        (documents({"a b 0": 1, "a c 0": 1}, clusters={"a b 0": "0"}), "clusters"),
        (documents({"a b 0": 1}, transform="sum"), "a known transform"),
    ],
)
def test_hostile_baselines(tmp_path, held, data, words):
    write_run(tmp_path / "a", BEFORE)
    file = tmp_path / "baseline.json"
    file.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    before = file.read_bytes()
    for options in ([], ["--update"]):
        code, message = held("a", *options)
        assert code == 2
        assert words in message
        assert "make it anew in another file" in message
        assert message.count("\n") == 1
    assert file.read_bytes() == before


def test_a_missing_baseline_says_how_to_make_one(tmp_path, held):
    write_run(tmp_path / "a", BEFORE)
    code, text = held("a")
    assert code == 2
    assert "--update" in text


def test_rules_without_update_are_refused(held):
    code, text = held("a", "--alpha", "0.05")
    assert code == 2
    assert "together with --update" in text


def first(n: int) -> dict:
    return {"tf": {"acc,none": answers(0.5)[:n]}}


def test_other_documents_and_shots_are_not_compared(tmp_path, held):
    """A baseline of 800 documents at 0 shots does not pass results of 50 at 5 shots."""
    write_run(tmp_path / "before", {"tf": {"acc,none": [1.0, 0.0] * 400}})
    few = {"tf": {"acc,none": [1.0, 0.0] * 25}}
    write_run(tmp_path / "after", few, **{"n-shot": {"tf": 5}})
    assert held("before", "--update")[0] == 0
    code, text = held("after")
    assert code == 2
    assert "UNDECIDED tf acc,none" in text
    assert "documents 50 and in the baseline 800" in text
    assert "num_fewshot 5 and in the baseline 0" in text
    assert "Check undecided: 0 failed, 1 undecided" in text
    assert held("after", "--update")[0] == 0
    assert held("after")[0] == 0


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


def test_another_few_shot_seed_matters_with_examples(tmp_path, held):
    shots = {"n-shot": {"tf": 5}}
    write_run(tmp_path / "before", first(60), **shots, config={"fewshot_seed": 1})
    write_run(tmp_path / "after", first(60), **shots, config={"fewshot_seed": 2})
    assert held("before", "--update")[0] == 0
    code, text = held("after")
    assert code == 2
    assert "fewshot_seed 2 and in the baseline 1" in text


def test_another_width_is_another_model(tmp_path, held):
    """An unpruned model must not pass as the pruned one that the baseline is of."""
    write_run(tmp_path / "before", first(60), pruning=pruning(40))
    write_run(tmp_path / "after", first(60), pruning=pruning(20))
    kept = {**pruning(40), "kept_digest": "e" * 64}
    write_run(tmp_path / "others", first(60), pruning=kept)
    assert held("before", "--update")[0] == 0
    code, text = held("after")
    assert code == 2
    assert "widths 2 x 320 and in the baseline 2 x 240" in text
    assert held("others")[0] == 0


def test_too_few_documents_for_alpha_are_undecided(gate, held):
    """Also where all of them became wrong, where none did, and of probabilities."""
    right, wrong, likely = ({"tf": {"m,none": [each] * 5}} for each in (1.0, 0.0, 0.3))
    for after in (wrong, right, likely):
        code, text = gate(right, after, update=("--alpha", "0.05"))
        assert code == 2
        assert "5 independent documents are too few to decide, at least 10" in text
    # The rule that cannot decide is named when it is made.
    assert (
        "NOTE     tf m,none: 5 independent documents" in held("before", "--update")[1]
    )


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


def test_a_score_that_cannot_get_significantly_worse_is_undecided(gate):
    alpha = ("--alpha", "0.05")
    low = {"tf": {"acc,none": [1.0, 1.0] + [0.0] * 58}}
    code, text = gate(low, low, update=alpha)
    assert code == 2
    assert "not even the worst score would be significant" in text
    # Unless the result is better, which is all the rule asks.
    assert gate(low, {"tf": {"acc,none": [1.0] * 60}}, update=alpha)[0] == 0


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


def test_one_unit_of_a_resumed_sweep_is_of_other_documents(tmp_path, held):
    tasks = {"tf": {"acc,none": answers(0.5)}, "arc": {"acc,none": answers(0.5)}}
    folder = tmp_path / "sweep"
    write_sweep(folder, {"base": (0, tasks), "p20": (20, tasks)})
    assert held("sweep", "--update", "--absolute", "1")[0] == 0
    few = {"arc": {"acc,none": answers(0.5)[:10]}}
    unit = folder / "units" / "p20" / "arc"
    write_run(unit, few, pruning=pruning(20), lm_eval_version="0.4.12")
    code, text = held("sweep")
    assert code == 2
    assert "UNDECIDED p20 arc acc,none" in text
    assert "0 failed, 1 undecided, 3 as expected" in text
    assert "(documents, lm_eval_version) on arc" in text


@pytest.mark.parametrize(("shift", "code"), [(0.2, 1), (-0.2, 0)])
def test_a_higher_perplexity_is_significantly_worse(gate, shift, code):
    noise = np.random.default_rng(2).normal(0, 0.1, size=N)
    after = perplexity(0)
    after["values"] = (np.array(after["values"]) - shift + noise).tolist()
    tasks = ({"lambada": {"perplexity,none": spec}} for spec in (perplexity(0), after))
    found, text = gate(*tasks, update=("--alpha", "0.05"))
    assert found == code
    assert ("IMPROVED" in text) == (shift < 0)


def test_a_model_of_several_widths(tmp_path, held):
    for name, shared in (("a", 128), ("b", 96)):
        kinds = {"expert": (8, 64), "shared": (1, shared)}
        groups = [
            {"kind": kind, "mlps": mlps, "width_after": width}
            for kind, (mlps, width) in kinds.items()
        ]
        record = {**pruning(20), "groups": groups}
        write_run(tmp_path / name, first(60), pruning=record)
    assert held("a", "--update")[0] == 0
    code, text = held("b")
    assert code == 2
    assert "widths 8 x 64, 1 x 96 and" in text


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


def test_a_margin_that_cannot_be_is_refused_when_it_is_made(tmp_path, held):
    write_run(tmp_path / "a", first(60))
    code, text = held("a", "--update", "--not_worse", "-1")
    assert code == 2
    assert "not_worse" in text
    assert not (tmp_path / "baseline.json").exists()
