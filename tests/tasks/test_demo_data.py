"""The demo data: schema, balance, and that every instruction can be kept and broken."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from lm_eval.tasks import _yaml_loader

from lm_eval_pruned import tasks


DEMO = Path(tasks.__file__).parent / "demo"
utils = _yaml_loader._load_module_with_cache((DEMO / "utils.py").resolve())

#: The types that the harness checks with NLTK's punkt_tab, which is a download.
NEED_PUNKT = {
    "change_case:capital_word_frequency",
    "length_constraints:number_sentences",
}

#: By key of the prompt: a reply that follows all its instructions, one that follows none.
REPLIES = {
    1: ("Spring and summer come before autumn and winter.", "Spring, summer, autumn."),
    2: ("it is cold and very soft and it melts.", "Cold, wet and soft."),
    3: (
        "It lets people cross a river.",
        "A bridge, " + "which is long and strong and old, " * 2 + "helps us to cross.",
    ),
    4: (
        "A gardener digs and plants and waters and weeds the beds and cuts grass.",
        "He digs.",
    ),
    5: ("Fish breathe with gills.", "Fish in rivers and in lakes breathe with gills."),
    6: (
        "The room is so silent that I hear dust fall on the shelf beside the window.",
        "It is silent.",
    ),
    7: ("A wave runs up the sand.", "The sea is calm."),
    8: ("A lamp glows in the window.", "Someone is at home."),
    9: ("<<High>>\nThe stone remembers snow.", "A mountain is tall."),
    10: ("First rain and then more rain.", "Nothing but rain."),
    11: ("Tree O tree O tree so green!", "The tree is green."),
    12: ("It lies curled up and purrs.", "Sleep, kitten, sleep."),
    13: ("To keep their clothes dry.", "Rain makes them wet, and rain is wet."),
    14: ("It glows and crackles in the dark.", "It is hot."),
    15: ("it tells people how late it is.", "It shows the time."),
    16: ('{"fruit": "banana", "colour": "yellow"}', "An apple is red."),
    17: ("The zebra dozes in the zoo.", "The horse rests."),
    18: ("Potato and tomato and onion.", "Kale, peas."),
    19: ("A lawn with a rosy wall.", "The green leaves never cease there."),
    20: (
        "Los niños van a la escuela para aprender a leer y a escribir.",
        "They go there to learn how to read and write.",
    ),
    21: (
        "Le long voyage en train traverse des champs, des villages et des forêts.",
        "The long ride takes us through fields and villages.",
    ),
    22: (
        "Ein Bäcker steht früh auf und backt Brot und Kuchen für die Leute.",
        "A baker gets up early and bakes bread for everyone.",
    ),
    23: (
        "Buona notte amico mio e sogni d'oro fino a domani mattina.",
        "Good night, my friend, and sleep well.",
    ),
    24: ("The day is bright.\n***\nThe night is dark.", "Day is bright."),
    25: ("Bread is soft.\n***\nMilk is white.\n***\nSalt is salty.", "Bread is soft."),
    26: ("a cup is tall.\n***\na bowl is wide and flat.", "A cup. A bowl."),
    27: (
        "The key was lost.\n\nLater it was found.",
        "The key was lost.\n\nIt was found.",
    ),
    28: ("Once there was a dragon.\n\nIt slept.", "A dragon slept."),
    29: ("Slice it.\n\nToast it.\n\nFinally eat it.", "Slice it.\n\nToast it."),
    30: ("Happy birthday [name] from [sender]!", "Happy birthday [name]!"),
    31: ("Dear [name], come to tea on [date] at [place].", "Come to tea on [date]."),
    32: (
        "Dear [name], your parcel is here.\nP.S. It is heavy.",
        "Your parcel is here.",
    ),
    33: ("Thank you for the scarf.\nP.S. It is warm.", "Thank you for the scarf."),
    34: ("Please water the plants.\nP.P.S. Not too much.", "Please water the plants."),
    35: ("* A fork\n* A spoon\n* A knife", "* A fork\n* A spoon"),
    36: ("* Wear good shoes\n* Take your time", "Wear good shoes, take your time."),
    37: ("* Cow\n* Pig\n* Hen\n* Goat", "* Cow\n* Pig\n* Hen"),
    38: ("My answer is yes.", "Yes."),
    39: ("My answer is yes.", "It can."),
    40: ("My answer is no.", "No."),
    41: ("The *Pacific*.", "The Pacific."),
    42: ("The *flute* and the *harp*.", "The *flute* and the harp."),
    43: ("Mix *lettuce* and *oil* and *salt*.", "Mix *lettuce*, oil and salt."),
    44: ("Section 1\nPorridge.\nSection 2\nSoup.", "Section 1\nPorridge."),
    45: ("PART 1\nPack the food.\nPART 2\nEat it.", "Pack the food. Eat it."),
    46: ("Day 1: arrive.\nDay 2: swim.\nDay 3: leave.", "Day 1: arrive. Then swim."),
    47: ('{"capital": "Rome"}', "Rome."),
    48: ("[2, 4, 6]", "2, 4, 6"),
    49: ('{"table": "wood"}', "A table of glass."),
    50: ("<<White>>\nSnow fell all night.", "White: snow fell all night."),
    51: ("<<Ride>>\nThe quickest way to work.", "Ride, do not walk."),
    52: ("Wave Dancer\n******\nOld Duck", "Wave Dancer or Old Duck"),
    53: ("Good morning!\n******\nIs this seat free?", "Hello there!"),
    54: ("Bean soup.\n******\nFried rice.", "Bean soup, or fried rice."),
    55: ("Name one metal. Iron.", "Iron."),
    56: ("Which bird can swim but not fly? The penguin.", "The penguin."),
    57: ("Invent a name for a bakery. Crumbs.", "Crumbs, perhaps."),
    58: ("Try chess. That is all for now.", "That is all for now. Try chess."),
    59: ("Keep it in a tin. Enjoy your meal!", "Keep it in a tin."),
    60: (
        "They sing for joy. Now you try it.",
        "They sing because they are glad or sad or in love and want to be heard by all others in the world.",
    ),
    61: ('"I am never late."', "I am never late."),
    62: ('"Slow rivers also reach the sea."', "Slow rivers reach the sea."),
    63: (
        '"Warm and dark and kind."',
        "Coffee is warm and dark and kind and wakes me up every day.",
    ),
    64: ("STAY AWAY FROM THE ROCK BECAUSE IT IS LOOSE.", "Stay away from it."),
    65: ("THE NEW BAKERY IS OPEN AND THE BREAD IS WARM.", "It is open, come in."),
    66: ("GO TEAM GO AND WIN THE RACE FOR ALL OF US!", "Row on, team!"),
}


def questions():
    return list(utils.load_misconceptions()["test"])


def instructions():
    return list(utils.load_instructions()["test"])


def content_words(text: str) -> frozenset[str]:
    common = "a an the of in on at to and or is are was do does did what which how"
    return frozenset(re.findall(r"[a-z0-9]+", text.lower())) - set(common.split())


def similarity(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(1, len(one | other))


# --- questions


def test_there_are_at_least_100_questions_and_none_twice():
    words = [content_words(row["question"]) for row in questions()]
    assert len(words) >= 100
    for index, one in enumerate(words):
        assert all(similarity(one, other) < 0.7 for other in words[:index])


@pytest.mark.parametrize("row", questions(), ids=lambda row: row["question"][:40])
def test_questions_follow_the_schema_of_truthfulqa(row):
    mc1, mc2 = row["mc1_targets"], row["mc2_targets"]
    assert mc1["labels"].count(1) == 1
    assert {0, 1} == set(mc2["labels"])
    for targets in (mc1, mc2):
        assert len(targets["choices"]) == len(targets["labels"])
        assert len({choice.lower() for choice in targets["choices"]}) == len(
            targets["choices"]
        )
        assert all(re.fullmatch(r"\S.*[.!]", choice) for choice in targets["choices"])
    truth = dict(zip(mc2["choices"], mc2["labels"], strict=True))
    assert set(mc1["choices"]) <= set(mc2["choices"])
    assert [truth[choice] for choice in mc1["choices"]] == mc1["labels"]
    assert row["question"].endswith("?")


def test_neither_place_nor_length_tells_the_best_answer():
    rows = [row["mc1_targets"] for row in questions()]
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


def test_questions_are_not_those_of_truthfulqa(shared_data):
    folder = shared_data / "truthfulqa" / "truthful_qa" / "multiple_choice"
    with (folder / "validation.jsonl").open(encoding="utf-8") as lines:
        theirs = [content_words(json.loads(line)["question"]) for line in lines]
    for row in questions():
        ours = content_words(row["question"])
        assert max(similarity(ours, other) for other in theirs) < 0.5, row["question"]


def test_scores_are_those_of_the_stock_tasks():
    pytest.importorskip("sacrebleu", reason="the stock TruthfulQA module imports it")
    pytest.importorskip("rouge_score", reason="the stock TruthfulQA module imports it")
    from lm_eval.tasks.truthfulqa.utils import process_results_mc2

    for seed, row in enumerate(questions()[:20]):
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
    row = questions()[0]
    n = len(row["mc2_targets"]["choices"])
    tied = utils.score_answers(row, [(-5000.0, False)] * n)
    assert tied["mc1"] == 0.0
    assert tied["mc2"] == pytest.approx(sum(row["mc2_targets"]["labels"]) / n)
    broken = utils.score_answers(row, [(math.nan, False)] * n)
    assert broken["mc1"] == 0.0
    assert math.isnan(broken["mc2"])


# --- instructions


def registry():
    """Return the harness's registry without the download that importing it starts."""
    return utils._ifeval().instructions_registry


