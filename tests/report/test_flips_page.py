"""The page of changed answers in a browser: few rows in the DOM, filters, keys, hostile texts."""

from __future__ import annotations

import json
import re

import pytest

from lm_eval_pruned.report.flips import KINDS, Changed
from lm_eval_pruned.report.flips_page import as_flips_page
from lm_eval_pruned.results.documents import Answer, Question
from lm_eval_pruned.results.files import Run
from tests.helpers.chromium import chromium_page, find_chromium
from tests.helpers.results_files import pruning
from tests.report.test_flips import HOSTILE


#: Rows that a list of 900 pixels may hold in the DOM: those that are visible, and six
#: above and below.
MOST_ROWS = 900 // 60 + 2 + 12
MANY = 10_000

in_a_browser = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium to look at the page with"
)


def run_of(name, percent, folder):
    return Run(name, folder, {}, config={"pruning": pruning(percent)})


def runs(folder):
    return run_of("base", 0, folder), [
        run_of(name, percent, folder) for name, percent in (("p20", 20), ("p40", 40))
    ]


def made(number, *, task=None, run="p20", kind=None, prompt=None, after="1"):
    """Return a made document in which every tenth asks about herons."""
    animal = "heron" if number % 10 == 0 else "otter"
    question = Question(
        str(number),
        f"{number:064x}",
        prompt or f"Question {number}: where does an {animal} live? " + "word " * 80,
        "0",
        (" by the river", " in the sky"),
    )
    kind = kind or KINDS[number % 2]
    task = task or f"task{number % 4}"
    before = Answer(kind in (KINDS[0], KINDS[3]), "0")
    return Changed(run, task, task, kind, question, before, Answer(False, after))


