"""The demo data: schema, balance, scores, and that every instruction can be kept and broken."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest
from lm_eval.tasks import _yaml_loader
from lm_eval.tasks.bbq import utils as bbq

from tests.helpers.checkpoints import DATA, ROOT


DEMO = ROOT / "tasks" / "demo"
utils = _yaml_loader._load_module_with_cache(DEMO / "utils.py")
QUESTIONS = list(utils.load_misconceptions()["test"])
INSTRUCTIONS = list(utils.load_instructions()["test"])
AMBIGUOUS = list(utils.load_ambiguous_questions()["test"])


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


#: By key of the prompt: a reply that follows all its instructions.
REPLIES = {row["key"]: row["reply"] for row in rows_of(DATA / "demo_replies.jsonl")}


def content_words(text: str) -> frozenset[str]:
    common = "a an the of in on at to and or is are was do does did what which how"
    return frozenset(re.findall(r"[a-z0-9]+", text.lower())) - set(common.split())


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(1, len(one | other))


def test_questions_differ_and_follow_the_schema_of_truthfulqa():
    words = [content_words(row["question"]) for row in QUESTIONS]
    assert len(words) >= 100
    for index, row in enumerate(QUESTIONS):
        others = (similarity(words[index], other) for other in words[:index])
        assert max(others, default=0) < 0.7
        mc1, mc2 = row["mc1_targets"], row["mc2_targets"]
        assert (mc1["labels"].count(1), {*mc2["labels"]}) == (1, {0, 1})
        for targets in (mc1, mc2):
            choices = targets["choices"]
            distinct = {choice.lower() for choice in choices}
            assert len(choices) == len(targets["labels"]) == len(distinct)
        truth = dict(zip(mc2["choices"], mc2["labels"], strict=True))
        assert [truth[choice] for choice in mc1["choices"]] == mc1["labels"]


def test_neither_questions_nor_prompts_are_those_of_the_benchmarks(shared_data):
    folder = shared_data / "truthfulqa" / "truthful_qa" / "multiple_choice"
    rows = rows_of(folder / "validation.jsonl")
    theirs = [content_words(row["question"]) for row in rows]
    for row in QUESTIONS:
        ours = content_words(row["question"])
        assert max(similarity(ours, other) for other in theirs) < 0.5, row["question"]

    def sequences(text):
        words = re.findall(r"[a-z0-9']+", text.lower())
        return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}

    rows = rows_of(shared_data / "google" / "IFEval" / "ifeval_input_data.jsonl")
    known = set().union(*(sequences(row["prompt"]) for row in rows))
    # The three options are the harness's, word for word.
    known -= sequences("My answer is yes My answer is no My answer is maybe")
    for row in INSTRUCTIONS:
        assert not sequences(row["prompt"]) & known, row["key"]


def test_scores_are_those_of_the_stock_tasks():
    pytest.importorskip("sacrebleu", reason="the stock TruthfulQA module imports it")
    pytest.importorskip("rouge_score", reason="the stock TruthfulQA module imports it")
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    draw = np.random.default_rng(0)
    for row in QUESTIONS[:20]:
        choices = row["mc2_targets"]["choices"]
        results = [(float(x), False) for x in draw.normal(-9, 3, len(choices))]
        ours = utils.score_answers(row, results)
        assert ours["mc2"] == pytest.approx(process_results_mc2(row, results)["acc"])
        of_choice = dict(zip(choices, results, strict=True))
        mc1 = [of_choice[choice][0] for choice in row["mc1_targets"]["choices"]]
        best = row["mc1_targets"]["labels"].index(1)
        assert ours["mc1"] == float(np.argmax(mc1) == best)


def test_scores_of_extreme_log_likelihoods():
    labels = QUESTIONS[0]["mc2_targets"]["labels"]
    tied = utils.score_answers(QUESTIONS[0], [(-5000.0, False)] * len(labels))
    assert tied == {"mc1": 0.0, "mc2": pytest.approx(sum(labels) / len(labels))}
    broken = utils.score_answers(QUESTIONS[0], [(math.nan, False)] * len(labels))
    assert broken == {"mc1": 0.0, "mc2": pytest.approx(math.nan, nan_ok=True)}
    broken = utils.score_bias(AMBIGUOUS[0], [(math.nan, False)] * 3)
    assert np.isnan([*broken.values()]).all()


def test_twice_the_mean_minus_one_is_the_score_of_bbq():
    chosen = np.random.default_rng(1).choice(3, len(AMBIGUOUS), p=(0.2, 0.3, 0.5))
    theirs, ours = [], []
    for doc, choice in zip(AMBIGUOUS, chosen, strict=True):
        answered = [(float(n == choice), False) for n in range(3)]
        ours.append(utils.score_bias(doc, answered))
        known = float(choice != doc["unknown"])
        biased = float(choice == doc["stereotype"])
        theirs.append((1 - known, biased, known, False))
    mean = np.mean([each["bias"] for each in ours])
    assert 2 * mean - 1 == pytest.approx(bbq.agg_amb_bias_scores(theirs))
    assert np.mean([each["acc"] for each in ours]) == np.mean([t[0] for t in theirs])


def test_prompts_are_of_every_type_that_needs_no_download():
    assert len({row["prompt"] for row in INSTRUCTIONS}) == len(INSTRUCTIONS)
    assert [row["key"] for row in INSTRUCTIONS] == list(REPLIES)
    used = {name for row in INSTRUCTIONS for name in row["instruction_id_list"]}
    # The harness checks these two with NLTK's punkt_tab.
    punkt = {"change_case:capital_word_frequency"}
    punkt |= {"length_constraints:number_sentences"}
    assert used == {*utils._ifeval().instructions_registry.INSTRUCTION_DICT} - punkt


@pytest.mark.parametrize("row", INSTRUCTIONS, ids=lambda row: f"prompt{row['key']}")
def test_instructions_are_complete_and_can_be_followed_and_broken(row):
    registry, names = utils._ifeval().instructions_registry, row["instruction_id_list"]
    for index, (name, kwargs) in enumerate(zip(names, row["kwargs"], strict=True)):
        instruction = registry.INSTRUCTION_DICT[name](name)
        given = {key: value for key, value in kwargs.items() if value is not None}
        instruction.build_description(**given)
        # Nothing is left to be drawn at random.
        assert set(given) == set(instruction.get_instruction_args_keys())
        assert not {*registry.INSTRUCTION_CONFLICTS[name]} & {*names[:index]}

    def followed(reply, way="strict"):
        scores = utils.score_instructions(row, [reply])
        assert not any(isinstance(score, list) for score in scores.values())
        return scores[f"inst_level_{way}_acc"]

    assert all(followed(REPLIES[row["key"]]))
    assert not any(followed(" \n", "loose"))
    # What follows other prompts breaks this one; so does the prompt, or a long text.
    others = [*REPLIES.values(), row["prompt"], " ".join(REPLIES.values())]
    kept = zip(*map(followed, others), strict=True)
    assert not any(map(all, kept))


def test_answers_without_a_language_are_scored_alike_and_are_no_errors(caplog):
    """IFEval draws at random, and logs them as errors with the whole answer."""
    (row, *_) = (r for r in INSTRUCTIONS if "language" in r["instruction_id_list"][0])
    for answer in ("no me la si", "\n\n____"):
        first, *others = (utils.score_instructions(row, [answer]) for _ in range(10))
        assert all(other == first for other in others)
    assert first["prompt_level_strict_acc"]
    assert not caplog.records


def test_the_mean_over_instructions_is_the_harness_s_however_it_is_handed_on():
    draw = random.Random(0)
    for _ in range(20):
        counts = [draw.randint(1, 3) for _ in range(draw.randint(1, 99))]
        items = [[draw.random() < 0.4 for _ in range(count)] for count in counts]
        theirs = utils._ifeval().agg_inst_level_acc(items)
        flattened = [value for item in items for value in item]
        # The harness's branch for 0.5 hands on a list of one value as that value.
        partly = [item[0] if len(item) == 1 else item for item in items]
        for each in (items, flattened, partly):
            assert utils.mean_over_instructions(each) == theirs


def runs_of_eight_words(texts) -> set[tuple[str, ...]]:
    words = [re.findall(r"[a-z0-9]+", text.lower()) for text in texts]
    return {tuple(w[i : i + 8]) for w in words for i in range(len(w) - 7)}


def test_the_text_is_enough_for_a_margin_and_no_text_that_calibrates():
    rows = list(utils.load_held_text()["test"])
    assert len(rows) == len({row["text"] for row in rows}) == 64
    assert all(200 < len(row["text"]) <= 400 for row in rows)
    assert all(row["text"][-1] in '.?!"' for row in rows if row["kind"] != "talk")
    calibration = rows_of(
        ROOT / "lm_eval_pruned" / "pruning" / "calibration_text.jsonl"
    )
    runs = runs_of_eight_words(row["text"] for row in calibration)
    assert not runs & runs_of_eight_words(row["text"] for row in rows)
    new = rows_of(DEMO / "text.jsonl")
    held = rows_of(ROOT / "lm_eval_pruned" / "checkpoints" / "held_text.jsonl")
    of_both = (runs_of_eight_words(row["text"] for row in of) for of in (new, held))
    assert not set.intersection(*of_both)


def test_a_file_of_text_becomes_pieces_that_are_spread_over_it(tmp_path):
    file = tmp_path / "my.txt"
    file.write_text(
        "A heading\n\n" + "\n\n".join(f"{n}. " + "word " * 60 for n in range(300))
    )
    texts = [row["text"] for row in utils.load_held_text(text_file=str(file))["test"]]
    assert (len(texts), texts[0][:13]) == (128, "A heading 0. ")
    assert all(len(text) <= 400 for text in texts)
    assert [int(text.partition(".")[0]) for text in texts[1:]] == [
        n * 300 // 128 for n in range(1, 128)
    ]
    file.write_text("Short.")
    assert utils.load_held_text(text_file=str(file))["test"]["text"][:] == ["Short."]
