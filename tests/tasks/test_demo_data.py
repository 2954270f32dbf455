"""The demo data: schema, balance, and that every instruction can be kept and broken."""

from __future__ import annotations

import json
import logging
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from lm_eval.tasks import _yaml_loader

from lm_eval_pruned import tasks


DEMO = Path(tasks.__file__).parent / "demo"
utils = _yaml_loader._load_module_with_cache((DEMO / "utils.py").resolve())
#: The harness's registry, without the download that importing it starts.
registry = utils._ifeval().instructions_registry
QUESTIONS = list(utils.load_misconceptions()["test"])
INSTRUCTIONS = list(utils.load_instructions()["test"])

#: The types that the harness checks with NLTK's punkt_tab, which is a download.
NEED_PUNKT = {
    "change_case:capital_word_frequency",
    "length_constraints:number_sentences",
}

#: By key of the prompt: a reply that follows all its instructions.
REPLIES = {
    1: "Spring and summer come before autumn and winter.",
    2: "it is cold and very soft and it melts.",
    3: "It lets people cross a river.",
    4: "A gardener digs and plants and waters and weeds the beds and cuts grass.",
    5: "Fish breathe with gills.",
    6: "The room is so silent that I hear dust fall on the shelf beside the window.",
    7: "A wave runs up the sand.",
    8: "A lamp glows in the window.",
    9: "<<High>>\nThe stone remembers snow.",
    10: "First rain and then more rain.",
    11: "Tree O tree O tree so green!",
    12: "It lies curled up and purrs.",
    13: "To keep their clothes dry.",
    14: "It glows and crackles in the dark.",
    15: "it tells people how late it is.",
    16: '{"fruit": "banana", "colour": "yellow"}',
    17: "The zebra dozes in the zoo.",
    18: "Potato and tomato and onion.",
    19: "A lawn with a rosy wall.",
    20: "Los niños van a la escuela para aprender a leer y a escribir.",
    21: "Le long voyage en train traverse des champs, des villages et des forêts.",
    22: "Ein Bäcker steht früh auf und backt Brot und Kuchen für die Leute.",
    23: "Buona notte amico mio e sogni d'oro fino a domani mattina.",
    24: "The day is bright.\n***\nThe night is dark.",
    25: "Bread is soft.\n***\nMilk is white.\n***\nSalt is salty.",
    26: "a cup is tall.\n***\na bowl is wide and flat.",
    27: "The key was lost.\n\nLater it was found.",
    28: "Once there was a dragon.\n\nIt slept.",
    29: "Slice it.\n\nToast it.\n\nFinally eat it.",
    30: "Happy birthday [name] from [sender]!",
    31: "Dear [name], come to tea on [date] at [place].",
    32: "Dear [name], your parcel is here.\nP.S. It is heavy.",
    33: "Thank you for the scarf.\nP.S. It is warm.",
    34: "Please water the plants.\nP.P.S. Not too much.",
    35: "* A fork\n* A spoon\n* A knife",
    36: "* Wear good shoes\n* Take your time",
    37: "* Cow\n* Pig\n* Hen\n* Goat",
    38: "My answer is yes.",
    39: "My answer is yes.",
    40: "My answer is no.",
    41: "The *Pacific*.",
    42: "The *flute* and the *harp*.",
    43: "Mix *lettuce* and *oil* and *salt*.",
    44: "Section 1\nPorridge.\nSection 2\nSoup.",
    45: "PART 1\nPack the food.\nPART 2\nEat it.",
    46: "Day 1: arrive.\nDay 2: swim.\nDay 3: leave.",
    47: '{"capital": "Rome"}',
    48: "[2, 4, 6]",
    49: '{"table": "wood"}',
    50: "<<White>>\nSnow fell all night.",
    51: "<<Ride>>\nThe quickest way to work.",
    52: "Wave Dancer\n******\nOld Duck",
    53: "Good morning!\n******\nIs this seat free?",
    54: "Bean soup.\n******\nFried rice.",
    55: "Name one metal. Iron.",
    56: "Which bird can swim but not fly? The penguin.",
    57: "Invent a name for a bakery. Crumbs.",
    58: "Try chess. That is all for now.",
    59: "Keep it in a tin. Enjoy your meal!",
    60: "They sing for joy. Now you try it.",
    61: '"I am never late."',
    62: '"Slow rivers also reach the sea."',
    63: '"Warm and dark and kind."',
    64: "STAY AWAY FROM THE ROCK BECAUSE IT IS LOOSE.",
    65: "THE NEW BAKERY IS OPEN AND THE BREAD IS WARM.",
    66: "GO TEAM GO AND WIN THE RACE FOR ALL OF US!",
}


