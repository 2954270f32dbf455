"""Chance and majority of a task, as its logged samples tell them."""

from __future__ import annotations

import numpy as np
import pytest

from lm_eval_pruned.results.documents import (
    Levels,
    levels_of,
    read_documents,
    read_question,
)
from lm_eval_pruned.results.runs import read_run
from tests.helpers.results_files import offering, write_run


def row(options, target="0", **more):
    return offering(options, target) | more


def test_chance_is_one_of_the_choices():
    question = read_question(row(["a", "b", "c", "d"]))
    assert (question.chance, question.right) == (0.25, 0)


def test_what_offers_no_choice_has_no_level():
    # The harness writes the settings of a generation where a choice would stand.
    for each in (row(["only one"]), row([{"until": []}] * 2), {"arguments": {}}, {}):
        question = read_question(each)
        assert (question.chance, question.choices) == (None, ())
        assert levels_of([question] * 2, np.ones(2)) == Levels()


def test_choices_that_were_asked_without_the_question_count_once():
    assert read_question(row(["a", "b"] * 2, acc_mutual_info=1.0)).chance == 0.5


@pytest.mark.parametrize(
    ("target", "right"), [("1", 1), ("yes", 1), ("perhaps", None), ("7", None)]
)
def test_the_right_answer_by_number_or_in_words(target, right):
    assert read_question(row([" no", " yes"], target)).right == right


def test_the_truthful_answers_of_mc2_are_several():
    doc = {
        "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["a", "c", "b", "d"], "labels": [1, 1, 1, 0]},
    }
    assert read_question(row([" a", " c", " b", " d"], doc=doc)).chance == 0.75
    assert read_question(row([" a", " b"], doc=doc)).chance == 0.5


def test_majority_is_known_where_all_documents_offer_the_same():
    same = [read_question(row(["no", "yes"], right)) for right in "1101"]
    assert levels_of(same, np.ones(4)).majority == 0.75
    assert levels_of(same, np.array([1, 1, 5, 1])).majority == pytest.approx(5 / 8)
    # Position 0 is always right, which no model can see.
    others = [read_question(row([f"right {n}", "wrong"])) for n in range(4)]
    assert levels_of(others, np.ones(4)) == Levels(0.5)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_group_counts_its_documents_as_its_score_does(tmp_path, weighted):
    def task(choices, count, values):
        rows = {n: offering([str(c) for c in range(choices)]) for n in range(count)}
        return {"acc,none": {"values": values, "rows": rows}}

    two, four = [1.0, 0.0, 0.0], [1.0] * 9
    score = 10 / 12 if weighted else (1 / 3 + 1) / 2
    file = write_run(
        tmp_path,
        {"two": task(2, 3, two), "four": task(4, 9, four)},
        groups={"both": ["two", "four"]},
        group_scores={"both": {"acc,none": score, "acc_stderr,none": "N/A"}},
    )
    documents = read_documents(read_run(str(file)), "both", "acc,none")
    expected = (3 * 0.5 + 9 * 0.25) / 12 if weighted else (0.5 + 0.25) / 2
    assert documents.levels.chance == pytest.approx(expected)
    made = np.average(documents.values, weights=documents.weights)
    assert made == pytest.approx(score)
    assert documents.levels.majority is None
