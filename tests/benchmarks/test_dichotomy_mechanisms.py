"""The two mechanical explanations and the comparison with chance, on constructed answers."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from lm_eval_pruned.results.documents import Documents
from lm_eval_pruned.results.files import read_results_file
from tests.helpers import results_files


@pytest.fixture(scope="module")
def mechanisms(script):
    return script("dichotomy.mechanisms")


@pytest.fixture(scope="module")
def crossed(script):
    return script("dichotomy.crossed")


@pytest.fixture
def checkers(monkeypatch):
    """The harness's checks of IFEval, without the download that importing them starts."""
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("langdetect")
    pytest.importorskip("immutabledict")
    known = set(sys.modules)
    monkeypatch.setattr(nltk.data, "find", lambda *_, **__: None)
    from lm_eval.tasks.ifeval import instructions_registry

    yield instructions_registry.INSTRUCTION_DICT
    for name in set(sys.modules) - known:
        if name.startswith("lm_eval.tasks.ifeval"):
            del sys.modules[name]


LEVEL = np.array([0.2, 0.4, 0.5, 0.6, 0.8] * 20)
BASE = np.random.default_rng(0).uniform(0, 1, 100)


def test_a_move_toward_the_level_is_told_from_what_is_added(mechanisms):
    found = mechanisms.drift(BASE, BASE + 0.5 * (LEVEL - BASE) + 0.1, LEVEL)
    assert found.moved == pytest.approx(0.5)
    assert found.rest == pytest.approx(0.1)
    assert found.explained == pytest.approx(0.5 * (LEVEL - BASE).mean())
    assert found.explained + found.rest == pytest.approx(found.run - found.base)


def test_scores_that_come_closer_to_their_levels_are_found(mechanisms):
    found = mechanisms.drift(BASE, BASE + 0.3 * (LEVEL - BASE), LEVEL)
    assert found.shrinks.difference == pytest.approx(-0.3 * found.distance_base)
    assert found.shrinks.p < 1e-6
    assert found.rest_p > 0.05 or abs(found.rest) < 1e-12


def test_other_opinions_are_forgetting_and_not_equal_likelihood(mechanisms):
    """Scores that have nothing to do with the old ones have a slope near 1, and are not closer."""
    other = np.random.default_rng(1).uniform(0, 1, 100)
    found = mechanisms.drift(BASE, other, LEVEL)
    assert found.moved > 0.6
    assert found.shrinks.p > 0.05


def test_the_rest_keeps_its_level(mechanisms):
    """Where the move is all there is, the rest is found in about one of twenty samples."""
    draw = np.random.default_rng(2)
    found = 0
    for _ in range(400):
        level, base = draw.uniform(0.2, 0.8, 200), draw.uniform(0, 1, 200)
        noise = draw.normal(0, 0.05 + 0.2 * np.abs(level - base))
        run = base + 0.4 * (level - base) + noise
        found += mechanisms.drift(base, run, level).rest_p < 0.05
    assert 0.02 < found / 400 < 0.09


def test_questions_that_are_all_equally_far_have_no_slope(mechanisms):
    with pytest.raises(ValueError, match=r"level - base is 0\.1 for all questions"):
        mechanisms.drift([0.1, 0.1, 0.1], [0.2, 0.2, 0.2], [0.2, 0.2, 0.2])