def write(folder, changed, **options):
    base, others = runs(folder)
    file = folder / "flips.html"
    page = as_flips_page("A model", base, others, changed, **options)
    file.write_text(page, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium_page(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A page of 10,000 changed answers."""
    folder = tmp_path_factory.mktemp("many")
    return write(
        folder,
        [made(number, run=("p20", "p40")[number // 5000]) for number in range(MANY)],
    )


def choose(browser, **values):
    """Set filters as somebody would who clicks and types."""
    for name, value in values.items():
        event = "input" if name == "words" else "change"
        browser.run(
            f"(() => {{ const e = document.getElementById({name!r});"
            f" e.value = {json.dumps(value)};"
            f" e.dispatchEvent(new Event({event!r}, {{bubbles: true}})); }})()"
        )


def count(browser):
    text = browser.run("document.getElementById('count').textContent")
    return int(text.split(" of ")[0].replace(",", ""))


def in_dom(browser):
    return browser.run("document.querySelectorAll('.row').length")


@in_a_browser
def test_ten_thousand_documents_keep_few_rows_in_the_dom(browser, many):
    browser.errors.clear()
    browser.open(many)
    browser.wait("document.querySelectorAll('.row').length")
    assert count(browser) == MANY
    assert 5 < in_dom(browser) <= MOST_ROWS
    for share in (0.25, 0.5, 1.0):
        browser.run(
            f"document.getElementById('list').scrollTop = {share} * 60 * {MANY}"
        )
        last = min(int(share * MANY), MANY - 1)
        browser.wait(f"document.getElementById('row-{last}')")
        assert in_dom(browser) <= MOST_ROWS
    assert browser.run("document.getElementsByTagName('*').length") < 400
    assert not browser.errors


@in_a_browser
def test_filters_and_search_over_ten_thousand_documents(browser, many):
    browser.open(many)
    browser.wait("document.querySelectorAll('.row').length")
    choose(browser, task="1")
    assert count(browser) == MANY // 4
    choose(browser, run="1")
    assert count(browser) == MANY // 8
    choose(browser, kind="0")
    assert count(browser) == 0
    assert browser.run("document.getElementById('none').textContent")
    choose(browser, task="", run="", kind="")
    choose(browser, words="HERON")
    browser.wait(
        f"document.getElementById('count').textContent.startsWith('{MANY // 10:,}')"
    )
    assert in_dom(browser) <= MOST_ROWS
    assert (
        browser.run("document.querySelector('#document mark').textContent") == "heron"
    )
    choose(browser, words="heron 9990:")
    browser.wait("document.getElementById('count').textContent.startsWith('1 ')")
    assert "Question 9990" in browser.run("document.querySelector('.row').textContent")


@in_a_browser
def test_keys(browser, many):
    browser.open(many)
    browser.wait("document.querySelectorAll('.row').length")
    active = "document.getElementById('list').getAttribute('aria-activedescendant')"
    browser.run("document.getElementById('list').focus()")
    for key, row in (
        ("ArrowDown", 1),
        ("ArrowDown", 2),
        ("ArrowUp", 1),
        ("End", MANY - 1),
        ("Home", 0),
    ):
        browser.key(key)
        browser.wait(f"{active} == 'row-{row}'")
        selected = browser.run(
            "[...document.querySelectorAll('[aria-selected=true]')].map(e => e.id)"
        )
        assert selected == [f"row-{row}"]
        text = browser.run("document.getElementById('document').textContent")
        # Of the documents every second turned from right to wrong: those come first.
        assert f"document {row if row == MANY - 1 else 2 * row}," in text
    browser.key("Enter")
    assert browser.run("document.activeElement.id") == "document"
    browser.key("Escape")
    assert browser.run("document.activeElement.id") == "list"
    browser.key("/")
    assert browser.run("document.activeElement.id") == "words"
    assert browser.run("document.getElementById('words').value") == ""


@in_a_browser
def test_both_answers_stand_side_by_side(browser, tmp_path):
    browser.open(write(tmp_path, [made(3, kind=KINDS[0])]), width=1280)
    browser.wait("document.querySelectorAll('.row').length")
    left, right = browser.run(
        "[...document.querySelectorAll('.pair section')].map("
        "e => [e.textContent, e.getBoundingClientRect().top])"
    )
    assert left[0] == "base (unpruned, 4.00): right \u2713by the river"
    assert right[0] == "p20 (3.20): wrong \u2717in the sky"
    assert left[1] == right[1]


@in_a_browser
def test_what_was_lost_comes_first(browser, tmp_path):
    changed = [made(number, kind=kind) for number, kind in enumerate(reversed(KINDS))]
    browser.open(write(tmp_path, changed))
    browser.wait("document.querySelectorAll('.row').length")
    rows = browser.run(
        "[...document.querySelectorAll('.row .kind')].map(e => e.textContent)"
    )
    assert [row.partition(" ")[2] for row in rows] == list(KINDS)


@in_a_browser
def test_blank_answers_are_said_to_be_blank(browser, tmp_path):
    question = Question("1", "", "Write.", "length_constraints:number_words", ())
    before = Answer(True, "Right.\n" + "\n" * 18 + "____")
    changed = Changed("p20", "t", "t", KINDS[0], question, before, Answer(False, " \n"))
    browser.open(write(tmp_path, [changed]), width=1280)
    browser.wait("document.querySelectorAll('.row').length")
    left, right = browser.run(
        "[...document.querySelectorAll('.pair section > :last-child')].map(e => e.innerText)"
    )
    assert left == "Right.\n(19 line breaks)\n____"
    assert right == "(white space alone)"
    headings = browser.run("[...document.querySelectorAll('h2')].map(e => e.innerText)")
    assert "Expected" in headings


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1280])
def test_nothing_is_cut_off(browser, many, scheme, width):
    browser.open(many, width=width, height=844, scheme=scheme)
    browser.wait("document.querySelectorAll('.row').length")
    root = "document.documentElement"
    assert browser.run(f"{root}.scrollWidth == {root}.clientWidth")
    outside = browser.run(
        "[...document.querySelectorAll('select, input, #list, #document, .text')].filter(e => {"
        " const b = e.getBoundingClientRect(); return b.left < 0 || b.right > innerWidth; }).length"
    )
    assert outside == 0
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


@in_a_browser
@pytest.mark.parametrize("hostile", HOSTILE)
def test_texts_are_never_markup(browser, tmp_path, hostile):
    question = Question(hostile, hostile, hostile, hostile, (hostile, hostile + "2"))
    changed = [
        Changed(
            "p20", hostile, hostile, KINDS[0], question,
            Answer(True, "0"), Answer(False, "1"),
        ),
        Changed(
            "p20", hostile, hostile, KINDS[2], Question("1", "", hostile, "", ()),
            Answer(False, hostile, hostile + "3"), Answer(False, None, hostile),
        ),
    ]  # fmt: skip
    browser.errors.clear()
    browser.requests.clear()
    file = write(tmp_path, changed)
    browser.open(file)
    browser.wait("document.querySelectorAll('.row').length == 2")
    elements = "document.querySelectorAll('script, img').length"
    for move in ("Home", "End"):
        browser.run("document.getElementById('list').focus()")
        browser.key(move)
        assert browser.run(elements) == 2, "the data and the page's own script"
    assert browser.run("document.title") == "Changed answers: A model"
    written = browser.run(
        "[...document.querySelectorAll('#document .text')].map(e => e.textContent)"
    )
    assert hostile in written
    assert not browser.errors
    assert set(browser.requests) == {file.as_uri()}


def test_the_page_needs_nothing_and_runs_one_script_alone(tmp_path):
    page = write(tmp_path, [made(1)]).read_text(encoding="utf-8")
    assert len(re.findall(r"<script", page)) == 2
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"report.html"}
    assert "default-src 'none'" in page
    assert "innerHTML" not in page
    (policy,) = re.findall(r"script-src '(sha256-[^']+)'", page)
    assert policy.endswith("=")


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    ]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_texts_and_edges_stand_out(tmp_path):
    page = write(tmp_path, [made(1)]).read_text(encoding="utf-8")
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in
               re.findall(r":root \{(.*?)\}", page, re.DOTALL)]  # fmt: skip
    assert len(schemes) == 2
    for colours in schemes:

        def contrast(one, other, colours=colours):
            low, high = sorted(luminance(colours[name]) for name in (one, other))
            return (high + 0.05) / (low + 0.05)

        for text, grounds in {
            "ink": ("ground", "band", "chosen", "found"),
            "quiet": ("ground",),
            "better": ("ground", "chosen"),
            "worse": ("ground", "chosen"),
        }.items():
            assert min(contrast(text, ground) for ground in grounds) >= 4.5
        assert contrast("edge", "ground") >= 3


def test_a_hostile_title(tmp_path):
    base, others = runs(tmp_path)
    page = as_flips_page(HOSTILE[0], base, others, [made(1)])
    assert "<script>document.title" not in page


def test_what_all_prompts_begin_with_is_kept_once(tmp_path):
    shots = "An example with its answer.\n" * 10
    changed = [
        made(number, task="t", prompt=f"{shots}And number {number}?")
        for number in range(50)
    ]
    page = write(tmp_path, changed).read_text(encoding="utf-8")
    assert page.count("An example with its answer.") == 10
    assert page.count("And number 49?") == 1


def test_documents_that_several_sizes_change_are_kept_once(tmp_path):
    first = made(1)
    again = Changed(
        "p40", first.task, first.leaf, KINDS[2], first.question, first.before,
        Answer(False, "1"),
    )  # fmt: skip
    page = write(tmp_path, [first, again]).read_text(encoding="utf-8")
    assert page.count("Question 1:") == 1


def test_without_texts(tmp_path):
    page = write(tmp_path, [made(1)], texts=False).read_text(encoding="utf-8")
    for text in ("Question 1", "otter", "by the river"):
        assert text not in page
    assert f"{1:064x}"[:16] in page


@in_a_browser
def test_without_texts_filters_still_work(browser, tmp_path):
    changed = [made(number) for number in range(8)]
    browser.open(write(tmp_path, changed, texts=False))
    browser.wait("document.querySelectorAll('.row').length")
    choose(browser, task="1")
    assert count(browser) == 2
    assert "--no_texts" in browser.run(
        "document.getElementById('document').textContent"
    )
