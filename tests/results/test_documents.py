"""Single documents: how they make up a score, what was asked and what was answered."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lm_eval_pruned.results.documents import (
    TRANSFORMS,
    Answer,
    Documents,
    Levels,
    levels_of,
    read_answer,
    read_documents,
    read_question,
)
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.runs import read_run
from tests.helpers.results_files import offering, score_of, write_run


RNG = np.random.default_rng(0)
PAIRS = [
    [-float(v), int(w)]
    for v, w in zip(RNG.gamma(9, size=12), range(1, 13), strict=True)
]


def documents_of(folder, task, **metrics):
    """Write one task and return its documents, by metric without filter."""
    tasks = {task: {f"{metric},none": spec for metric, spec in metrics.items()}}
    run = read_run(write_run(folder, tasks))
    return [read_documents(run, task, f"{metric},none") for metric in metrics]


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
    # An aggregation that is no mean is not guessed.
    f1 = {"values": [1.0] * len(values), "score": 0.31}
    made, other = documents_of(tmp_path, "t", m=spec, f1=f1)
    mean = np.average(made.values, weights=made.weights)
    assert made.transform == transform
    assert TRANSFORMS[transform](mean) == pytest.approx(score_of(values, aggregation))
    assert other is None


def test_each_filter_has_its_own_documents(tmp_path):
    values = {"strict-match": [0.0, 0.0, 1.0], "flexible-extract": [1.0, 0.0, 1.0]}
    tasks = {"gsm8k": {f"exact_match,{name}": of for name, of in values.items()}}
    run = read_run(write_run(tmp_path, tasks))
    for metric, of in tasks["gsm8k"].items():
        assert read_documents(run, "gsm8k", metric).values.tolist() == of


def test_repeated_documents_are_told_apart_and_texts_are_clusters(tmp_path):
    docs = {n: {"narrative": f"story {n // 2}", "question": n // 4} for n in range(8)}
    (found,) = documents_of(
        tmp_path, "musr_x", acc={"values": [1, 0] * 4, "docs": docs}
    )
    assert len(set(found.keys)) == 8
    assert found.clusters == tuple(np.repeat(found.clusters[::2], 2))
    assert len(set(found.clusters)) == 4
    assert found.strata is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-20], "line 3: not whole JSON"),
        (lambda text: b"".join(text.splitlines(True)[:2]), "holds 2 documents.*says 3"),
        (lambda text: b"", "holds 0 documents"),
        (lambda text: text.replace(b"doc_hash", b"other"), "line 1: not whole"),
        (lambda text: b"\xff\xfe", "line 1: not whole JSON"),
    ],
)
def test_hostile_samples(tmp_path, change, words):
    run = read_run(write_run(tmp_path, {"tf": {"acc,none": [1.0, 0.0, 1.0]}}))
    file = run.samples["tf"]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ResultsError, match=words) as caught:
        read_documents(run, "tf", "acc,none")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("weighted", [True, False])
def test_members_of_a_group_are_strata_and_count_as_its_score_does(tmp_path, weighted):
    sizes, values = {"two": 3, "four": 9}, {"two": [1.0, 0.0, 0.0], "four": [1.0] * 9}
    rows = {"two": offering("ab"), "four": offering("abcd")}
    tasks = {
        task: {
            "acc,none": {
                "values": of,
                "rows": dict.fromkeys(range(sizes[task]), rows[task]),
            }
        }
        for task, of in values.items()
    }
    score = 10 / 12 if weighted else (1 / 3 + 1) / 2
    file = write_run(
        tmp_path,
        tasks,
        groups={"all": ["half", "four"], "half": ["two"]},
        group_scores={"all": {"acc,none": score, "acc_stderr,none": "N/A"}},
    )
    run = read_run(file)
    assert run.tasks(subtasks=False) == ["all"]
    found = read_documents(run, "all", "acc,none")
    assert np.average(found.values, weights=found.weights) == pytest.approx(score)
    assert (found.clusters, set(found.strata)) == (None, {"two", "four"})
    chance = (3 * 0.5 + 9 * 0.25) / 12 if weighted else (0.5 + 0.25) / 2
    assert found.levels == Levels(pytest.approx(chance))
    run.samples["two"].unlink()
    assert read_documents(read_run(file), "all", "acc,none") is None


def test_documents_in_another_order_keep_what_belongs_to_each():
    keys = tuple(("task", name, 0) for name in "abc")
    documents = Documents(keys, np.arange(3.0), np.arange(1.0, 4), tuple("xyz"), "mean")
    turned = documents.in_the_order_of(replace(documents, keys=keys[::-1]))
    assert (turned.keys, turned.clusters) == (keys[::-1], tuple("zyx"))
    assert (turned.values.tolist(), turned.weights.tolist()) == ([2, 1, 0], [3, 2, 1])
    few = replace(documents, keys=keys[1:])
    assert documents.in_the_order_of(few) is None
    assert documents.in_the_order_of(few, part=True).values.tolist() == [1, 2]
    assert few.in_the_order_of(documents, part=True) is None


DOC = {
    "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
    "mc2_targets": {"choices": ["a", "c", "b", "d"], "labels": [1, 1, 1, 0]},
}


@pytest.mark.parametrize(
    ("row", "chance", "right"),
    [
        (offering("abcd"), 0.25, 0),
        (offering([" no", " yes"], "1"), 0.5, 1),
        (offering([" no", " yes"], "yes"), 0.5, 1),
        (offering([" no", " yes"], "perhaps"), 0.5, None),
        (offering([" no", " yes"], "7"), 0.5, None),
        # Asked once more without the question.
        (offering("abab") | {"acc_mutual_info": 1.0}, 0.5, 0),
        # The truthful answers of MC2 are several.
        (offering([" a", " c", " b", " d"]) | {"doc": DOC}, 0.75, None),
        (offering([" a", " b"]) | {"doc": DOC}, 0.5, 0),
        # The harness writes the settings of a generation where a choice would stand.
        (offering([{"until": []}] * 2), None, None),
        (offering(["only one"], "x"), None, None),
        ({"arguments": {}}, None, None),
    ],
)
def test_chance_and_the_right_choice(row, chance, right):
    question = read_question(row)
    assert (question.chance, question.right) == (chance, right)
    assert bool(question.choices) == (chance is not None)


def test_majority_is_known_where_all_documents_offer_the_same():
    same = [read_question(offering(["no", "yes"], right)) for right in "1101"]
    assert levels_of(same, np.ones(4)).majority == 0.75
    assert levels_of(same, np.array([1, 1, 5, 1])).majority == pytest.approx(5 / 8)
    # Position 0 is always right, which no model can see.
    others = [read_question(offering([f"right {n}", "wrong"])) for n in range(4)]
    assert levels_of(others, np.ones(4)) == Levels(0.5)
    assert levels_of([read_question({})], np.ones(1)) == Levels()


def test_prompt_and_target():
    asked = read_question(
        offering([" yes", " no"], 1) | {"doc_id": 7, "doc_hash": "abc"}
    )
    assert (asked.number, asked.digest, asked.prompt) == ("7", "abc", "the question")
    assert (asked.choices, asked.target) == ((" yes", " no"), "1")
    row = {"doc": {"instruction_id_list": ["punctuation:no_comma"]}, "target": "0"}
    assert read_question(row).target == "['punctuation:no_comma']"
    # The choices of Winogrande stand in the prompt.
    asked = {
        f"{n}": {"arg_0": f"A fox or {n}", "arg_1": " ran."} for n in ("Ann", "Bob")
    }
    question = read_question({"arguments": asked})
    assert (question.prompt, question.choices) == (
        "A fox or ",
        ("Ann ran.", "Bob ran."),
    )


@pytest.mark.parametrize(
    ("endings", "likelihoods", "metrics", "answers"),
    [
        ([" yes", " no"], [-3, -2], {"acc": 1.0}, [Answer(True, "1")]),
        # -3 / 1 < -4 / 2 by letters.
        (
            [" \u20ac", " ab"],
            [-3, -4],
            {"acc": 0, "acc_norm": 1},
            [Answer(False, "0"), Answer(True, "1")],
        ),
        (
            [" a", " b"] * 2,
            [-2, -1, -1, -4],
            {"acc": 1, "acc_mutual_info": 0.5},
            [Answer(True, "1"), None],
        ),
        ([" ran"], [-2.5], {"acc": 0.0}, [Answer(False, None)]),
        *(
            ([" a", " b"], [-2, -1], {"acc": v}, [None])
            for v in (0.5, "1", None, [1.0], float("nan"), 2)
        ),
    ],
)
def test_the_most_likely_choice_is_the_answer(endings, likelihoods, metrics, answers):
    row = offering(endings, likelihoods=likelihoods) | metrics
    assert [read_answer(row, metric) for metric in metrics] == answers


def test_text_after_the_filter_and_before():
    row = {"resps": [["It is 4."]], "filtered_resps": ["4"], "exact_match": True}
    row = offering([{"until": ["\n"]}]) | row
    assert read_answer(row, "exact_match") == Answer(True, "4", "It is 4.")
    assert read_question(row).prompt == "the question"


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"doc_id": {"a": 1}, "doc_hash": 3, "target": ["x", None]},
        {"filtered_resps": [["a", "b", "c"], {"d": []}], "resps": [[[]]]},
    ],
)
def test_lines_of_another_form_are_read_as_far_as_they_go(row):
    answer = read_answer({**row, "acc": 1}, "acc")
    assert answer.right
    assert answer.chosen is None or isinstance(answer.chosen, str)
    assert read_question(row).choices == ()
