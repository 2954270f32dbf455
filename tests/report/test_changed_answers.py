"""Answers that changed: their counts, the page that shows them, and a report that may be published."""

from __future__ import annotations

import json
import re

import pytest

from lm_eval_pruned.compare.comparison import compare
from lm_eval_pruned.report.changed_answers import ALL, PAGE, changed_answers
from lm_eval_pruned.results.runs import read_run, read_sweep
from tests.helpers.results_files import (
    offering,
    pruning,
    write_run,
    write_sweep,
    written,
)


HOSTILE = (
    "</script><script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "]]>&lt;&amp;{{ 7*7 }}{% raw %}",
    "\u2028\u2029\ud800\x1b",
)


def picks(answers, *, prompt="Which?", endings=(" one", " two", " three")):
    """Return a task of multiple choice in which a model picked `answers`; 0 is right."""
    rows = {}
    for number, answer in enumerate(answers):
        likelihoods = [-1.0 - (place != answer) for place in range(len(endings))]
        asked = f"{prompt} {number}"
        rows[number] = offering(endings, prompt=asked, likelihoods=likelihoods)
    return {"values": [float(not answer) for answer in answers], "rows": rows}


def writes(texts, right):
    """Return a task of free text."""
    (spec,) = written(texts, map(float, right)).values()
    return spec


def sweep_of(folder, before, after):
    return write_sweep(folder, {"base": (0, before), "p40": (40, after)})


def read(folder, title="A model", **options):
    """Return the section and the files."""
    base, others = read_sweep(folder).split()
    return changed_answers(title, base, compare(base, others).rows, **options)


def counted(section):
    """Return the rows of the table of counts."""
    return [[cell.text for cell in row] for row in section.table.cells]


def rows_of(page):
    """Return the texts of each row of a page."""
    body = page.partition("<tbody>")[2].partition("</tbody>")[0]
    rows = [re.sub(r"<[^>]*>", "|", row) for row in body.split("<tr>")[1:]]
    return [[text.strip() for text in row.split("|") if text.strip()] for row in rows]


LOST, GAINED = "right to wrong", "wrong to right"


@pytest.mark.parametrize("samples", [True, False])
def test_a_group_is_counted_over_its_members_where_there_are_samples(tmp_path, samples):
    group = {"groups": {"both": ["a", "b"]}, "samples": samples}
    runs = []
    for percent, answers in ((0, [0, 1]), (40, [1, 1])):
        group["group_scores"] = {"both": {"acc,none": answers.count(0) / 2}}
        tasks = {task: {"acc,none": picks(answers)} for task in ("a", "b")}
        folder = tmp_path / str(percent)
        write_run(folder, tasks, pruning=pruning(percent), **group)
        runs.append(read_run(folder))
    section, files = changed_answers(
        "A model", runs[0], compare(runs[0], runs[1:]).rows
    )
    if not samples:
        assert (section, files) == (None, {})
        return
    assert counted(section)[0][1:] == ["both", "acc,none", "4", "2", "0", "50%"]
    assert [row[2] for row in rows_of(files[PAGE])] == ["a", "b"]


@pytest.mark.parametrize("texts", [True, False])
def test_the_page_has_the_first_thousand_and_the_file_beside_it_all(tmp_path, texts):
    long, right = "\ud800\u2028" + "x" * 499, [n < 1100 for n in range(1101)]
    before, after = [f"A{n}" for n in range(1101)], [long, *map(str, range(1100))]
    tasks = (
        {"quiz": {"em,none": writes(said, is_right)}}
        for said, is_right in ((before, right), (after, [False] * 1101))
    )
    section, files = read(sweep_of(tmp_path, *tasks), texts=texts)
    assert counted(section)[0][3:] == ["1101", "1100", "0", "100%"]
    page, rows = files[PAGE], [*map(json.loads, files[ALL].strip().split("\n"))]
    assert len(rows_of(page)) == 1000 and {LOST} == {r[0] for r in rows_of(page)}
    assert f'1,000 of 1,101 are shown; <a href="{ALL}">{ALL}</a> has all' in page
    kinds = [(row["change"], row["doc_id"]) for row in rows]
    assert kinds[:2] == [(LOST, "0"), (LOST, "1")]
    assert kinds[-1] == ("another wrong answer", "1100")
    assert ("after" in rows[0]) == ("x" * 400 in page) == texts
    if texts:
        assert (rows[0]["before"], rows[0]["after"]) == ("A0", long)
        assert "x" * 498 in page and "x" * 499 not in page
        # The long answer alone is cut.
        assert page.count("cut after 500 of 501 characters") == 1


@pytest.fixture
def shown(browser, tmp_path):
    """Return a function that opens the page of a sweep, in which nothing may fail."""

    def show(before, after, title="A model", **look):
        file = tmp_path / PAGE
        page = read(sweep_of(tmp_path, before, after), title)[1][PAGE]
        file.write_text(page, encoding="utf-8")
        browser.open(file, **look)
        assert (browser.requests, browser.errors) == ([file.as_uri()], [])
        return browser

    return show


VISIBLE = "[...document.querySelectorAll('tbody tr')].filter((e) => !e.hidden).length"


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_the_page_is_as_wide_and_as_light_as_the_screen(shown, width, scheme):
    tasks = ({"birds": {"acc,none": picks([n] * 20)}} for n in (0, 1))
    page = shown(*tasks, width=width, scheme=scheme)
    assert page.run("document.documentElement.scrollWidth") == width
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_texts_are_never_markup(shown, hostile):
    asked = {"prompt": hostile, "endings": (f"{hostile} 1", f"{hostile} 2")}
    tasks = []
    for n, text in enumerate([hostile, hostile + "2"]):
        free = {"em,none": writes([text], [1 - n])}
        tasks.append({"quiz": {"acc,none": picks([n], **asked)}, "free": free})
    page = shown(*tasks, title=f"A model {hostile}")
    assert page.run(VISIBLE) == 2
    assert page.run("document.querySelectorAll('script, img').length") == 1
    assert page.run("document.title").startswith("Changed answers: A model")
    seen = page.run("[...document.querySelectorAll('.text')].map(e => e.innerText)")
    shown_as = hostile.replace("\ud800", "?").strip()
    assert any(text.strip().startswith(shown_as) for text in seen)


@pytest.mark.slow
def test_the_page_of_an_earlier_report_goes_with_its_samples(tmp_path):
    pytest.importorskip("altair", reason="plots need the extra `report`")
    from lm_eval_pruned.report.report import compared, write_report

    tasks = ({"quiz": {"acc,none": picks(picked)}} for picked in ([0, 1], [1, 1]))
    sweep, pages = sweep_of(tmp_path, *tasks), []
    for _ in range(2):
        results = read_sweep(sweep)
        write_report(results, compared(results))
        pages.append([(sweep / "report" / name).exists() for name in (PAGE, ALL)])
        for file in sweep.glob("units/*/*/samples_*.jsonl"):
            file.unlink()
    assert pages == [[True, True], [False, False]]
