"""Models that know nothing: what they answer, and what the harness makes of it."""

from __future__ import annotations

import json
import math
from itertools import chain

import lm_eval
import nltk
import numpy as np
import pytest

from lm_eval_pruned.model_wrappers.floors import RULES, ConstantLM, EchoLM
from lm_eval_pruned.tasks.demo import utils
from tests.helpers.asking import request


def asked(answers, number=0, context="Who?"):
    """Return the requests of a document that offers these answers."""
    return [
        request("loglikelihood", context, f" {each}", place=place, number=number)
        for place, each in enumerate(answers)
    ]


def texts_of(model, prompts, until):
    asked = [request("generate_until", p, {"until": until}) for p in prompts]
    return model.generate_until(asked)


def chosen(rule, documents):
    """Return which answer to each document is the likeliest, by any length it is divided by."""
    found = iter(ConstantLM(loglikelihood=rule).loglikelihood([*chain(*documents)]))
    places = []
    for document in documents:
        likelihoods, greedy = zip(*(next(found) for _ in document), strict=True)
        lengths = np.array([len(each.args[1]) - 1 for each in document])
        place = int(np.argmax(likelihoods))
        assert place == np.argmax(np.array(likelihoods) / lengths)
        assert [*greedy] == [n == place for n in range(len(document))]
        places.append(place)
    return places


@pytest.mark.parametrize(
    ("rule", "place"), [("shortest", 1), ("longest", 2), ("first", 0)]
)
def test_a_rule_chooses_among_answers(rule, place):
    answers = ["two", "a", "longer", "four"]
    assert chosen(rule, [asked(answers)]) == [place]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "first"])
def test_what_a_rule_leaves_open_is_guessed(rule):
    """Within 4 standard deviations of a share of one third."""
    documents = [asked("abc", n, f"Is it {n}?") for n in range(900)]
    shares = np.bincount(chosen(rule, documents)) / 900
    assert shares == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / 900))


def test_without_alternatives_all_bytes_are_alike():
    for each in (asked(["né"]), asked(["né"]) * 2):
        for likelihood, greedy in ConstantLM().loglikelihood(each):
            assert (likelihood, greedy) == (pytest.approx(-4 * math.log(256)), False)


def test_a_text_is_answered_as_it_was_asked():
    """In lm-eval 0.4 as a text, in 0.5 as a continuation of nothing."""
    text, rolling = -3 * math.log(256), request("loglikelihood_rolling", "né")
    for arguments, answer in ((("né",), text), (("", "né"), (text, False))):
        rolling.arguments = arguments
        assert EchoLM().loglikelihood_rolling([rolling]) == [answer]
    assert EchoLM().loglikelihood_rolling([]) == []


@pytest.mark.parametrize(
    ("model", "until", "text"),
    [
        (ConstantLM("the the"), ["\n\n"], "the the"),
        (ConstantLM(7), None, "7"),
        (EchoLM(), [], "Q: Who?\n\nA:"),
        (EchoLM(), "\n\n", "Q: Who?"),
    ],
)
def test_what_is_generated(model, until, text):
    prompt = model.apply_chat_template([{"role": "user", "content": "Q: Who?\n\nA:"}])
    assert texts_of(model, [prompt], until) == [text]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("constant", "loglikelihood=any", "loglikelihood=any .*equal, shortest"),
        ("echo", "loglikelihood=commonest", "one of equal, shortest, longest, first"),
        ("constant", "pretrained=x", "pretrained=x"),
        ("echo", "answer=Yes", "answer=Yes"),
    ],
)
def test_what_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=["x"])


def test_an_answer_without_a_language_is_no_error(caplog):
    """It has no letters, which the harness logs for each of 62 documents of IFEval."""
    lm = ConstantLM(".")
    document = {"key": 1, "prompt": "?", "kwargs": [{"language": "de"}]}
    document["instruction_id_list"] = ["language:response_language"]
    scores = utils._ifeval().process_results(document, texts_of(lm, ["?"], []))
    assert scores["prompt_level_strict_acc"]
    assert not caplog.records


@pytest.mark.slow
def test_the_floor_of_ifeval(shared_data, monkeypatch):
    """As it was published: instructions and prompts by the strict code, and of the first 100."""
    monkeypatch.setattr(nltk.data, "path", [str(shared_data.parent / "nltk_data")])
    from lm_eval.tasks.ifeval.utils import process_results

    file = shared_data / "google" / "IFEval" / "ifeval_input_data.jsonl"
    documents = [*map(json.loads, file.read_text("utf-8").splitlines())]
    found = {}
    for name in ("Yes", ".", "the the"):
        prompts = [each["prompt"] for each in documents]
        texts = texts_of(ConstantLM(name), prompts, [])
        scores = [
            process_results(doc, [text])
            for doc, text in zip(documents, texts, strict=True)
        ]
        instructions = [each["inst_level_strict_acc"] for each in scores]
        prompts = [each["prompt_level_strict_acc"] for each in scores]
        parts = [*chain(*instructions)], prompts, [*chain(*instructions[:100])]
        found[name] = [round(100 * np.mean(part), 1) for part in parts]
    assert found == {
        "Yes": [22.7, 11.3, 23.9],
        ".": [26.6, 15.0, 26.4],
        "the the": [27.2, 14.0, 30.1],
    }
