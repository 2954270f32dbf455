"""What docs/reading-results.md promises."""

from __future__ import annotations

import json
import re

import pytest

from tests.contract.commands import pruned
from tests.helpers.results_files import answered, offering, write_sweep, written


WORD = "sesame"
CHOICES = tuple(f" {WORD} {number}" for number in range(3))
#: Which choices are right, and which two models pick.
RIGHT, BEFORE, AFTER = [0, 1, 2, 0, 1], [0, 1, 0, 2, 1], [0, 0, 1, 0, 1]


PROMPT = "The start of the prompt. " + "shot " * 999 + "The end of it?"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep whose pruned model answers other questions correctly, and as many."""

    def tasks(picks, end):
        # The short answer is the likelier one in both runs, and letter by letter only in one.
        even = [[-6.0, -8.0], [-6.0, -30.0]][end == "b"]
        rows = {0: offering((" no", " perhaps"), likelihoods=even, prompt=PROMPT)}
        return {
            "longer": {"acc_norm,none": {"values": [float(end == "b")], "rows": rows}},
            "quiz": answered(picks, RIGHT, CHOICES),
            "free": written([f"{WORD} {end}"] * 2, [1, 1]),
            "unknown": {"acc,none": [*map(float, map(int.__eq__, picks, RIGHT))]},
            "mass": {"acc,none": [0.25 + pick / 8 for pick in picks]},
            "low": {"toxic,none": {"values": [0, 1], "higher_is_better": False}},
            "both": {"f1,none": [0.2, 0.5], "em,none": [1.0, float(end == "b")]},
        }

    folder = tmp_path_factory.mktemp("sweep")
    sizes = {"baseline": (0, tasks(BEFORE, "a")), "p40": (40, tasks(AFTER, "b"))}
    return write_sweep(folder, sizes | {"p60": (60, {})}, p60="quiz")


@pytest.fixture(scope="module")
def reported(sweep, tmp_path_factory):
    """Write the report with these options, once, and return its folder."""
    pytest.importorskip("altair", reason="a report needs the extra `report`")
    folders = {}

    def reported(*words):
        if words not in folders:
            folders[words] = tmp_path_factory.mktemp("report")
            done = pruned("report", sweep, "--output_path", folders[words], *words)
            assert done.code == 0, done.err
        return folders[words]

    return reported


def test_the_same_score_is_not_the_same_answers(reported):
    told = (reported() / "report.md").read_text("utf-8")
    # Documents, right to wrong, wrong to right, and changed: a wrong answer that stays wrong, too.
    assert "|quiz|acc,none|5|1|1|60%|" in told
    # Two texts that differ in a word have changed, and stay right.
    assert "|free|prompt_level_strict_acc,none|2|0|0|100%|" in told


def test_the_answer_of_acc_norm_is_the_choice_with_the_highest_likelihood_by_length(
    reported,
):
    """-8 for `perhaps` is more than -6 for `no`, and -30 is less."""
    told = (reported() / "report.md").read_text("utf-8")
    assert "|longer|acc_norm,none|1|0|1|100%|" in told


def test_the_page_of_flips_shows_the_end_of_the_prompt_the_choices_and_both_answers(
    reported,
):
    page = (reported() / "flips.html").read_text("utf-8")
    (row,) = (r for r in page.split("<tr>") if "<br>longer<br>" in r)
    assert PROMPT[-1000:] in row and PROMPT[:1000] not in row
    texts = [text.strip() for text in re.sub(r"<[^>]*>", "|", row).split("|")]
    shown = [text for text in texts if text in ("0", "no", "perhaps")]
    choices, expected, answers = ["no", "perhaps"], ["no"], ["perhaps", "no"]
    assert shown == choices + expected + answers


def test_flips_jsonl_has_all_changes_with_the_whole_answers(reported):
    lines = (reported() / "flips.jsonl").read_text("utf-8").splitlines()
    rows = [*map(json.loads, lines)]
    (row,) = (row for row in rows if row["task"] == "longer")
    assert (row["before"], row["after"], row["target"]) == ("perhaps", "no", "no")
    assert len(rows) == (reported() / "flips.html").read_text("utf-8").count("<tr>") - 1


def test_a_dash_means_that_the_samples_do_not_show_the_answer(reported):
    told = (reported() / "report.md").read_text("utf-8")
    assert "|unknown|acc,none|5|1|1|-|" in told


def test_tasks_without_right_and_wrong_have_no_flips(reported):
    told = (reported() / "report.md").read_text("utf-8")
    assert "|mass|acc,none|5|" not in told
    assert ": low, mass." in told
    # Of two metrics, the one that counts each document as 0 or 1 says it.
    assert "|both|em,none|2|0|1|-|" in told


def test_the_page_of_flips_lists_first_what_turned_wrong(reported):
    page = (reported() / "flips.html").read_text("utf-8")
    body = page.partition("<tbody>")[2]
    kinds = ("right to wrong", "wrong to right", "another")
    places = [body.index(kind) for kind in kinds]
    assert places == sorted(places)
    assert body.rindex(kinds[0]) < places[1]


def test_the_page_of_flips_filters_them_by_words(reported, browser):
    """A row stays that holds each word, whatever its case."""
    browser.open(reported() / "flips.html")
    shown = (
        "[...document.querySelectorAll('tbody tr')].filter((row) => !row.hidden).length"
    )
    every = {"": 9, "QUIZ": 3, "right quiz wrong": 2, "sesame free": 2, "owl": 0}
    for words, rows in every.items():
        browser.choose("input", words)
        assert browser.run(shown) == rows, words
        assert browser.run("document.querySelector('output').textContent") == str(rows)


def test_a_report_without_texts_names_documents_by_id_and_hash(reported, sweep):
    assert WORD in (reported() / "flips.html").read_text("utf-8")
    folder = reported("--no_texts")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if WORD.encode() in path.read_bytes()]
    assert "|quiz|acc,none|5|1|1|60%|" in (folder / "report.md").read_text("utf-8")
    assert [*folder.glob("plots/*")]
    # Messages of failed units remain.
    assert "out of memory" in (folder / "report.md").read_text("utf-8")
    (samples,) = sweep.glob("units/baseline/quiz/samples_*.jsonl")
    digest = json.loads(samples.read_text().splitlines()[1])["doc_hash"]
    page = (folder / "flips.html").read_text("utf-8")
    assert "document 1" in page and digest[:16] in page


def test_compare_and_report_show_the_floor_of_each_score(sweep, reported):
    done = pruned("compare", sweep)
    assert done.code == 0, done.err
    (row,) = [
        row
        for row in done.out.splitlines()
        if row.startswith("|p40") and "|quiz" in row
    ]
    # Of three choices: that one is right in 2 of 5 documents may be luck.
    assert "|0.3333|" in row
    assert "0.333" in (reported() / "report.md").read_text("utf-8")
