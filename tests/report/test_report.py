"""The files of a report, and the page: what is in them, and that nothing in results is run."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from lm_eval_pruned.compare.comparison import compare
from lm_eval_pruned.report.sections import families_section
from lm_eval_pruned.results.groups import FAMILIES, family_of
from lm_eval_pruned.results.runs import read_sweep
from tests.helpers import checkpoints
from tests.helpers.results_files import pruning, spread, write_sweep
from tests.report.conftest import NASTY


pytest.importorskip("altair", reason="figures need the extra `report`")

from lm_eval_pruned.report.page import Section, as_markdown
from lm_eval_pruned.report.report import compared, write_report


@pytest.fixture(scope="module")
def page(sweep):
    return (sweep / "report/report.html").read_text(encoding="utf-8")


def elements(page):
    """Return the tags of a page with their attributes."""
    found = []

    class Elements(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, dict(attrs)))

    Elements().feed(page)
    return found


def written(folder, name="report.md"):
    sweep = read_sweep(folder)
    write_report(sweep, compared(sweep))
    return (folder / "report" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["report.html", "flips.html"])
def test_a_page_needs_nothing_and_runs_its_scripts_alone(sweep, name):
    page = (sweep / "report" / name).read_text(encoding="utf-8")
    for tag, attributes in elements(page):
        assert tag not in {"link", "iframe", "img", "object", "embed"}
        for attribute in ("src", "href", "xlink:href", "action"):
            value = attributes.get(attribute) or "#"
            assert re.match(
                r"#|data:text/csv;|(report|flips)\.html$|flips\.jsonl$", value
            )
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL))
    assert not re.search(r"@import|url\(", styles)
    # What the library would load if it were told to, the browser refuses.
    (policy,) = (each for _, each in elements(page) if "http-equiv" in each)
    rules = dict(rule.split(None, 1) for rule in policy["content"].split("; "))
    assert re.fullmatch(r"('sha256-[\w+/]+=' ?)+", rules.pop("script-src"))
    none = dict.fromkeys(("default-src", "base-uri", "form-action"), "'none'")
    assert rules == none | {"style-src": "'unsafe-inline'"}


def test_the_page_does_not_run_what_results_say(page, sweep):
    scripts = re.findall(r"<script[^>]*>(.*?)</script", page, re.DOTALL)
    assert len(scripts) == page.count("<script") == 4
    *data, library, own = scripts
    assert NASTY in json.dumps(list(map(json.loads, data))).replace("\\\\", "\\")
    assert "alert('x')" not in library + own
    assert "<" not in "".join(data)
    assert "&lt;script&gt;" in page
    text = (sweep / "report/report.md").read_text(encoding="utf-8")
    before_code, _, _ = text.partition("```json")
    assert "<script" not in before_code
    assert "&lt;script>alert('x')&lt;script>\\|$" in before_code
    for file in sweep.glob("report/plots/*.svg"):
        assert "<script" not in file.read_text(encoding="utf-8")


def test_a_comment_shows_no_image_and_names_nobody():
    texts = ["Thanks @octocat!", "![x](https://example.org/pixel.png)"]
    section = Section("Answers", texts, notes=texts)
    text = as_markdown("title", texts[0], [section])
    assert not re.search(r"@\w|!\[", text)
    assert as_markdown("title", "", [section], terminal=True).count("@octocat!") == 2


def test_the_page_hands_on_its_scores(page, sweep):
    (link,) = (each for tag, each in elements(page) if "download" in each)
    content = base64.b64decode(link["href"].partition("base64,")[2])
    assert content == (sweep / "report/results.csv").read_bytes()


def test_drawings_have_ids_colours_and_words_of_their_own(page):
    ids = [attributes["id"] for _, attributes in elements(page) if "id" in attributes]
    assert len(ids) == len(set(ids))
    without = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', without)) <= set(ids)
    drawings = re.findall(r"<svg.*?</svg>", without, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        assert "var(--ink)" in drawing
        assert not re.search(r"#[0-9a-fA-F]{6}\b", drawing)
    figures = [each for tag, each in elements(page) if tag == "figure"]
    assert all(len(each["aria-label"]) > 30 for each in figures)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("report.html", 'worse" data-of="p60 (1.60)"><span>0.3000 \u25bc\u2581<'),
        ("report.html", ">\u25b2 1 better (at floor)<"),
        ("report.html", "<details><summary>Versions, settings"),
        ("report.md", "mmlu failed on p80: out of memory"),
        ("report.md", "Sources: CPU: modelled."),
        ("report.md", "|p20 (3.20)|wikitext|generate_until|20.0|300.0|0.3|20|"),
    ],
)
def test_what_a_report_tells(sweep, name, words):
    assert words in (sweep / "report" / name).read_text(encoding="utf-8")


#: Words, also between underscores, that are shown in more than one line.
BROKEN = """
(() => {
  const found = [];
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode;
    if (!text.parentElement.closest("td, th, p, li") || text.parentElement.closest("svg")) continue;
    for (const word of text.data.matchAll(/[\\p{L}\\p{N}.]+/gu)) {
      const range = document.createRange();
      range.setStart(text, word.index);
      range.setEnd(text, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map((r) => Math.round(r.top))).size > 1) found.push(word[0]);
    }
  }
  return found;
})()
"""
CUT = "[...document.querySelectorAll('.wide')].filter((e) => e.scrollWidth > e.clientWidth).length"


def test_on_a_telephone_no_word_breaks_and_no_table_is_cut(sweep, browser):
    browser.open(sweep / "report/report.html", width=390)
    assert browser.run(BROKEN) == []
    assert browser.run(CUT) == 0
    assert browser.run("document.documentElement.scrollWidth") == 390
    rows = "document.querySelectorAll('.rows').length"
    assert browser.run(rows) and browser.run(
        "document.querySelectorAll('.wide').length"
    )


@pytest.mark.parametrize(
    ("runs", "words", "not_there"),
    [
        # A baseline that scores nothing, no knowledge task, two sizes.
        (
            [{"ifeval": [0.0] * 80}, {"ifeval": spread(0.4)}],
            "plots/scores-maw.png",
            "plots/kept|Knowledge against",
        ),
        ([{"ifeval": spread(0.4)}], "|ifeval|acc \u2191|0.4000|", "plots/"),
        ([{"a": spread(0.4)}, {"b": [1.0]}], "p20 shares no task", "plots/"),
    ],
)
def test_small_sweeps(tmp_path, runs, words, not_there):
    made = [{task: {"acc,none": v} for task, v in tasks.items()} for tasks in runs]
    sizes = {f"p{20 * n}": (20 * n, tasks) for n, tasks in enumerate(made)}
    text = written(write_sweep(tmp_path, sizes))
    assert words in text
    assert not re.search(not_there, text)


def test_families_by_size(tmp_path):
    def tasks(*right):
        names = ("mmlu", "truthfulqa_mc1", "truthfulqa_mc2")
        answers = [{"acc,none": [float(n < k) for n in range(40)]} for k in right]
        # It cannot be tested.
        ifeval = {"ifeval": {"f1,none": {"values": [1.0], "score": 0.3}}}
        return {**dict(zip(names, answers, strict=True)), **ifeval}

    random = pruning(40, criterion="random", seed=0)
    runs = {"base": (0, tasks(30, 20, 20)), "p20": (20, tasks(30, 20, 35))}
    runs |= {"p40": (40, tasks(10, 5, 35)), "r40": (random, tasks(9, 20, 20))}
    folder = write_sweep(tmp_path, runs)
    base, others = read_sweep(folder).split()
    section = families_section([base, *others], compare(base, others))
    assert [c.title for c in section.table.columns] == [
        "family",
        "pruned by",
        "3.20",
        "2.40",
    ]
    rows = section.table.cells
    assert [[cell.text for cell in row] for row in rows] == [
        ["Knowledge", "maw", "\u25cb 1 not shown", "\u25bc 1 worse"],
        ["Knowledge", "random, seed 0", "-", "\u25bc 1 worse"],
        ["Truthfulness", "maw", "\u25b2 1 better, \u25cb 1 not shown"]
        + ["\u25b2 1 better, \u25bc 1 worse"],
        ["Truthfulness", "random, seed 0", "-", "\u25cb 2 not shown"],
        ["Instruction following", "maw", *["\u00d7 1 not tested"] * 2],
        ["Instruction following", "random, seed 0", "-", "\u00d7 1 not tested"],
    ]
    verdicts = [[cell.verdict for cell in row] for row in (rows[0], rows[2])]
    assert verdicts == [["", "", "", "worse"], ["", "", "better", ""]]


def test_families_are_those_of_the_groups():
    for family in FAMILIES[:-1]:
        file = checkpoints.ROOT / "tasks" / f"pruned_{family.name}.yaml"
        # The tags of functions name code, which nothing here needs.
        text = re.sub(r".*!function.*", "", file.read_text(encoding="utf-8"))
        for member in yaml.safe_load(text)["task"]:
            assert family_of(member.get("task") or member["group"], {}) is family
