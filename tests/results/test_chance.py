"""Chance and majority of a task, as its logged samples tell them."""

from __future__ import annotations

import numpy as np
import pytest

from lm_eval_pruned.results.chance import choices_of, levels_of
from lm_eval_pruned.results.documents import read_documents
from lm_eval_pruned.results.runs import read_run
from tests.helpers.results_files import offering, write_run


def row(options, target="0", **more):
    return offering(options, target) | more


def test_chance_is_one_of_the_choices():
    found = choices_of(row(["a", "b", "c", "d"]), "acc_norm")
    assert found.chance == 0.25
    assert found.right == 0


def test_what_offers_no_choice_has_no_level():
    assert choices_of(row(["only one"]), "acc") is None
    assert choices_of({"arguments": {}}, "acc") is None
    assert choices_of({"arguments": "damaged"}, "acc") is None
    assert choices_of(row(["a", "b"]), "exact_match") is None
    # The harness writes the settings of a generation where a choice would stand.
    assert choices_of(row([{"until": []}, {"until": []}]), "acc") is None
    assert levels_of([None, None], [1, 1]).chance is None


def test_choices_that_were_asked_without_the_question_count_once():
    found = choices_of(row(["a", "b", "a", "b"], acc_mutual_info=1.0), "acc")
    assert found.chance == 0.5


def test_the_right_answer_by_number_or_in_words():
    assert choices_of(row([" no", " yes"], "1"), "acc").right == 1
    assert choices_of(row([" no", " yes"], "yes"), "acc").right == 1
    assert choices_of(row([" no", " yes"], "perhaps"), "acc").right is None
    assert choices_of(row([" no", " yes"], "7"), "acc").right is None


def test_the_truthful_answers_of_mc2_are_several():
    doc = {
        "mc1_targets": {"choices": ["a", "b"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["a", "c", "b", "d"], "labels": [1, 1, 1, 0]},
    }
    assert choices_of(row([" a", " c", " b", " d"], doc=doc), "acc").chance == 0.75
    assert choices_of(row([" a", " b"], doc=doc), "acc").chance == 0.5


def test_majority_is_known_where_all_documents_offer_the_same():
    same = [choices_of(row(["no", "yes"], right), "acc") for right in "1101"]
    assert levels_of(same, [1] * 4).majority == 0.75
    assert levels_of(same, [1, 1, 5, 1]).majority == pytest.approx(5 / 8)
    # Position 0 is always right, which no model can see.
    others = [choices_of(row([f"right {n}", "wrong"]), "acc") for n in range(4)]
    assert levels_of(others, [1] * 4) == levels_of(others[:1] * 2 + others[1:], [1] * 5)
    assert levels_of(others, [1] * 4).majority is None


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
