"""Single documents: how they make up a score, what was asked and what was answered."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from lm_eval_pruned.results.documents import TRANSFORMS, Documents, documents_of
from lm_eval_pruned.results.files import ResultsError
from lm_eval_pruned.results.lines import read_sample
from lm_eval_pruned.results.runs import read_run
from lm_eval_pruned.results.samples import Samples
from tests.helpers.results_files import answered, offering, score_of, write_run


GAMMA = np.random.default_rng(0).gamma(9, size=12)
PAIRS = [[-float(v), int(w)] for v, w in zip(GAMMA, range(1, 13), strict=True)]


def written(folder, metrics, task="t"):
    """Write one task and return its documents by metric."""
    run = read_run(write_run(folder, {task: metrics}))
    return [documents_of(run, task, metric) for metric in metrics]


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
    # An aggregation that is not a mean is not guessed.
    f1 = {"values": [1.0] * len(values), "score": 0.31}
    spec = {"m,none": {"values": values, "aggregation": aggregation}, "f1,none": f1}
    made, other = written(tmp_path, spec)
    mean = np.average(made.values, weights=made.weights)
    assert (made.transform, other) == (transform, None)
    assert TRANSFORMS[transform].score(mean) == pytest.approx(
        score_of(values, aggregation)
    )


def test_each_filter_has_its_own_documents(tmp_path):
    values = {"em,strict": [0.0, 0.0, 1.0], "em,flexible": [1.0, 0.0, 1.0]}
    found = written(tmp_path, values)
    assert [each.values.tolist() for each in found] == [*values.values()]


def test_repeated_documents_are_told_apart_and_texts_are_clusters(tmp_path):
    docs = {n: {"narrative": f"story {n // 2}", "question": n // 4} for n in range(8)}
    acc = {"acc,none": {"values": [1, 0] * 4, "docs": docs}}
    (found,) = written(tmp_path, acc, "musr_x")
    assert (len(set(found.keys)), found.groups["strata"]) == (8, None)
    assert found.clusters == tuple(np.repeat(found.clusters[::2], 2))
    assert len(set(found.clusters)) == 4


def last(**change):
    """Return a function that changes the last line of samples."""

    def changed(text):
        *lines, row = text.splitlines(keepends=True)
        return b"".join([*lines, json.dumps(json.loads(row) | change).encode()])

    return changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-20], "line 3: not complete JSON"),
        (lambda text: b"".join(text.splitlines(True)[:2]), "holds 2 documents.*says 3"),
        (lambda text: b"\xff\xfe", "line 1: not complete JSON"),
        (lambda text: text * 2, r"line 4, is damaged .an earlier line"),
        (last(doc_id="7"), "line 3, is damaged .doc_id is '7', not a whole number"),
        (last(doc_id=None), "doc_id is None, not a whole number"),
        (last(doc_id=0), "an earlier line has doc_id 0, too"),
        (last(filter=[1]), r"filter is \[1\], not a text"),
        (last(doc_hash=3), "doc_hash is 3, not a text"),
        (last(acc=10**400), "a number of 401 digits"),
        (last(doc={"mc2_targets": {"choices": ["a", "b"]}}), "labels"),
    ],
)
def test_damaged_samples_are_refused_in_a_sentence(tmp_path, change, words):
    rows = dict.fromkeys(range(3), offering("ab"))
    acc = {"acc,none": {"values": [1.0, 0.0, 1.0], "rows": rows}}
    run = read_run(write_run(tmp_path, {"tf": acc}))
    file = run.samples["tf"]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ResultsError, match=words) as caught:
        documents_of(run, "tf", "acc,none")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("weighted", [True, False])
def test_members_of_a_group_are_strata_and_count_as_its_score_does(tmp_path, weighted):
    values = {"two": [1.0, 0.0, 0.0], "four": [1.0] * 9}
    rows = {"two": offering("ab"), "four": offering("abcd")}
    tasks = {
        task: {"acc,none": {"values": of, "rows": dict.fromkeys(range(9), rows[task])}}
        for task, of in values.items()
    }
    score = 10 / 12 if weighted else (1 / 3 + 1) / 2
    groups = {"all": ["half", "four"], "half": ["two"]}
    scores = {"all": {"acc,none": score, "acc_stderr,none": "N/A"}}
    file = write_run(tmp_path, tasks, groups=groups, group_scores=scores)
    run = read_run(file)
    assert run.tasks(subtasks=False) == ["all"]
    found = documents_of(run, "all", "acc,none")
    assert np.average(found.values, weights=found.weights) == pytest.approx(score)
    assert (found.clusters, set(found.groups["strata"])) == (None, {"two", "four"})
    chance = (3 * 0.5 + 9 * 0.25) / 12 if weighted else (0.5 + 0.25) / 2
    assert found.levels == {"chance": pytest.approx(chance)}
    run.samples["two"].unlink()
    assert documents_of(read_run(file), "all", "acc,none") is None


def test_documents_in_another_order_keep_what_belongs_to_each():
    keys = tuple(("task", name, 0) for name in "abc")
    documents = Documents(keys, np.arange(3.0), np.arange(1.0, 4), tuple("xyz"), "mean")
    turned = documents.taken(keys[::-1])
    assert (turned.keys, turned.clusters) == (keys[::-1], tuple("zyx"))
    assert (turned.values.tolist(), turned.weights.tolist()) == ([2, 1, 0], [3, 2, 1])
    assert documents.taken(keys[1:]).keys == keys[1:]


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
        # Lines of another form are read as far as they go.
        ({"arguments": {}, "doc_id": {"a": 1}, "target": ["x", None]}, None, None),
        ({"filtered_resps": [["a"], {"d": []}], "resps": [[[]]]}, None, None),
    ],
)
def test_chance_and_the_right_choice(row, chance, right):
    asked = read_sample(row).question
    assert (asked.chance, asked.right) == (chance, right)
    assert bool(asked.choices) == (chance is not None)


@pytest.mark.parametrize(
    ("metric", "chance"), [("mc1,none", 0.5), ("mc2,none", 0.75), ("f1,none", None)]
)
def test_guessing_beats_false_answers_in_mc1_and_draws_true_ones_in_mc2(
    tmp_path, metric, chance
):
    row = offering([" a", " c", " b", " d"]) | {"doc": DOC}
    scored = {metric: {"values": [1.0] * 4, "rows": dict.fromkeys(range(4), row)}}
    run = read_run(write_run(tmp_path, {"demo": scored}))
    assert documents_of(run, "demo", metric).levels.get("chance") == chance


def test_majority_is_known_where_all_documents_offer_the_same(tmp_path):
    (found,) = written(tmp_path, answered([1] * 40, [1, 1, 0, 1] * 10))
    assert found.levels == {"chance": 0.5, "commonest answer": 0.75}
    # Of four documents, three have the same answer by luck.
    (found,) = written(tmp_path, answered([1] * 4, [1, 1, 0, 1]), "few")
    assert found.levels == {"chance": 0.5}
    # Position 0 is always right, which no model can see.
    rows = {n: offering([f"right {n}", "wrong"]) for n in range(4)}
    acc = {"acc,none": {"values": [1.0] * 4, "rows": rows}}
    (found,) = written(tmp_path, acc, "other")
    assert found.levels == {"chance": 0.5}


def test_prompt_and_target():
    row = offering([" yes", " no"], 1) | {"doc_id": 7, "doc_hash": "abc"}
    asked = read_sample(row).question
    assert (asked.number, asked.key[1], asked.prompt) == ("7", "abc", "the question")
    assert (asked.choices, asked.target) == ((" yes", " no"), "no")
    row = {"doc": {"instruction_id_list": ["punctuation:no_comma"]}, "target": "0"}
    assert read_sample(row).question.target == "['punctuation:no_comma']"
    # The choices of Winogrande stand in the prompt.
    of = {n: {"arg_0": f"A fox or {n}", "arg_1": " ran."} for n in ("Ann", "Bob")}
    asked = read_sample({"arguments": of}).question
    assert (asked.prompt, asked.choices) == ("A fox or ", ("Ann ran.", "Bob ran."))


def answer(sample):
    """Return a function from a metric to the answer that it judges of one line."""
    return lambda metric: Samples.of(*zip(sample)).answers(metric)[0]


@pytest.mark.parametrize(
    ("endings", "likelihoods", "more", "answers"),
    [
        ([" yes", " no"], [-3, -1], {}, ["no", "no", "no"]),
        # -2 / 1 < -5 / 3 by letters, without the space; the sign of the euro has three bytes.
        ([" \u20ac", " abc"], [-2, -5], {}, ["\u20ac", "abc", "\u20ac"]),
        ([" b", " \u20ac\u20ac"], [-1, -3], {}, ["b", "b", "\u20ac\u20ac"]),
        ([" a", " b"] * 2, [-2, -1, -1, -4], {"acc_mutual_info": 0}, ["b"] * 3),
        ([" ran"], [-2.5], {}, [None] * 3),
        ([" a", " bcd"], ["nan", "-inf"], {}, ["a"] * 3),
        ([" a", " b"], [-1], {}, [None] * 3),
    ],
)
def test_the_most_likely_choice_is_the_answer(endings, likelihoods, more, answers):
    sample = read_sample(offering(endings, likelihoods=likelihoods) | more)
    metrics = ("acc,none", "acc_norm,none", "acc_bytes,none")
    assert [*map(answer(sample), metrics)] == answers


def test_of_mc1_the_answer_is_the_likeliest_of_its_choices_and_the_target_its_best():
    """MC2 offers a second true answer, d, which is the likeliest of all and not among MC1's choices."""
    row = offering([" a", " c", " b", " d"], likelihoods=[-3, -4, -2, -1])
    sample = read_sample({**row, "doc": DOC, "target": 0})
    assert [*map(answer(sample), ["mc1,none", "mc2,none"])] == ["b", "d"]
    assert sample.question.target == "a"