def test_there_are_at_least_60_prompts_and_none_twice():
    rows = instructions()
    assert len(rows) >= 60
    assert [row["key"] for row in rows] == list(range(1, len(rows) + 1))
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert set(REPLIES) == {row["key"] for row in rows}


def test_every_type_that_needs_no_download_is_used():
    used = {name for row in instructions() for name in row["instruction_id_list"]}
    assert used == set(registry().INSTRUCTION_DICT) - NEED_PUNKT


@pytest.mark.parametrize("row", instructions(), ids=lambda row: f"prompt{row['key']}")
def test_instructions_can_be_followed_and_broken(row):
    assert len(row["kwargs"]) == len(row["instruction_id_list"])
    conflicts = registry().INSTRUCTION_CONFLICTS
    names = row["instruction_id_list"]
    for index, (name, kwargs) in enumerate(zip(names, row["kwargs"], strict=True)):
        instruction = registry().INSTRUCTION_DICT[name](name)
        given = {key: value for key, value in kwargs.items() if value is not None}
        instruction.build_description(**given)
        # Nothing is left to be drawn at random, and nothing is replaced.
        assert set(given) == set(instruction.get_instruction_args_keys())
        if given:
            built = instruction.get_instruction_args()
            assert {key: sorted(value) if isinstance(value, list) else value
                    for key, value in given.items()} == built  # fmt: skip
        assert not any(other in conflicts[name] for other in names[:index])

    good, bad = (
        utils.score_instructions(row, [reply]) for reply in REPLIES[row["key"]]
    )
    assert good["prompt_level_strict_acc"]
    assert all(good["inst_level_strict_acc"])
    assert not any(bad["inst_level_strict_acc"])
    assert not bad["prompt_level_strict_acc"]
    empty = utils.score_instructions(row, [" \n"])
    assert not any(empty["inst_level_loose_acc"])