def mc2_run(folder, values):
    rows = {
        number: {
            **results_files.offering([" a", " bb", " cc", " dd"]),
            "doc": {
                "question": number,
                "mc2_targets": {
                    "choices": ["a", "bb", "cc", "dd"],
                    "labels": [number // 2, 1, number % 2, 0],
                },
            },
        }
        for number in range(len(values))
    }
    spec = {"values": values, "rows": rows}
    tasks = {"truthfulqa_mc2": {"acc,none": spec}}
    return read_results_file(results_files.write_run(folder, tasks))


def test_levels_are_read_from_the_samples(mechanisms, tmp_path):
    base = mc2_run(tmp_path / "base", [0.9, 0.1, 0.8, 0.3])
    run = mc2_run(tmp_path / "run", [0.5, 0.4, 0.5, 0.4])
    found, shortest = mechanisms.drifts_of(base, run).values()
    # One to three of four answers are true, and the shortest is so in the last two questions.
    assert found.level == pytest.approx((0.25 + 0.5 + 0.5 + 0.75) / 4)
    assert shortest.level == 0.5
    assert found.questions == 4
    assert found.distance_base == pytest.approx((0.65 + 0.4 + 0.3 + 0.45) / 4)
    other = results_files.write_run(tmp_path / "other", {"boolq": {"acc,none": [1.0]}})
    assert mechanisms.drifts_of(base, read_results_file(other)) == {}


@pytest.mark.parametrize(
    ("text", "words", "left"),
    [
        ("one,  two\nthree ", 2, "one,  two"),
        ("one two", 2, "one two"),
        ("one two ", 5, "one two "),
        ("one two", 0, ""),
        ("", 0, ""),
    ],
)
def test_answers_are_cut_at_words(mechanisms, text, words, left):
    assert mechanisms.cut_to(text, words) == left


#: Of each kind on the list: arguments, and an answer that satisfies it.
SATISFIED = {
    "punctuation:no_comma": ({}, "Nothing here has one of them. Not even this."),
    "keywords:forbidden_words": ({"forbidden_words": ["never"]}, "We say it at times."),
    "keywords:frequency": (
        {"keyword": "day", "frequency": 3, "relation": "less than"},
        "A day and a day and a night.",
    ),
    "keywords:letter_frequency": (
        {"letter": "z", "let_frequency": 3, "let_relation": "less than"},
        "A zebra and a zoo.",
    ),
    "length_constraints:number_words": (
        {"num_words": 20, "relation": "less than"},
        "These are fewer words than there may be.",
    ),
}


@pytest.mark.parametrize("name", SATISFIED)
def test_a_cut_answer_goes_on_to_satisfy_what_needs_no_length(
    mechanisms, checkers, name
):
    arguments, answer = SATISFIED[name]
    assert mechanisms.shorter_is_enough(name, arguments)
    check = checkers[name](name)
    check.build_description(**arguments)
    words = range(1, len(answer.split()) + 1)
    assert all(check.check_following(mechanisms.cut_to(answer, n)) for n in words)


def test_the_list_holds_kinds_of_the_harness_and_only_with_less_than(
    mechanisms, checkers
):
    assert mechanisms.NEED_NO_LENGTH.keys() <= checkers.keys()
    for name, relation in mechanisms.NEED_NO_LENGTH.items():
        if relation:
            assert not mechanisms.shorter_is_enough(name, {relation: "at least"})
            assert not mechanisms.shorter_is_enough(name, {})
    assert not mechanisms.shorter_is_enough("startend:quotation", {})


def answers(mechanisms, *texts):
    """Answers to a prompt with two instructions: no comma, and the word "end"."""
    doc = {
        "key": 1,
        "prompt": "Say something.",
        "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
        "kwargs": [{}, {"keywords": ["end"]}],
    }
    return [
        mechanisms.Answer(doc, text, mechanisms.followed(doc, text)) for text in texts
    ]


def test_the_harness_scores_an_answer_as_it_does_in_its_task(mechanisms, checkers):
    (one,) = answers(mechanisms, "a, b end")
    assert one.followed == (False, True)
    assert one.words == 3


def test_a_letter_that_the_harness_draws_is_drawn_alike(mechanisms, checkers):
    doc = {
        "key": 1,
        "prompt": "Say something.",
        "instruction_id_list": ["keywords:letter_frequency"],
        "kwargs": [{"letter": "!", "let_frequency": 2, "let_relation": "at least"}],
    }
    text = "one two three four five"
    assert len({mechanisms.followed(doc, text) for _ in range(40)}) == 1


def test_what_length_alone_changes_is_split_from_the_rest(mechanisms, checkers):
    """Cut to two words, no answer has its comma, nor its end; the pruned model says "b b"."""
    base = answers(mechanisms, *["a b c, end"] * 12, *["a b end"] * 3)
    run = answers(mechanisms, *["b b"] * 12, *["b, b end and more of it"] * 3)
    found = mechanisms.split_by_length(base, run)
    whole, enough, others = (found[part] for part in mechanisms.PARTS)
    assert (whole.instructions, enough.instructions, others.instructions) == (
        30,
        15,
        15,
    )
    assert (whole.base, whole.cut, whole.run) == pytest.approx((0.6, 0.6, 0.5))
    assert (enough.base, enough.cut, enough.run) == pytest.approx((0.2, 1.0, 0.8))
    assert (others.base, others.cut, others.run) == pytest.approx((1.0, 0.2, 0.2))
    for split in found.values():
        parts = split.by_length.difference + split.rest.difference
        assert split.total.difference == pytest.approx(parts)
    assert enough.by_length.p < 0.05
    assert enough.rest.difference == pytest.approx(-0.2)
    assert whole.words_base == pytest.approx((12 * 4 + 3 * 3) / 15)
    assert whole.words_run == pytest.approx((12 * 2 + 3 * 7) / 15)


def documents(values, transform="mean", weights=None, clusters=None):
    values = np.asarray(values, dtype=float)
    keys = tuple(("task", str(n), 0) for n in range(len(values)))
    weights = np.ones(len(values)) if weights is None else np.asarray(weights)
    return Documents(keys, values, weights, clusters, transform)


def test_the_interval_over_seeds_and_documents_by_hand(crossed):
    run = documents([1.0, 0.0] * 10)
    controls = [documents([shift] * 20) for shift in (0.2, 0.3, 0.4)]
    found = crossed.over_seeds([run], controls)
    of_documents = 0.25 * 20 / 19 / 20
    of_seeds = 0.01 / 3
    error = (of_documents + of_seeds) ** 0.5
    freedom = (of_documents + of_seeds) ** 2 / (of_documents**2 / 19 + of_seeds**2 / 2)
    from scipy import stats

    assert (found.one, found.other) == pytest.approx((0.5, 0.3))
    assert found.difference == pytest.approx(0.2)
    width = stats.t.ppf(0.975, freedom) * error
    assert (found.low, found.high) == pytest.approx((0.2 - width, 0.2 + width))
    assert found.p == pytest.approx(2 * stats.t.sf(0.2 / error, freedom))


def test_seeds_are_paired_where_both_sides_have_them(crossed):
    """What a seed does to both sides alike is no part of the interval."""
    noise = np.random.default_rng(1).normal(0, 0.1, (6, 30))
    others = [documents(10 * seed + noise[seed]) for seed in range(3)]
    ones = [documents(10 * seed + 1 + noise[3 + seed]) for seed in range(3)]
    paired = crossed.over_seeds(ones, others)
    assert paired.difference == pytest.approx(1, abs=0.1)
    assert paired.other == pytest.approx(10, abs=0.1)
    assert 0.5 < paired.low < paired.difference < paired.high < 1.5
    assert crossed.over_seeds([ones[0]], others).low < -10


def test_the_interval_holds_the_truth_as_often_as_it_says(crossed):
    draw = np.random.default_rng(3)
    held = 0
    for _ in range(400):
        shared = draw.normal(0, 1, 60)
        run = documents(0.5 + shared + draw.normal(0, 0.5, 60))
        controls = [
            documents(shared + draw.normal(0, 0.2) + draw.normal(0, 0.5, 60))
            for _ in range(3)
        ]
        found = crossed.over_seeds([run], controls)
        held += found.low <= 0.5 <= found.high
    assert held / 400 >= 0.93


def test_bits_per_byte_have_the_sign_of_the_score(crossed):
    """Values are mean log-likelihoods; a text that is likelier has fewer bits."""
    weights = np.arange(1.0, 13.0)
    run = documents(np.linspace(-1.1, -0.9, 12), "bits_per_byte", weights)
    controls = [
        documents(np.full(12, each), "bits_per_byte", weights) for each in (-2.0, -2.1)
    ]
    found = crossed.over_seeds([run], controls)
    score = -np.average(run.values, weights=weights) / np.log(2)
    assert found.difference == pytest.approx(score - 2.05 / np.log(2))
    assert found.low < found.difference < found.high < 0


def test_clusters_count_as_one(crossed):
    values = np.repeat(np.arange(12) % 2, 4).astype(float)
    clusters = tuple(str(n // 4) for n in range(48))
    alone = crossed.over_seeds(
        [documents(values)], [documents(np.zeros(48)), documents(np.zeros(48))]
    )
    together = crossed.over_seeds(
        [documents(values, clusters=clusters)],
        [documents(np.zeros(48)), documents(np.zeros(48))],
    )
    assert together.high - together.low > 1.8 * (alone.high - alone.low)


def test_one_seed_gives_a_difference_and_no_interval(crossed):
    found = crossed.over_seeds([documents([1.0] * 20)], [documents([0.0] * 20)])
    assert found.difference == pytest.approx(1)
    assert (found.low, found.p, found.seeds) == (None, None, 1)


def test_what_does_not_vary_gets_no_interval(crossed):
    same = documents([1.0] * 20)
    found = crossed.over_seeds([same], [same, same])
    assert found.difference == pytest.approx(0)
    assert (found.low, found.p) == (None, 1.0)


def test_controls_on_other_documents_are_refused(crossed):
    with pytest.raises(ValueError, match="1 of 2 runs were scored on other documents"):
        crossed.over_seeds([documents([1.0] * 20)], [documents([0.0] * 19)])
    perplexities = documents([-1.0] * 20, "perplexity")
    with pytest.raises(ValueError, match="perplexity is no linear function"):
        crossed.over_seeds([perplexities], [perplexities])
    same = documents([1.0] * 20)
    with pytest.raises(ValueError, match="3 runs stand beside 2"):
        crossed.over_seeds([same] * 3, [same] * 2)