def test_text_after_the_filter_and_before():
    row = {"resps": [["It is 4."]], "filtered_resps": ["4"]}
    sample = read_sample(offering([{"until": ["\n"]}]) | row)
    assert (answer(sample)("exact_match,none"), sample.text) == ("4", "It is 4.")
    assert sample.question.prompt == "the question"


def test_runs_that_were_asked_alike_share_questions_and_no_more(tmp_path):
    """The harness writes first what was asked; a line in another order says the same."""
    first = ("doc_id", "doc", "target", "arguments", "resps")
    found = []
    for name, picks in (("base", [0, 1, 1]), ("run", [1, 1, 0]), ("sorted", [1, 1, 0])):
        tasks = {"quiz": answered(picks, [0, 1, 0])}
        if name != "base":
            # The second document is another one, whatever it is called; the third hides a field.
            rows = tasks["quiz"]["acc,none"]["rows"]
            rows[1]["arguments"] = offering([" no", " never"])["arguments"]
            rows[2]["doc"] = {"a": {"x": 1, "resps": [], "target": 2}}
        run = read_run(write_run(tmp_path / name, tasks))
        file = run.samples["quiz"]
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        if name != "sorted":
            lines = [{key: row[key] for key in first} | row for row in lines]
        file.write_text("".join(json.dumps(row) + "\n" for row in lines), "utf-8")
        found.append(documents_of(run, "quiz", "acc,none"))
    base, run, other = (documents.samples for documents in found)
    shared = [a is b for a, b in zip(base.questions, run.questions, strict=True)]
    assert shared == [True, False, False]
    assert (
        run.answers("acc,none") == other.answers("acc,none") == ["yes", "never", "no"]
    )
    for one, two in zip(run.questions, other.questions, strict=True):
        assert dataclasses.asdict(one) == dataclasses.asdict(two)
    assert found[1].keys == found[2].keys
    assert found[1].values.tolist() == found[2].values.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("endings", "answers"),
    [
        ([" a", " b"], [["-1.0", "False"], ["-2.0", "True"]]),
        ([{"until": []}], ["An answer."]),
    ],
)
def test_answers_in_lists_of_repetitions_are_the_same(endings, answers):
    """As lm-eval 0.5 writes them."""
    arguments = {
        f"gen_args_{n}": {"arg_0": "Q", "arg_1": ending}
        for n, ending in enumerate(endings)
    }
    row = {"arguments": arguments, "target": "0", "resps": [answers]}
    old, new = (
        read_sample(row | {"filtered_resps": found})
        for found in (answers, [[answer] for answer in answers])
    )
    # Questions are the same where they are one object.
    assert old[1:] == new[1:]
    assert old.likelihoods or old.written == "An answer."
