"""What a line of the harness's samples says was asked and answered."""

from __future__ import annotations

import pytest

from lm_eval_pruned.results.documents import Answer, read_answer, read_question


def choices(prompt, endings, likelihoods, **more):
    """Return a line of a multiple-choice task, as the harness writes it."""
    return {
        "arguments": {
            f"gen_args_{number}": {"arg_0": prompt, "arg_1": ending}
            for number, ending in enumerate(endings)
        },
        "resps": [[[str(value), "False"]] for value in likelihoods],
        "filtered_resps": [[str(value), "False"] for value in likelihoods],
        **more,
    }


def test_the_most_likely_choice_is_the_answer():
    row = choices("Q:", [" yes", " no"], [-3.0, -2.0], acc=1.0, target="1", doc_id=7)
    assert read_answer(row, "acc") == Answer(True, "1")
    question = read_question({**row, "doc_hash": "abc"})
    assert (question.number, question.digest, question.prompt) == ("7", "abc", "Q:")
    assert question.choices == (" yes", " no")
    assert question.target == "1"


def test_the_instructions_of_ifeval_are_its_target():
    row = {"doc": {"instruction_id_list": ["punctuation:no_comma"]}, "target": "0"}
    assert read_question(row).target == "['punctuation:no_comma']"
    assert read_question({"doc": {}, "target": "0"}).target == "0"


def test_each_metric_has_its_own_answer():
    # -3 / 1 < -4 / 2 by letters.
    row = choices("Q:", [" \u20ac", " ab"], [-3.0, -4.0], acc=0, acc_norm=1)
    assert read_answer(row, "acc").chosen == "0"
    assert read_answer(row, "acc_norm").chosen == "1"


def test_choices_that_stand_in_the_prompt():
    row = {
        "arguments": {
            "gen_args_0": {"arg_0": "The fox or Ann", "arg_1": " ran."},
            "gen_args_1": {"arg_0": "The fox or Bob", "arg_1": " ran."},
        },
        "filtered_resps": [["-1", "True"], ["-2", "True"]],
    }
    question = read_question(row)
    assert question.prompt == "The fox or "
    assert question.choices == ("Ann ran.", "Bob ran.")


def test_text_after_the_filter_and_before():
    row = {
        "arguments": {"gen_args_0": {"arg_0": "2+2?", "arg_1": {"until": ["\n"]}}},
        "resps": [["It is 4."]],
        "filtered_resps": ["4"],
        "exact_match": True,
    }
    assert read_answer(row, "exact_match") == Answer(True, "4", "It is 4.")
    assert read_question(row).choices == ()
    assert read_question(row).prompt == "2+2?"


def test_one_likelihood_names_no_other_answer():
    row = choices("He", [" ran"], [-2.5], acc=0.0)
    assert read_answer(row, "acc") == Answer(False, None)
    assert read_question(row).choices == ()


@pytest.mark.parametrize("value", [0.5, "1", None, [1.0], float("nan"), 2])
def test_neither_right_nor_wrong(value):
    assert read_answer({"acc": value}, "acc") is None


def test_mutual_information_asks_twice():
    row = choices("Q:", [" a", " b"] * 2, [-2, -1, -1, -4], acc=1, acc_mutual_info=1)
    assert read_answer(row, "acc").chosen == "1"
    assert read_question(row).choices == (" a", " b")


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