def content_words(text: str) -> frozenset[str]:
    common = "a an the of in on at to and or is are was do does did what which how"
    return frozenset(re.findall(r"[a-z0-9]+", text.lower())) - set(common.split())


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(1, len(one | other))


# --- questions


def test_there_are_at_least_100_questions_and_none_twice():
    words = [content_words(row["question"]) for row in QUESTIONS]
    assert len(words) >= 100
    for index, one in enumerate(words):
        assert all(similarity(one, other) < 0.7 for other in words[:index])


def test_questions_follow_the_schema_of_truthfulqa():
    for row in QUESTIONS:
        mc1, mc2 = row["mc1_targets"], row["mc2_targets"]
        assert mc1["labels"].count(1) == 1
        assert {0, 1} == set(mc2["labels"])
        for targets in (mc1, mc2):
            choices = targets["choices"]
            assert len(choices) == len(targets["labels"])
            assert len({choice.lower() for choice in choices}) == len(choices)
            assert all(re.fullmatch(r"\S.*[.!]", choice) for choice in choices)
        truth = dict(zip(mc2["choices"], mc2["labels"], strict=True))
        assert [truth[choice] for choice in mc1["choices"]] == mc1["labels"]
        assert row["question"].endswith("?")


def test_neither_place_nor_length_tells_the_best_answer():
    rows = [row["mc1_targets"] for row in QUESTIONS]
    places = Counter(row["labels"].index(1) for row in rows)
    assert set(places) == {0, 1, 2, 3}
    # Under a uniform draw of n = 120 the standard deviation of a count is 4.7.
    expected = len(rows) / 4
    sigma = math.sqrt(len(rows) * 0.25 * 0.75)
    assert all(abs(count - expected) < 2 * sigma for count in places.values())
    for extreme in (max, min):
        hits = 0.0
        for row in rows:
            lengths = [len(choice) for choice in row["choices"]]
            best = lengths[row["labels"].index(1)]
            hits += (best == extreme(lengths)) / lengths.count(extreme(lengths))
        assert abs(hits - expected) < 2 * sigma, extreme.__name__


def test_neither_questions_nor_prompts_are_those_of_the_benchmarks(shared_data):
    file = shared_data / "truthfulqa" / "truthful_qa" / "multiple_choice"
    lines = (file / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    theirs = [content_words(json.loads(line)["question"]) for line in lines]
    for row in QUESTIONS:
        ours = content_words(row["question"])
        assert max(similarity(ours, other) for other in theirs) < 0.5, row["question"]

    def sequences(text):
        words = re.findall(r"[a-z0-9']+", text.lower())
        return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}

    file = shared_data / "google" / "IFEval" / "ifeval_input_data.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    known = set().union(*(sequences(json.loads(line)["prompt"]) for line in lines))
    # The three options are the harness's, word for word.
    known -= sequences("My answer is yes My answer is no My answer is maybe")
    for row in INSTRUCTIONS:
        assert not sequences(row["prompt"]) & known, row["key"]


def test_scores_are_those_of_the_stock_tasks():
    pytest.importorskip("sacrebleu", reason="the stock TruthfulQA module imports it")
    pytest.importorskip("rouge_score", reason="the stock TruthfulQA module imports it")
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    for seed, row in enumerate(QUESTIONS[:20]):
        n = len(row["mc2_targets"]["choices"])
        results = [(-1.0 - ((seed * 7 + i * 5) % 11), False) for i in range(n)]
        ours = utils.score_answers(row, results)
        assert ours["mc2"] == pytest.approx(process_results_mc2(row, results)["acc"])
        of_choice = dict(zip(row["mc2_targets"]["choices"], results, strict=True))
        mc1 = [of_choice[choice][0] for choice in row["mc1_targets"]["choices"]]
        if mc1.count(max(mc1)) == 1:
            best = row["mc1_targets"]["labels"].index(1)
            assert ours["mc1"] == float(mc1.index(max(mc1)) == best)


def test_scores_of_extreme_log_likelihoods():
    labels = QUESTIONS[0]["mc2_targets"]["labels"]
    tied = utils.score_answers(QUESTIONS[0], [(-5000.0, False)] * len(labels))
    assert tied == {"mc1": 0.0, "mc2": pytest.approx(sum(labels) / len(labels))}
    broken = utils.score_answers(QUESTIONS[0], [(math.nan, False)] * len(labels))
    assert broken == {"mc1": 0.0, "mc2": pytest.approx(math.nan, nan_ok=True)}


# --- instructions