def test_prompts_state_what_is_checked():
    for row in instructions():
        for kwargs in row["kwargs"]:
            for key in ("keyword", "first_word", "end_phrase", "postscript_marker",
                        "prompt_to_repeat", "section_spliter"):  # fmt: skip
                assert (kwargs[key] or "").lower() in row["prompt"].lower()
            for word in (kwargs["keywords"] or []) + (kwargs["forbidden_words"] or []):
                assert word in row["prompt"]


def test_prompts_are_not_those_of_ifeval(shared_data):
    file = shared_data / "google" / "IFEval" / "ifeval_input_data.jsonl"

    def sequences(text):
        words = re.findall(r"[a-z0-9']+", text.lower())
        return {tuple(words[i : i + 6]) for i in range(len(words) - 5)}

    theirs = set()
    for line in file.read_text(encoding="utf-8").splitlines():
        theirs |= sequences(json.loads(line)["prompt"])
    options = "My answer is yes My answer is no My answer is maybe"
    for row in instructions():
        # The three options are the harness's, word for word.
        shared = sequences(row["prompt"]) & theirs - sequences(options)
        assert not shared, (row["key"], shared)


def test_equal_replies_get_equal_scores():
    row = next(
        row for row in instructions() if "language" in row["instruction_id_list"][0]
    )
    ambiguous = "no me la si"
    scores = [utils.score_instructions(row, [ambiguous]) for _ in range(10)]
    assert all(score == scores[0] for score in scores)


def test_an_answer_without_a_language_is_no_error(caplog):
    """IFEval counts it as followed, and logs it as an error with the whole answer."""
    row = next(
        row for row in instructions() if "language" in row["instruction_id_list"][0]
    )
    log = logging.getLogger("lm_eval.tasks.ifeval.instructions")
    assert utils.score_instructions(row, ["\n\n____"])["prompt_level_strict_acc"]
    assert not caplog.records
    log.error("Unable to detect language for text %s", "of the task ifeval")
    assert len(caplog.records) == 1


def test_other_errors_of_ifeval_are_seen(caplog, monkeypatch):
    log = logging.getLogger("lm_eval.tasks.ifeval.instructions")

    def fail(doc, results):
        log.error("Unable to read %s", results)
        raise RuntimeError

    monkeypatch.setattr(utils._ifeval(), "process_results", fail)
    with pytest.raises(RuntimeError):
        utils.score_instructions(instructions()[0], ["answer"])
    assert "Unable to read" in caplog.text
    assert not log.filters


@pytest.mark.slow
def test_good_replies_fit_into_the_length_that_is_generated(real_model):
    from transformers import AutoTokenizer

    config = _yaml_loader.load_yaml(
        DEMO / "pruned_demo_instruction_following.yaml", resolve_func=False
    )
    limit = config["generation_kwargs"]["max_gen_toks"]
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    lengths = {
        key: len(tokenizer(good).input_ids) for key, (good, _) in REPLIES.items()
    }
    assert max(lengths.values()) <= limit, lengths
