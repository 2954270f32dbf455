"""Answers after another document's question: the floor of one model."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from lm_eval_pruned.model_wrappers.floors import mismatched
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.results.files import Run
from tests.helpers.asking import request
from tests.helpers.evaluations import evaluate


TASK = "pruned_demo_truthfulness"


def document(number, contexts, answers, task="t"):
    return [
        request("loglikelihood", *pair, place=place, task=task, number=number)
        for place, pair in enumerate(zip(contexts, answers, strict=True))
    ]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 4)), min_size=2))
def test_no_document_keeps_its_question_and_all_keep_their_answers(drawn):
    questions = [question for question, _ in drawn]
    documents = [
        document(n, [f"{question}?"] * size, [f" {n} {m}" for m in range(size)])
        for n, (question, size) in enumerate(drawn)
    ]
    requests = [request for requests in documents for request in requests]
    if 2 * max(map(questions.count, questions)) > len(questions):
        with pytest.raises(ValueError, match="raise --limit"):
            mismatched("loglikelihood", requests)
        return
    exchanged = mismatched("loglikelihood", requests)
    assert [r.args[1] for r in exchanged] == [r.args[1] for r in requests]
    assert all(a.args[0] != b.args[0] for a, b in zip(exchanged, requests, strict=True))
    # Each question is still asked once for each document that asked it.
    asked = {r.doc_id: r.args[0] for r in exchanged}
    assert sorted(asked.values()) == sorted(f"{question}?" for question in questions)
    again = {r.doc_id: r.args[0] for r in mismatched("loglikelihood", requests[::-1])}
    assert again == asked, "the exchange does not depend on the order"


def test_contexts_of_answers_are_exchanged_place_by_place_and_empty_ones_stay():
    first = document(0, ["I ", "you ", ""], ["a", "a", "a"])
    second = document(1, ["he ", "she ", ""], ["b", "b", "b"])
    exchanged = mismatched("loglikelihood", [*first, *second])
    contexts = ["he ", "she ", "", "I ", "you ", ""]
    assert [request.args[0] for request in exchanged] == contexts


def test_a_repeated_request_is_answered_again():
    first, second = document(0, ["A?"], ["a"]), document(1, ["B?"], ["b"])
    exchanged = mismatched("loglikelihood", [*first, *first, *second])
    assert [request.args for request in exchanged] == [
        ("B?", "a"),
        ("B?", "a"),
        ("A?", "b"),
    ]


@pytest.mark.parametrize("model", ["hf-prefix", "pruned-hf"])
def test_results_after_these_questions_are_a_floor_and_no_ordinary_score(
    model, tiny_llama
):
    plain, config = evaluate(model, f"pretrained={tiny_llama}", limit=4)
    assert not Run("", tiny_llama, {}, config=config).is_floor
    arguments = f"pretrained={tiny_llama},mismatched_questions=true"
    blind, config = evaluate(model, arguments, limit=4)
    assert blind != plain
    assert Run("", tiny_llama, {}, config=config).is_floor


@pytest.mark.parametrize("way", ["generate_until", "loglikelihood_rolling"])
def test_a_task_without_answers_is_refused(way, tiny_llama):
    model = PrefixHFLM(str(tiny_llama), device="cpu", mismatched_questions=True)
    asked = request(way, "Write.", {}, task="haiku")
    with pytest.raises(ValueError, match="haiku has none: leave the task out"):
        getattr(model, way)([asked])