def test_there_are_at_least_60_prompts_of_every_type_that_needs_no_download():
    assert len({row["prompt"] for row in INSTRUCTIONS}) == len(INSTRUCTIONS) >= 60
    keys = [row["key"] for row in INSTRUCTIONS]
    assert keys == list(range(1, len(keys) + 1)) == list(REPLIES)
    used = {name for row in INSTRUCTIONS for name in row["instruction_id_list"]}
    assert used == set(registry.INSTRUCTION_DICT) - NEED_PUNKT


@pytest.mark.parametrize("row", INSTRUCTIONS, ids=lambda row: f"prompt{row['key']}")
def test_instructions_can_be_followed_and_broken(row):
    names = row["instruction_id_list"]
    for index, (name, kwargs) in enumerate(zip(names, row["kwargs"], strict=True)):
        instruction = registry.INSTRUCTION_DICT[name](name)
        given = {key: value for key, value in kwargs.items() if value is not None}
        instruction.build_description(**given)
        # Nothing is left to be drawn at random, and nothing is replaced.
        assert set(given) == set(instruction.get_instruction_args_keys())
        if given:
            given = {
                k: sorted(v) if isinstance(v, list) else v for k, v in given.items()
            }
            assert instruction.get_instruction_args() == given
        conflicts = registry.INSTRUCTION_CONFLICTS[name]
        assert not any(other in conflicts for other in names[:index])
        prompt = row["prompt"].lower()
        for key in ("keyword", "first_word", "end_phrase", "postscript_marker"):
            assert (kwargs[key] or "").lower() in prompt
        for key in ("prompt_to_repeat", "section_spliter"):
            assert (kwargs[key] or "").lower() in prompt
        for word in (kwargs["keywords"] or []) + (kwargs["forbidden_words"] or []):
            assert word in row["prompt"]

    def followed(reply, way="strict"):
        return utils.score_instructions(row, [reply])[f"inst_level_{way}_acc"]

    good = utils.score_instructions(row, [REPLIES[row["key"]]])
    assert good["prompt_level_strict_acc"] and all(good["inst_level_strict_acc"])
    assert not any(followed(" \n", "loose"))
    # What follows other prompts breaks this one; so does the prompt, or a long text.
    others = [*REPLIES.values(), row["prompt"], " ".join(REPLIES.values())]
    assert all(
        map(
            any, zip(*([not each for each in followed(o)] for o in others), strict=True)
        )
    )


@pytest.fixture
def about_a_language():
    return next(
        row for row in INSTRUCTIONS if "language" in row["instruction_id_list"][0]
    )


def test_equal_replies_get_equal_scores(about_a_language):
    first, *others = (
        utils.score_instructions(about_a_language, ["no me la si"]) for _ in range(10)
    )
    assert all(other == first for other in others)


def test_an_answer_without_a_language_is_no_error_and_others_are(
    about_a_language, caplog, monkeypatch
):
    """IFEval counts it as followed, and logs it as an error with the whole answer."""
    log = logging.getLogger("lm_eval.tasks.ifeval.instructions")
    score = utils.score_instructions(about_a_language, ["\n\n____"])
    assert score["prompt_level_strict_acc"]
    assert not caplog.records

    def fail(doc, results):
        log.error("Unable to read %s", results)
        raise RuntimeError

    monkeypatch.setattr(utils._ifeval(), "process_results", fail)
    with pytest.raises(RuntimeError):
        utils.score_instructions(about_a_language, ["answer"])
    assert "Unable to read" in caplog.text
    assert not log.filters


@pytest.mark.parametrize(
    "items",
    [
        [[True, False], [True], [False, True, True]],
        [True, False, True, False, True, True],
        # The harness's branch for 0.5 hands on a list of one value as that value.
        [[True, False], True, [False, True, True]],
    ],
    ids=["by prompt", "flattened", "partly flattened"],
)
def test_the_mean_over_instructions_takes_what_the_harness_hands_on(items):
    assert utils.mean_over_instructions(items) == 4 / 6


def test_the_mean_over_instructions_is_the_harness_s():
    draw = random.Random(0)
    for _ in range(20):
        items = [
            [draw.random() < 0.4 for _ in range(draw.randint(1, 3))]
            for _ in range(draw.randint(1, 99))
        ]
        theirs = utils._ifeval().agg_inst_level_acc(items)
        assert utils.mean_over_instructions(items) == theirs


@pytest.mark.slow
def test_good_replies_fit_into_the_length_that_is_generated(real_model):
    from transformers import AutoTokenizer

    config = _yaml_loader.load_yaml(
        DEMO / "pruned_demo_instruction_following.yaml", resolve_func=False
    )
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    longest = max(len(tokenizer(good).input_ids) for good in REPLIES.values())
    assert longest <= config["generation_kwargs"]["max_gen_toks"]
